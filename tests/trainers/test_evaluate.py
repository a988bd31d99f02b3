"""Accuracy before and after training, on the real model code; metrics; resuming."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from prompt_records import make_prompts
from tiny_models import make_tiny_llava

from mmdpo_kernels import patch_model
from mmdpo_trainers.answers.attention_ratios import attention_ratios
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.sections.answers import ScoreConfig
from mmdpo_trainers.config.sections.evaluation import EvaluateConfig
from mmdpo_trainers.errors import DataError, StageError
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.stages import evaluate
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.evaluate import accuracy_summary, answer_batch
from mmdpo_trainers.stages.folder import RunFolder

KINDS = [("sequence", 2), ("sequence", 3), ("grid", 4), ("pip", 2), ("single", 1), ("single", 1)]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> Path:
    """Prompts of which the base answers the sequences and the collage right: their truth is its own answer."""
    folder = tmp_path_factory.mktemp("prompts")
    records = make_prompts(folder, KINDS)
    loaded = load_model(model_path)
    patch_model(loaded.model)
    for record, result in zip(records, answer_batch(loaded, records, options=OPTIONS, score=ScoreConfig()), strict=True):
        if record["format"] in ("sequence", "grid"):
            record["answer"] = result["response"].upper() + " ."
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "prompts.jsonl"


OPTIONS = EvaluateConfig(max_new_tokens=3, batch_size=4)


def context_of(folder: Path, model: Path, prompts: Path, moment: Any = "before", **options: Any) -> StageContext:
    settings = {"input": str(prompts), "max_new_tokens": 3, "batch_size": 4, **options}
    config = RunConfig.from_dict({"model": str(model), "evaluate": settings})
    return StageContext(run=RunFolder(folder), config=config, stage="evaluate", moment=moment)


def test_before_training(tmp_path: Path, model_path: Path, prompts: Path) -> None:
    context = context_of(tmp_path, model_path, prompts)
    summary = evaluate.run(context)
    assert summary["accuracy"] == {"sequence": 1.0, "grid": 1.0, "pip": 0.0, "single": 0.0}
    assert summary["counts"] == {"sequence": 2, "grid": 1, "pip": 1, "single": 2}
    cell = summary["by_images"]["sequence"][3]
    assert (cell["accuracy"], cell["count"], cell["interval"]) == (1.0, 1, pytest.approx([0.2065, 1.0], abs=1e-4))
    assert summary["intervals"]["single"] == pytest.approx([0.0, 0.6576], abs=1e-4)
    assert set(summary["mean_ratio"]) == {"sequence", "grid", "pip"}

    answers = {answer["id"]: answer for answer in read_jsonl(context.folder / "answers.jsonl")}
    loaded = load_model(model_path)
    patch_model(loaded.model)
    for answer in answers.values():
        if answer["format"] == "single":
            assert answer["ratio"] is None
        else:
            assert answer["ratio"] == pytest.approx(attention_ratios(loaded, [answer])[0]["ratio"], abs=1e-6)


def test_a_killed_evaluation_gives_the_same_answers(tmp_path: Path, model_path: Path, prompts: Path) -> None:
    context = context_of(tmp_path, model_path, prompts)
    summary = evaluate.run(context)
    path = context.folder / "answers.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) * 2 // 3])
    assert evaluate.run(context) == summary and path.read_bytes() == whole


def test_after_training_takes_the_adapter_or_the_model(tmp_path: Path, model_path: Path, prompts: Path) -> None:
    context = context_of(tmp_path / "adapter", model_path, prompts, "after")
    with pytest.raises(StageError, match="run train first"):
        evaluate.run(context)

    adapted = get_peft_model(load_model(model_path).model, LoraConfig(r=2, target_modules=r".*language_model.*\.v_proj"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=1.0, generator=torch.Generator().manual_seed(0))
    adapted.save_pretrained(context.trained)
    after = evaluate.run(context)
    assert after["accuracy"]["sequence"] < 1.0, "the adapter must be used"

    # The same weights as a whole model without a processor of its own.
    whole = context_of(tmp_path / "whole", model_path, prompts, "after")
    adapted.merge_and_unload().save_pretrained(whole.trained)
    assert evaluate.run(whole)["accuracy"] == after["accuracy"]
    responses = [[a["response"] for a in read_jsonl(c.folder / "answers.jsonl")] for c in (context, whole)]
    assert responses[0] == responses[1]


def test_multiple_choice(tmp_path: Path, model_path: Path, prompts: Path) -> None:
    [record, *_] = read_jsonl(prompts)
    truth = record["answer"]
    path = tmp_path / "choice.jsonl"
    rows = [
        {**record, "id": "text", "options": ["magenta", truth], "answer": truth},
        {**record, "id": "letter", "options": ["magenta", truth], "answer": "B"},
        {**record, "id": "wrong", "options": ["magenta", truth], "answer": "A"},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    context = context_of(tmp_path / "run", model_path, path, match="choice")
    evaluate.run(context)
    correct = {answer["id"]: answer["correct"] for answer in read_jsonl(context.folder / "answers.jsonl")}
    assert correct == {"text": True, "letter": True, "wrong": False}


def test_prompts_without_answers_are_refused(tmp_path: Path, model_path: Path, prompts: Path) -> None:
    rows = [{**record, "answer": None} for record in read_jsonl(prompts)]
    path = tmp_path / "open.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(DataError, match="r0/sequence.*'answer' is missing"):
        evaluate.run(context_of(tmp_path / "run", model_path, path))


def test_prompts_without_their_pictures_are_left_out_where_that_is_allowed(
    tmp_path: Path, model_path: Path, prompts: Path
) -> None:
    rows = [{**record, "images": [*record["images"][:-1], "none.png"]} for record in read_jsonl(prompts)]
    rows[0] = next(read_jsonl(prompts))
    path = tmp_path / "gone.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    context = context_of(tmp_path / "run", model_path, path)
    with pytest.raises(DataError, match="missing: .*none.png is not a file"):
        evaluate.run(context)
    context.config.allow_missing = True
    summary = evaluate.run(context)
    assert summary["lost"] == {"records": 5, "of": 6, "reasons": {"missing": 5}} and summary["counts"] == {"sequence": 1}
    path.write_text(json.dumps(rows[1]) + "\n")
    with pytest.raises(DataError, match="none of its 1 record has its pictures, such as .*none.png"):
        evaluate.run(context)


def test_summary_of_answers() -> None:
    def answer(format: str, num_images: int, correct: bool, ratio: float | None) -> dict[str, Any]:
        return {"format": format, "num_images": num_images, "correct": correct, "ratio": ratio}

    summary = accuracy_summary(
        [
            answer("single", 1, True, None),
            answer("sequence", 2, True, 0.5),
            answer("sequence", 2, False, 0.3),
            answer("sequence", 5, False, 0.1),
        ]
    )
    assert summary["accuracy"] == pytest.approx({"sequence": 1 / 3, "single": 1.0})
    assert {n: cell["accuracy"] for n, cell in summary["by_images"]["sequence"].items()} == {2: 0.5, 5: 0.0}
    assert summary["mean_ratio"] == pytest.approx({"sequence": 0.3})
    empty = accuracy_summary([answer("single", 1, True, None)], ["single", "grid"])
    assert empty["counts"] == {"single": 1, "grid": 0} and empty["accuracy"] == {"single": 1.0}
    # Wilson's interval for 1 of 3.
    assert summary["intervals"]["sequence"] == pytest.approx([0.0615, 0.7923], abs=1e-4)
