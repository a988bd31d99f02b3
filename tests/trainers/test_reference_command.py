"""`mmdpo reference`: fills the cache that training reads, says what it did, refuses another model's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny_llava, sample_pictures
from training_cases import preference_records

from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.config.values import parse_yaml
from mmdpo_trainers.training import model_parts

ARGS = "{per_device_train_batch_size: 4, lora_r: 4, lora_alpha: 8}"
ARMS = """
train: {args: {lora_r: 4, lora_alpha: 8, max_length: 65}}
arms:
  mdpo: {train: {preset: mdpo_paper}}
  free: {train: {args: {loss_type: [simpo]}}}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    torch.set_num_threads(1)
    return [make_tiny_llava(tmp_path_factory.mktemp("model"), seed=seed) for seed in (0, 1)]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder as select leaves it: 8 records, the last one as the first."""
    folder = tmp_path / "run"
    (folder / "select" / "images").mkdir(parents=True)
    for index, picture in enumerate(sample_pictures(6)):
        picture.save(folder / "select" / "images" / f"{index}.png")
    pairs = preference_records(7, pictures=[f"images/{index}.png" for index in range(6)])
    pairs.append({**pairs[0], "id": "again"})
    (folder / "select" / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    return folder


def reference(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    assert cli.main(["reference", *map(str, arguments)]) == 0
    summary: dict[str, Any] = parse_yaml(capsys.readouterr().out)["reference"]
    return summary


def fails(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert cli.main(["reference", *map(str, arguments)]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


def test_training_reads_what_the_command_computed(
    run: Path, models: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    flags = ["--run", run, "--model", models[0], "--device", "cpu", "--args", ARGS]
    first = reference(capsys, *flags)
    cache = run / "select" / "pairs.reference.jsonl"
    assert first["file"] == str(cache)
    assert {key: first[key] for key in ("records", "computed", "cached", "left_out")} == {
        "records": 8,
        "computed": 7,
        "cached": 1,
        "left_out": 0,
    }
    assert not (run / "train").exists() and not (run / "config.yaml").exists()
    before = cache.read_bytes()
    assert reference(capsys, *flags)["computed"] == 0 and cache.read_bytes() == before

    passes: list[int] = []
    hidden_states = model_parts.hidden_states

    def counted(*arguments: Any) -> Any:
        passes.append(1)
        return hidden_states(*arguments)

    monkeypatch.setattr(model_parts, "hidden_states", counted)
    assert cli.main(["train", *map(str, flags)]) == 0
    # One forward pass a micro-batch, the policy's, and two in which the adapter is looked at, off, before and after it is put in.
    assert len(passes) == 2 + 2
    assert cache.read_bytes() == before


def test_another_model_is_refused_until_refreshed(run: Path, models: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--run", run, "--device", "cpu", "--args", ARGS]
    reference(capsys, *flags, "--model", models[0])
    cache = run / "select" / "pairs.reference.jsonl"
    before = cache.read_bytes()
    error = fails(capsys, *flags, "--model", models[1])
    assert "weights: was" in error and "mmdpo reference --refresh" in error and cache.read_bytes() == before
    assert cli.main(["train", *map(str, flags), "--model", str(models[1])]) == 2
    assert "mmdpo reference --refresh" in capsys.readouterr().err
    assert reference(capsys, *flags, "--model", models[1], "--refresh")["computed"] == 7
    assert cache.read_bytes() != before


def test_arms_share_the_file_of_their_pairs(run: Path, models: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    config = run.parent / "mine.yaml"
    config.write_text(f"model: {models[0]}\nrun_dir: {run}\ndevice: cpu\n{ARMS}")
    main = reference(capsys, "--config", config)
    assert (main["records"], main["left_out"]) == (6, 2)
    # An arm has pairs of its own unless it is given some.
    assert "arms/mdpo/select/pairs.jsonl does not exist" in fails(capsys, "--config", config, "--arm", "mdpo")
    pairs = run / "select" / "pairs.jsonl"
    mdpo = reference(capsys, "--config", config, "--arm", "mdpo", "--input", pairs)
    # Triples are other records than pairs.
    assert mdpo["file"] == main["file"] and mdpo["computed"] == main["computed"]
    assert "simpo compares with a reference" in fails(capsys, "--config", config, "--arm", "free", "--input", pairs)


def test_mistakes_are_answered_in_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "give --run FOLDER, or --config" in fails(capsys)
    error = fails(capsys, "--run", tmp_path / "empty")
    assert "empty/select/pairs.jsonl does not exist: run the stages before train" in error
    assert not (tmp_path / "empty").exists()
    pairs = run / "select" / "pairs.jsonl"
    before = pairs.read_bytes()
    args = f"{{lora_r: 4, lora_alpha: 8, reference_cache: {pairs}}}"
    error = fails(capsys, "--run", run, "--args", args, "--refresh", "--device", "cpu")
    assert "is no cache of reference log-probabilities" in error and pairs.read_bytes() == before
