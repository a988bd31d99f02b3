"""MPO and SymMPO from the built-in world to the page, each beside DPO on the same pairs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.methods import METHODS, preset_args
from mmdpo_trainers.run.pipeline import run_stage
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder

SMALL: dict[str, Any] = {
    "model": "shapes_prior",
    "threads": 1,
    "pairs": {"pictures": 8, "held_out": 0.5, "questions": {"disagree": 2, "agree": 2}},
    "train": {
        "args": {
            "per_device_train_batch_size": 4,
            "logging_steps": 1,
            "num_train_epochs": 2,
            "full_finetune": False,
            "lora_r": 4,
            "lora_alpha": 8,
            "learning_rate": 1e-3,
        }
    },
    "evaluate": {"batch_size": 4},
    "arms": {"dpo": {"train": {"args": {"loss_type": ["sigmoid"]}}}},
}


@pytest.mark.parametrize("method", ["mpo", "sym_mpo"])
def test_a_run_to_the_page(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(yaml.safe_dump({**SMALL, "name": "small", "method": method}))
    assert cli.main(["run", "small.yaml", "--run-dir", "run"]) == 0
    run = tmp_path / "run"
    assert list(read_json(run / "summary.json")["arms"]) == [method, "dpo"]
    log = [entry for entry in read_jsonl(run / "train" / "log.jsonl") if "loss" in entry]
    dpo = [entry for entry in read_jsonl(run / "arms" / "dpo" / "train" / "log.jsonl") if "loss" in entry]
    # Before the first step policy and reference are one model.
    assert dpo[0]["loss"] == pytest.approx(0.6931, abs=1e-3)
    if method == "mpo":
        assert log[0]["bco_shift"] == 0 and log[1]["bco_shift"] != 0 and "bco_shift" not in dpo[0]
        # 0.8 log 2 + 0.2 * 2 log 2, and the likelihood.
        assert log[0]["loss"] > 1.2 * 0.6931
    else:
        # log 2 four times, with the symmetric term's two at a half each; both margins are alike.
        assert log[0]["loss"] == pytest.approx(4 * 0.6931, abs=1e-2)
        assert {"rewards/exchanged", "rewards/similar_chosen", "rewards/similar_rejected"} <= log[0].keys()
        assert "rewards/exchanged" not in dpo[0]
    assert METHODS[method].title in (run / "report.html").read_text()


def test_similar_pictures_are_made_where_a_branch_shows_them(tmp_path: Path) -> None:
    columns = {}
    for method in ("sym_mpo", "mdpo"):
        config = RunConfig.from_dict({"method": method, **{name: SMALL[name] for name in ("model", "pairs")}})
        run = RunFolder(tmp_path / method)
        run_stage(StageContext(run=run, config=config, stage="pairs"))
        for side in ("pairs", "held_out"):
            records = list(read_jsonl(run.path / "pairs" / f"{side}.jsonl"))
            columns[method] = [{name: record.get(name) for name in ("images", "similar_images", "chosen")} for record in records]
            for record in records if method == "sym_mpo" else ():
                assert (run.path / "pairs" / record["similar_images"][0]).is_file()
                assert record["similar_chosen"] != record["chosen"]
    # The pairs themselves are those of a run without.
    assert [{**each, "similar_images": None} for each in columns["sym_mpo"]] == columns["mdpo"]


def test_presets_are_the_papers_and_the_released_codes() -> None:
    paper, released = (
        preset_args(RunConfig.from_dict({"method": "mpo", "train": {"preset": name}})) for name in METHODS["mpo"].presets
    )
    assert paper["loss_weights"] == released["loss_weights"] == [0.8, 0.2, 1.0]
    assert (paper["bco_shift"], released["bco_shift"]) == ("previous", "present")
    paper, released = (
        preset_args(RunConfig.from_dict({"method": "sym_mpo", "train": {"preset": name}})) for name in METHODS["sym_mpo"].presets
    )
    # In units of reward and of log-ratios.
    assert paper["loss_weights"][-1] == pytest.approx(released["loss_weights"][-1] * paper["beta"] ** 2)
