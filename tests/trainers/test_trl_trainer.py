"""A patched model in TRL's DPOTrainer: the training it had unpatched; and the pairs of the select stage as TRL's data."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_models import make_tiny_llava, make_tiny_qwen, sample_pictures

trl = pytest.importorskip("trl", reason="TRL is a peer, installed with the extra `peers`")

from datasets import Dataset, Image, List  # noqa: E402
from peft import LoraConfig  # noqa: E402
from transformers import AutoModelForImageTextToText  # noqa: E402

from mmdpo_kernels import patch_model  # noqa: E402
from mmdpo_trainers.config.run_config import RunConfig  # noqa: E402
from mmdpo_trainers.files.json_lines import read_jsonl  # noqa: E402
from mmdpo_trainers.models.processors import load_processor  # noqa: E402
from mmdpo_trainers.stages import select  # noqa: E402
from mmdpo_trainers.stages.context import StageContext  # noqa: E402
from mmdpo_trainers.stages.folder import RunFolder  # noqa: E402

STEPS = 3


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Six pairs as the select stage writes them: two pictures each, answers of different lengths."""
    root = tmp_path_factory.mktemp("run")
    score = root / "score"
    score.mkdir()
    for number, picture in enumerate(sample_pictures(4)):
        picture.save(score / f"{number}.png")
    answers = [
        ("red", "blue"),
        ("star", "circle"),
        ("the red square", "the red ring"),
        ("two", "four"),
        ("yes", "no"),
        ("a cat", "a dog"),
    ]
    lines = []
    for number, (truth, response) in enumerate(answers):
        record = {
            "id": str(number), "source_id": str(number), "format": "sequence", "images": [f"{number % 4}.png", f"{(number + 1) % 4}.png"],
            "prompt": "Image1:<image>\nImage2:<image>\nIn Image2, what is this?", "answer": truth, "target": 1, "num_images": 2,
            "box": None, "region": None, "patch_grid": None, "options": None,
            "response": response, "response_ids": [5], "perplexity": 1.5, "ratio": 0.1,
        }  # fmt: skip
        lines.append(json.dumps(record) + "\n")
    (score / "scores.jsonl").write_text("".join(lines))
    context = StageContext(run=RunFolder(root), config=RunConfig.from_dict({"select": {}}), stage="select")
    assert select.run(context)["pairs"] == {"sequence": 6}
    return trl_dataset(context.folder / "pairs.jsonl")


def trl_dataset(path: Path) -> Dataset:
    """The lines of docs/from_trl.md that give the pairs of a run to TRL."""
    records = [
        {name: record[name] for name in ("prompt", "chosen", "rejected")}
        | {"images": [str(path.parent / image) for image in record["images"]]}
        for record in read_jsonl(path)
    ]
    return Dataset.from_list(records).cast_column("images", List(Image()))


def train(folder: Path, pairs: Dataset, output: Path, *, patched: bool, lora: bool) -> dict[str, list[float]]:
    """Logged values by name over three steps."""
    model = AutoModelForImageTextToText.from_pretrained(folder)
    before = model.get_decoder().config._attn_implementation
    if patched:
        patch_model(model)
    args = trl.DPOConfig(
        output_dir=str(output),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        learning_rate=1e-2 if lora else 2e-3,
        lr_scheduler_type="constant",
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
    )
    trainer = trl.DPOTrainer(
        model=model,
        args=args,
        train_dataset=pairs,
        processing_class=load_processor(folder, model.config.model_type),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM") if lora else None,
    )
    assert (model.get_decoder().config._attn_implementation == before) != patched
    trainer.train()
    log = trainer.state.log_history[:STEPS]
    return {
        name: [entry[name] for entry in log]
        for name in ("loss", "grad_norm", "rewards/chosen", "rewards/rejected", "logps/chosen")
    }


def test_pairs_of_the_select_stage_are_trl_data(pairs: Dataset, tmp_path: Path) -> None:
    """TRL's collator finds as many places as pictures, and the responses behind the prompt."""
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

    folder = make_tiny_llava(tmp_path / "model")
    processor = load_processor(folder, "llava")
    batch = DataCollatorForVisionPreference(processor)([pairs[0], pairs[2]])
    assert batch["pixel_values"].shape[0] == 8, "two records, two responses, two pictures"
    places = (batch["input_ids"] == processor.tokenizer.convert_tokens_to_ids("<image>")).sum(1)
    assert places.tolist() == [2 * 16] * 4
    responses = [ids[mask.bool()] for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)]
    texts = [processor.tokenizer.decode(response, skip_special_tokens=True).strip() for response in responses]
    assert texts == ["red", "the red square", "blue", "the red ring"]


@pytest.mark.parametrize(
    "make, lora",
    [(make_tiny_llava, True), (make_tiny_llava, False), (make_tiny_qwen, True)],
    ids=["llava, lora", "llava, full, with a second model", "qwen2.5-vl, lora"],
)
def test_patched_training_is_unpatched_training(make: Callable[..., Path], lora: bool, pairs: Dataset, tmp_path: Path) -> None:
    folder = make(tmp_path / "model")
    plain, patched = (train(folder, pairs, tmp_path / str(flag), patched=flag, lora=lora) for flag in (False, True))
    assert plain["loss"][0] == pytest.approx(math.log(2), rel=1e-6)
    assert abs(plain["loss"][-1] - plain["loss"][0]) > 1e-3, "training moves the loss"
    for name, values in plain.items():
        # float32, and rewards are differences of log-probabilities near -10.
        assert patched[name] == pytest.approx(values, rel=1e-5, abs=1e-5), name
