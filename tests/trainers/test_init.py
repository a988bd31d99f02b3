"""`mmdpo init`: a first configuration with comments, for every method and for what a model's family needs; and copies of what is shipped."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_configs import write_conversations, write_pairs
from tiny_models import make_tiny_llava, make_tiny_qwen

from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.shipped import CONFIGS, shipped_configs
from mmdpo_trainers.config.values import FILL_IN
from mmdpo_trainers.errors import ConfigError
from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.methods import METHODS, check_method, presets

JUDGED = ("online_dpo", "rated")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("llava"))


def init(*words: Any) -> None:
    assert cli.main(["init", *map(str, words)]) == 0


def fails(capsys: pytest.CaptureFixture[str], *words: Any) -> str:
    assert cli.main([str(word) for word in words]) == 2
    return capsys.readouterr().err.strip().splitlines()[-1]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_begun_and_passes_the_checks_before_a_run(
    method: str, here: Path, llava: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Checked(Exception):  # noqa: N818 - the checks are done
        pass

    def stop(*args: object, **kwargs: object) -> None:
        raise Checked

    on_answers = METHODS[method].stages[0] == "augment"
    data = write_conversations(here) if on_answers else write_pairs(here)
    if method == "sym_mpo":
        lines = [json.loads(line) for line in data.read_text().splitlines()]
        other = {"similar_images": ["1.png"], "similar_chosen": "green"}
        data.write_text("".join(json.dumps({**line, **other}) + "\n" for line in lines))
    init(method, "--model", llava, "--data", data, "--output", "mine.yaml")
    text = Path("mine.yaml").read_text()
    if method in JUDGED:
        assert text.count(f": {FILL_IN}") == 2
        Path("mine.yaml").write_text(text.replace(f"url: {FILL_IN}", "url: http://localhost:1/v1").replace(FILL_IN, "judge"))
    config = check_method(RunConfig.from_yaml("mine.yaml"))
    paper = presets(METHODS[method])[str(config.train.preset)]
    spelled = {name: as_yaml(value) for name, value in paper.items() if value is not None and name != "online"}
    assert {name: config.train.args[name] for name in spelled} == spelled
    monkeypatch.setattr("mmdpo_trainers.run.pipeline.run_stage", stop)
    with pytest.raises(Checked):
        cli.main(["run", "mine.yaml"])


def as_yaml(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def test_comments_are_the_settings_own_words(here: Path, llava: Path) -> None:
    init("mia_dpo", "--model", llava)
    text = Path("mia_dpo.yaml").read_text()
    said = " ".join(text.replace("#", " ").split())
    values = yaml.safe_load(text)
    for section, given in values.items():
        if isinstance(given, dict):
            fields = {field.name: field for field in dataclasses.fields(type(getattr(RunConfig(), section)))}
            for name in given:
                about, when = fields[name].metadata["description"], fields[name].metadata["when"]
                assert " ".join(about.split()) in said and (not when or f"When to change it: {' '.join(when.split())}" in said), (
                    name
                )
    assert f"source: {FILL_IN}" in text and "To be filled in before: data.source." in said
    assert max(map(len, text.splitlines())) <= 112 or "num_images" in max(text.splitlines(), key=len)


def test_a_family_s_needs_are_in_it(here: Path, llava: Path, tmp_path: Path) -> None:
    qwen = make_tiny_qwen(tmp_path / "qwen")
    for name, model in (("llava", llava), ("qwen", qwen)):
        init("mia_dpo", "--model", model, "--output", f"{name}.yaml")
    text = {name: " ".join(Path(f"{name}.yaml").read_text().replace("#", " ").split()) for name in ("llava", "qwen")}
    values = {name: yaml.safe_load(Path(f"{name}.yaml").read_text()) for name in text}
    layers = read_json(llava / "config.json")["text_config"]["num_hidden_layers"]
    assert values["llava"]["score"]["layer"] == layers // 2 and f"This model: 0 to {layers - 1};" in text["llava"]
    assert (values["llava"]["score"]["statistic"], values["llava"]["augment"]["square"]) == ("mass", True)
    assert (values["qwen"]["score"]["statistic"], values["qwen"]["augment"]["square"]) == ("mean", False)
    assert "Family llava;" in text["llava"] and r"'USER: <image>\nWhat is this? ASSISTANT:'" in text["llava"]
    assert "<|vision_start|>" in text["qwen"] and "q_proj" in text["qwen"]
    assert values["llava"]["model"] == str(llava), "whole, so that it holds from any folder"


def test_a_model_without_chat_template_is_said_to_have_none(here: Path) -> None:
    init("mdpo", "--model", make_tiny_llava(here / "plain", chat_template=False))
    assert "It has no chat template; a question becomes: 'USER: <image>" in Path("mdpo.yaml").read_text()


def test_what_it_wrote_runs_at_once(here: Path, llava: Path) -> None:
    init("mdpo", "--model", llava, "--data", write_pairs(here))
    assert cli.main(["run", "mdpo.yaml", "--set", "train.args.max_steps=1", "--until", "train"]) == 0
    assert (here / "runs/mdpo/train/final/adapter_config.json").is_file()


def test_what_is_not_filled_in_is_named(here: Path, llava: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init("mdpo", "--model", llava)
    assert f"mdpo.yaml; fill in what says {FILL_IN}, then: mmdpo run mdpo.yaml" in capsys.readouterr().out
    assert f"mdpo.yaml: pairs.source: expected a value of yours in place of {FILL_IN}" in fails(capsys, "run", "mdpo.yaml")


def test_what_cannot_be_is_refused_before_anything_is_written(
    here: Path, llava: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    init("mdpo", "--model", "shapes_prior", "--data", "shapes_prior", "--output", "mine.yaml")
    before = Path("mine.yaml").read_text()
    again = fails(capsys, "init", "mdpo", "--model", "shapes_prior", "--output", "mine.yaml")
    assert "mine.yaml exists already, and is not overwritten; give another --output" in again
    assert Path("mine.yaml").read_text() == before
    assert "give --model: a folder, an id on the hub" in fails(capsys, "init", "mdpo")
    assert "init: give a method, mia_dpo" in fails(capsys, "init")
    assert "no method or shipped file 'mpdo'; there are mpo, mdpo, sym_mpo" in fails(capsys, "init", "mpdo", "--model", llava)
    assert "--data: none.jsonl does not exist" in fails(capsys, "init", "mdpo", "--model", llava, "--data", "none.jsonl")
    assert "--image-folder: mdpo reads preference pairs" in fails(
        capsys, "init", "mdpo", "--model", llava, "--image-folder", here
    )
    assert "no such folder here" in fails(capsys, "init", "mdpo", "--model", "none")
    assert "--model: slurm is copied as it is" in fails(capsys, "init", "slurm", "--model", llava)
    assert sorted(path.name for path in here.iterdir()) == ["mine.yaml"]


def test_what_is_shipped_is_listed_and_copied(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init("--list")
    listed = capsys.readouterr().out
    assert all(f"\n  {name} " in listed for name in (*METHODS, *shipped_configs(), "accelerate", "slurm"))
    init("llava_mdpo")
    init("accelerate")
    init("slurm")
    assert Path("llava_mdpo.yaml").read_bytes() == shipped_configs()["llava_mdpo"].read_bytes()
    for name in ("accelerate", "slurm"):
        assert sorted(path.name for path in Path(name).iterdir()) == sorted(path.name for path in (CONFIGS / name).iterdir())
    # The paths in them count from here.
    zero3 = yaml.safe_load(Path("accelerate/zero3.yaml").read_text())
    assert Path(zero3["deepspeed_config"]["deepspeed_config_file"]).is_file()
    assert "accelerate exists already" in fails(capsys, "init", "accelerate")


def test_a_shipped_configuration_goes_by_its_name(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert RunConfig.from_yaml("shapes_mdpo").name == "shapes_mdpo"
    with pytest.raises(ConfigError, match="shape_mdpo does not exist; .*: shapes_mdpo, shapes_"):
        RunConfig.from_yaml("shape_mdpo")
    assert "the name of a shipped one: shapes_mia_dpo," in fails(capsys, "run", "configs/shapes_mia_dpo.yaml")
    Path("shapes_mdpo").mkdir()
    assert RunConfig.from_yaml("shapes_mdpo").name == "shapes_mdpo", "a folder is no configuration"
    Path("shapes_mdpo.yaml").write_text("name: own")
    assert RunConfig.from_yaml("shapes_mdpo.yaml").name == "own"
