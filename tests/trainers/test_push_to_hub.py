"""push_to_hub: in a run it uploads an export at the end; in a script it is transformers' own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import transformers.trainer
import yaml
from exported_run import make_run
from hub_double import Hub
from training_cases import config, preference_records, tiny

from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.errors import ConfigError
from mmdpo_trainers.processes.progress import Progress
from mmdpo_trainers.run import upload
from mmdpo_trainers.run.pipeline import stage_fingerprint
from mmdpo_trainers.run.preflight import check_train_args
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder
from mmdpo_trainers.stages.train import preference_config
from mmdpo_trainers.training.trainer import PreferenceTrainer

ARGS = {"push_to_hub": True, "hub_model_id": "me/tiny", "hub_private_repo": True, "hub_revision": "first"}


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    return Hub.put_in(monkeypatch)


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_run(tmp_path_factory.mktemp("runs") / "tiny", base)
    values = yaml.safe_load((folder / "config.yaml").read_text())
    values["train"]["args"] |= ARGS
    (folder / "config.yaml").write_text(yaml.safe_dump(values))
    return folder


def test_a_run_uploads_the_export_of_its_main_arm_once(run: Path, stub: type[Hub]) -> None:
    """With the card and its figures, and nothing of the run folder beside; another id is another upload."""
    folder, settings = RunFolder(run), RunConfig.from_yaml(run / "config.yaml")
    assert upload.push(folder, settings, Progress()) == "https://example.org/me/tiny"
    assert stub.asked[0] == ("create_repo", ("me/tiny", {"private": True, "exist_ok": True}))
    assert stub.asked[1] == ("create_branch", ("me/tiny", "first"))
    name, (id, files) = stub.asked[2]
    assert (name, id) == ("upload_folder", "me/tiny") and len(stub.asked) == 3
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "mmdpo_run.yaml"} <= set(files)
    assert not {"training_args.bin", "log.jsonl", "state.json", "config.json"} & set(files)
    assert "0.750 (0.650 to 0.850)" in (run / "hub" / "README.md").read_text()
    assert upload.push(folder, settings, Progress()) == "https://example.org/me/tiny" and len(stub.asked) == 3
    settings.train.args["hub_model_id"] = "me/other"
    assert upload.push(folder, settings, Progress()) == "https://example.org/me/other" and len(stub.asked) == 6
    assert json.loads((run / "hub.json").read_text())["id"] == "me/other"
    settings.train.args["push_to_hub"] = False
    assert upload.push(folder, settings, Progress()) is None and len(stub.asked) == 6


def test_the_trainer_of_a_run_uploads_nothing(run: Path) -> None:
    """It has the values all the same, checked by transformers; where they go does not change what was trained."""
    settings = RunConfig.from_yaml(run / "config.yaml")
    context = StageContext(run=RunFolder(run), config=settings, stage="train")
    made = preference_config(context, range(3), evaluate=False)
    assert made.push_to_hub is False and made.hub_model_id == "me/tiny"
    del settings.train.args["reference_cache"]
    other = dataclasses.replace(settings.train, args={"beta": 0.2})
    without = dataclasses.replace(context, config=dataclasses.replace(settings, train=other))
    assert stage_fingerprint(context, []).digest == stage_fingerprint(without, []).digest


@pytest.mark.parametrize(
    ("args", "arm", "message"),
    [
        ({"hub_model_id": None}, {}, "train.args.hub_model_id: expected the id to upload to, such as me/my-model, got None"),
        ({"hub_strategy": "every_save"}, {}, "train.args.hub_strategy: expected end"),
        ({}, {"hub_model_id": "me/arm"}, "arms.other.train.args.hub_model_id: only the main arm is uploaded"),
        ({"hub_token": "hf_secret"}, {}, "train.args.hub_token: it would be kept in the run's files; the token is taken from"),
    ],
)
def test_what_a_run_cannot_upload(run: Path, stub: type[Hub], args: dict[str, Any], arm: dict[str, Any], message: str) -> None:
    values = {"train": {"args": {**ARGS, **args}}, "arms": {"other": {"train": {"args": arm}}} if arm else {}}
    context = StageContext(run=RunFolder(run), config=RunConfig.from_dict(values), stage="train")
    with pytest.raises(ConfigError, match=message) as error:
        check_train_args(context)
        upload.check([context], context.config)
    assert "hf_secret" not in str(error.value) and not stub.asked


def test_a_run_without_the_hub_does_not_begin(run: Path, stub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stub, "refused", ConnectionError("no route to host"))
    settings = RunConfig.from_yaml(run / "config.yaml")
    context = StageContext(run=RunFolder(run), config=settings, stage="train")
    with pytest.raises(ConfigError, match="train.args.push_to_hub to me/tiny: the Hub cannot be reached .no route to host"):
        upload.check([context], settings)
    # Stages before training need none.
    upload.check([dataclasses.replace(context, stage="select")], settings)
    assert [name for name, _ in stub.asked] == ["whoami"]


@pytest.mark.skipif(not hasattr(transformers.trainer, "hf_api"), reason="another entry to the Hub in this transformers")
def test_the_trainer_in_a_script_uploads_as_transformers_does(
    tmp_path: Path, stub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    loaded = tiny(tmp_path / "model")
    settings = config(tmp_path / "out", push_to_hub=True, hub_model_id="me/tiny", hub_strategy="end")
    trainer = PreferenceTrainer(loaded.model, settings, processing_class=loaded.processor, train_dataset=preference_records(4))
    trainer.train()
    trainer.push_to_hub()
    assert [name for name, _ in stub.asked] == ["create_repo", "upload_folder"]
    assert {"adapter_model.safetensors", "adapter_config.json", "README.md"} <= set(stub.asked[-1][1][1])
