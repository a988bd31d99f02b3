"""The train stage on a run folder: pairs and replay in, an adapter or a model and a log out, interrupted or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import make_tiny_llava, sample_pictures
from training_cases import preference_records

from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.data.pairs import read_pairs, replay_pairs, split
from mmdpo_trainers.errors import ConfigError, DataError, StageError
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.stages import train as stage
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder
from mmdpo_trainers.training.config import PreferenceConfig


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_tiny_llava(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as augment and select leave it."""
    pictures = sample_pictures(6)
    for name in ("augment", "select"):
        (tmp_path / name / "images").mkdir(parents=True)
    for index, picture in enumerate(pictures):
        picture.save(tmp_path / "augment" / "images" / f"{index}.png")
        picture.save(tmp_path / "select" / "images" / f"{index}.png")
    pairs = preference_records(8, pictures=[f"images/{index}.png" for index in range(6)])
    write_lines(tmp_path / "select" / "pairs.jsonl", pairs)
    questions = {"what colour is it": ("red", "blue", "green"), "how many are there": ("two", "three", "two")}
    singles = [
        {
            "id": f"single-{index}-{question.split()[1]}",
            "format": "single",
            "images": [f"images/{index}.png"],
            "prompt": f"<image>\n{question} ?",
            "answer": answers[index % 3],
        }
        for index in range(6)
        for question, answers in questions.items()
    ]
    write_lines(tmp_path / "augment" / "singles.jsonl", singles)
    return tmp_path


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def context(run: Path, model: Path, **train: Any) -> StageContext:
    args = {
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "lora_r": 4,
        "lora_alpha": 8,
        "learning_rate": 1e-2,
        "logging_steps": 1,
    }
    options = {**train, "args": {**args, **train.get("args", {})}}
    config = RunConfig.from_dict({"model": str(model), "run_dir": str(run), "device": "cpu", "seed": 3, "train": options})
    return StageContext(run=RunFolder(run), config=config, stage="train")


def test_run(run: Path, model: Path) -> None:
    losses = {"loss_type": ["sigmoid", "nll"], "loss_weights": [1.0, 0.5]}
    work = context(run, model, replay=0.5, held_out=0.25, args={"num_train_epochs": 2, "eval_steps": 2, **losses})
    summary = stage.run(work)
    assert {key: summary[key] for key in ("pairs", "replay", "held_out", "steps", "epochs")} == {
        "pairs": 6,
        "replay": 3,
        "held_out": 2,
        "steps": 6,
        "epochs": 2.0,
    }
    json.dumps(summary)
    entries = list(read_jsonl(run / "train" / "log.jsonl"))
    assert [entry["step"] for entry in entries if "loss" in entry] == [1, 2, 3, 4, 5, 6]
    assert [entry["step"] for entry in entries if "eval_loss" in entry] == [2, 4, 6]
    assert summary["final_loss"] == entries[-2]["loss"] < entries[0]["loss"]
    assert any("attn/ratio_sequence" in entry for entry in entries)
    assert not (run / "train" / ".final.tmp").exists()
    base, trained = load_model(model), load_model(model, adapter=run / "train" / "final")
    changed = {
        name for name, weights in trained.model.state_dict().items() if not torch.equal(weights, base.model.state_dict()[name])
    }
    assert changed and all("language_model.layers" in name for name in changed)

    assert stage.run(work) == summary
    assert [json.loads(line) for line in (run / "train" / "log.jsonl").read_text().splitlines()] == entries


def test_both_references_train_the_same_adapter(run: Path, model: Path) -> None:
    adapters = []
    for reference in ("adapter", "model"):
        stage.run(context(run, model, reference=reference))
        adapters.append(load_file(run / "train" / "final" / "adapter_model.safetensors"))
        shutil.rmtree(run / "train")
    assert adapters[0].keys() == adapters[1].keys()
    assert any(bool(weights.any()) for name, weights in adapters[0].items() if "lora_B" in name)
    for name, weights in adapters[0].items():
        torch.testing.assert_close(weights, adapters[1][name], rtol=1e-5, atol=1e-7)


def test_full_model(run: Path, model: Path) -> None:
    stage.run(context(run, model, args={"full_finetune": True, "learning_rate": 1e-3}))
    final = run / "train" / "final"
    assert "mmdpo_tree" not in (final / "config.json").read_text()
    base, trained = load_model(model).model.state_dict(), load_model(final).model.state_dict()
    changed = {name for name in base if not torch.equal(base[name], trained[name])}
    assert any("lm_head" in name for name in changed)
    assert not any("vision_tower" in name or "projector" in name for name in changed)


def test_replay_pairs(run: Path) -> None:
    source = run / "augment" / "singles.jsonl"
    truth = {record["id"]: record["answer"] for record in read_jsonl(source)}
    found = replay_pairs(source, 30, seed=1)
    assert len(found) == 30 and len({record["id"] for record in found}) == 30
    for record in found:
        answer = truth[record["id"].rsplit("/", 1)[-1]]
        rejected = record["rejected"][0]["content"]
        assert record["chosen"][0]["content"] == answer != rejected
        colours = {"red", "blue", "green"}
        assert (rejected in colours) == (answer in colours), "the wrong answer belongs to the same question"
        assert Path(record["images"][0]).is_file()
    # All 12 records are used before any is used again.
    assert len({record["id"].rsplit("/", 1)[-1] for record in found[:12]}) == 12
    assert replay_pairs(source, 30, seed=1) == found != replay_pairs(source, 30, seed=2)


def test_replay_needs_answers_that_differ(run: Path) -> None:
    source = run / "augment" / "same.jsonl"
    write_lines(source, [{**record, "answer": "red"} for record in read_jsonl(run / "augment" / "singles.jsonl")])
    with pytest.raises(StageError, match="no single-image records with different answers"):
        replay_pairs(source, 2, seed=0)
    with pytest.raises(StageError, match="run augment, give your own with train.replay_source"):
        replay_pairs(run / "nothing.jsonl", 2, seed=0)


def test_split() -> None:
    kept, held_out = split(10, 0.3, seed=0)
    assert len(held_out) == 3 and sorted(kept + held_out) == list(range(10))
    assert split(10, 0.3, seed=0) == (kept, held_out) != split(10, 0.3, seed=1)
    assert split(4, 0.0, seed=0) == ([0, 1, 2, 3], [])
    with pytest.raises(StageError, match="share in"):
        split(4, 1.0, seed=0)


def test_pairs_of_ones_own(run: Path, model: Path) -> None:
    """A `datasets` folder with pictures inside, without ids and formats."""
    pairs = [{key: record[key] for key in ("prompt", "chosen", "rejected", "images")} for record in preference_records(5)]
    message = [{"role": datasets.Value("string"), "content": datasets.Value("string")}]
    columns = {name: message for name in ("prompt", "chosen", "rejected")}
    features = datasets.Features({**columns, "images": datasets.List(datasets.Image())})
    folder = run / "mine"
    datasets.Dataset.from_list(pairs, features=features).save_to_disk(str(folder))
    summary = stage.run(context(run, model, input=str(folder)))
    assert summary["pairs"] == 5 and summary["steps"] == 2

    shutil.rmtree(run / "train")
    parquet = run / "mine.parquet"
    broken = [{**pair, "images": [{"bytes": b"not a picture", "path": None}] if pair is pairs[1] else []} for pair in pairs[:2]]
    broken[0]["prompt"] = [{"role": "user", "content": "what ?"}]
    datasets.Dataset.from_list(broken, features=features).to_parquet(str(parquet))
    with pytest.raises(DataError, match="record row 1: a picture: not a picture"):
        stage.run(context(run, model, input=str(parquet)))


def test_files_that_are_no_preference_data(tmp_path: Path) -> None:
    records = tmp_path / "pairs.json"
    records.write_text("{}")
    parquet = tmp_path / "pairs.parquet"
    parquet.write_bytes(b"no parquet")
    (tmp_path / "empty").mkdir()
    for path in (records, parquet, tmp_path / "empty"):
        with pytest.raises(DataError, match="preference data is a .jsonl file") as error:
            read_pairs(path)
        assert str(path) in str(error.value)


def test_summary_of_a_short_run(run: Path, model: Path) -> None:
    """Fewer steps than `logging_steps`, and records that `max_length` leaves out."""
    summary = stage.run(context(run, model, replay=0.5, held_out=0.25, args={"logging_steps": 50, "max_length": 60}))
    assert summary["final_loss"] is not None and summary["first"] == summary["last"]
    assert summary["last"]["step"] == summary["steps"]
    assert summary["left_out"] > 0
    assert summary["pairs"] + summary["replay"] + summary["held_out"] + summary["left_out"] == 6 + 3 + 2
    assert summary["replay"] == 3


def test_missing_package_is_one_line(run: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def construct(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("wandb is not installed.\nRun pip install wandb")

    construct.config_class = PreferenceConfig  # type: ignore[attr-defined]
    monkeypatch.setattr(stage, "TRAINERS", {"preference": construct})
    with pytest.raises(ConfigError, match="train: wandb is not installed. Run pip install wandb"):
        stage.run(context(run, model))


def test_bad_input_is_named(run: Path, model: Path) -> None:
    path = run / "select" / "pairs.jsonl"
    good = list(read_jsonl(path))
    write_lines(path, [good[0], {key: value for key, value in good[1].items() if key != "rejected"}])
    with pytest.raises(DataError, match="record record-1: no column 'rejected'"):
        read_pairs(path)
    write_lines(path, [{**good[0], "images": ["images/0.png", "images/gone.png"]}])
    with pytest.raises(DataError, match="record record-0: picture .*gone.png does not exist"):
        read_pairs(path)
    for changes, message in (
        ({"target": 9}, "target must be"),
        ({"chosen": ["x"]}, "chosen must be text"),
        ({"chosen": ""}, "chosen is empty"),
        ({"images": "x.png"}, "images must be a list"),
        ({"images": [1, 2]}, "images must be paths"),
    ):
        write_lines(path, [{**good[0], **changes}])
        with pytest.raises(DataError, match=f"record record-0: {message}"):
            read_pairs(path)
    write_lines(path, [])
    with pytest.raises(StageError, match="holds no pairs"):
        stage.run(context(run, model))
    write_lines(path, good)
    with pytest.raises(StageError, match="longer than max_length=5"):
        stage.run(context(run, model, args={"max_length": 5}))
    for name, value in (
        ("learning_rat", 1.0),
        ("beta", -1),
        ("hub_token", "hf_secret"),
        ("attention_layer", 9),
        ("output_dir", "x"),
        ("resume_from_checkpoint", "x"),
        ("num_train_epochs", 0),
    ):
        with pytest.raises(ConfigError, match=name):
            stage.run(context(run, model, args={name: value}))


def test_inputs(run: Path, model: Path) -> None:
    assert stage.inputs(context(run, model)) == [run / "select" / "pairs.jsonl"]
    assert stage.inputs(context(run, model, replay=0.1)) == [run / "select" / "pairs.jsonl", run / "augment" / "singles.jsonl"]


def _context(folder: Path, **values: Any) -> StageContext:
    (folder / "select").mkdir(parents=True, exist_ok=True)
    config = RunConfig.from_dict({"run_dir": str(folder), "device": "cpu", **values})
    return StageContext(run=RunFolder(folder), config=config, stage="train")


@pytest.mark.parametrize(
    ("values", "losses", "accumulation"),
    [
        ({}, ["sigmoid", "nll"], 8),
        ({"method": "mdpo"}, ["sigmoid", "copo", "ancpo"], 8),
        ({"method": "mdpo", "train": {"preset": "mia_dpo_paper"}}, ["sigmoid", "nll"], 8),
        ({"train": {"args": {"per_device_train_batch_size": 2}}}, ["sigmoid", "nll"], 4),
        ({"train": {"args": {"per_device_train_batch_size": 16}}}, ["sigmoid", "nll"], 1),
        ({"train": {"args": {"max_tokens_per_batch": 4096}}}, ["sigmoid", "nll"], 1),
        ({"train": {"args": {"loss_type": ["simpo"]}}}, ["simpo"], 8),
    ],
)
def test_defaults_follow_the_method(tmp_path: Path, values: dict[str, Any], losses: list[str], accumulation: int) -> None:
    settings = stage.preference_config(_context(tmp_path, **values), range(4), evaluate=False)
    assert settings.loss_type == losses and settings.gradient_accumulation_steps == accumulation
    assert len(settings.weight_of) == len(losses)


def test_where_the_reference_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, half = _context(tmp_path), _context(tmp_path, train={"args": {"bf16": True}})
    assert stage.reference_cache(plain) == tmp_path / "select" / "pairs.reference.jsonl"
    # Autocast makes other numbers: arms with and without it must not refuse each other's file.
    assert stage.reference_cache(half) == tmp_path / "select" / "pairs.bf16.reference.jsonl"
    # Two models may be trained on one file of pairs.
    own = _context(tmp_path / "run", model="org/other", train={"input": str(tmp_path / "mine.parquet"), "args": {"bf16": True}})
    assert stage.reference_cache(own) == tmp_path / "mine.other.bf16.reference.jsonl"
    monkeypatch.setattr("os.access", lambda *arguments: False)
    assert stage.reference_cache(plain) == tmp_path / "train" / "pairs.reference.jsonl"


def test_records_have_names_of_their_own_and_bring_corrupted_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index, picture in enumerate(sample_pictures(2)):
        picture.save(tmp_path / f"{index}.png")
    record = {"id": 7, "images": ["0.png"], "rejected_images": ["1.png"], "prompt": "what ?", "chosen": "red", "rejected": "blue"}
    lines = [record, {**record, "chosen": "cat"}, {**record, "id": "7#2"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    found = read_pairs(tmp_path / "pairs.jsonl")
    assert [each["id"] for each in found] == ["7", "7#2", "7#2#2"]
    assert found[0]["rejected_images"] == [str(tmp_path / "1.png")]
    features = datasets.Features(
        {name: datasets.Value("string") for name in ("prompt", "chosen", "rejected")}
        | {"id": datasets.Value("int64")}
        | {name: datasets.List(datasets.Image()) for name in ("images", "rejected_images")}
    )
    rows = [
        {**line, "id": 7, **{name: [str(tmp_path / image) for image in line[name]] for name in ("images", "rejected_images")}}
        for line in lines
    ]
    datasets.Dataset.from_list(rows, features=features).to_parquet(str(tmp_path / "pairs.parquet"))
    stored = read_pairs(tmp_path / "pairs.parquet")
    assert list(stored["id"]) == ["7", "7#2", "7#3"]
    assert stored[0]["rejected_images"] == [str(tmp_path / "1.png")]
    (tmp_path / "pairs.jsonl").write_text(json.dumps({**record, "rejected_images": ["2.png"]}) + "\n")
    with pytest.raises(DataError, match="record 7: picture .*2.png does not exist"):
        read_pairs(tmp_path / "pairs.jsonl")
    alone = {name: value for name, value in record.items() if "images" not in name}
    (tmp_path / "pairs.jsonl").write_text(json.dumps({**alone, "image": "0.png"}) + "\n")
    assert read_pairs(tmp_path / "pairs.jsonl")[0]["images"] == [str(tmp_path / "0.png")]
