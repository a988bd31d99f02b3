"""The command line: help that teaches, one clear line for an error of the user's, settings that stay with the run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

import pytest
from PIL import Image

from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.shipped import CONFIGS, SHIPPED
from mmdpo_trainers.config.stages import STAGES
from mmdpo_trainers.config.values import parse_yaml
from mmdpo_trainers.errors import ConfigError
from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.methods import check_method
from mmdpo_trainers.run.preflight import check_train_args
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder

DEMO = CONFIGS / "shapes_mia_dpo.yaml"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    records = []
    for index in range(6):
        Image.new("RGB", (9, 9), (index * 40, 0, 0)).save(tmp_path / f"{index}.png")
        turns = [{"from": "human", "value": "<image>\nHow red?"}, {"from": "gpt", "value": str(index)}]
        records.append({"id": index, "image": f"{index}.png", "conversations": turns})
    (tmp_path / "data.json").write_text(json.dumps(records))
    return tmp_path / "data.json"


def fails(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    assert cli.main([str(argument) for argument in arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("mmdpo: error: ")
    return error


def augment(data: Path, run: Path, *more: Any) -> int:
    flags = ["--data", data, "--patch-grid", "[4, 4]", "--cell-size", 20, "--margin", 10]
    flags += ["--num-images", "{sequence: {2: 1}, grid: {2: 1}}"]
    return cli.main([str(part) for part in ["augment", "--run", run, *flags, *more]])


@pytest.mark.parametrize("command", ["run", *STAGES, "reference", "env"])
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main([command, "--help"])
    assert stopped.value.code == 0
    text = capsys.readouterr().out
    assert command == "env" or f"examples:\n  mmdpo {command} " in text


def test_flags_of_a_stage_are_its_fields(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["select", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--max-truth-chars VALUE records with a true answer this long" in text and "default: 512" in text


def test_a_stage_runs_and_its_settings_stay_with_the_run(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert augment(data, run, "--num-prompts", "7", "--formats", "{sequence: 1}", "--seed", "3") == 0
    assert parse_yaml(capsys.readouterr().out)["augment"]["prompts"] == {"sequence": 7}
    config = RunConfig.from_yaml(run / "config.yaml")
    assert (config.seed, config.data.source, config.augment.formats) == (3, str(data), {"sequence": 1.0})
    before = (run / "augment/prompts.jsonl").stat().st_mtime_ns
    assert cli.main(["augment", "--run", str(run)]) == 0
    assert (run / "augment/prompts.jsonl").stat().st_mtime_ns == before

    error = fails(capsys, "augment", "--run", run, "--num-prompts", "9")
    assert "augment.num_prompts: was 7, is 9" in error and "--restart augment" in error
    assert RunConfig.from_yaml(run / "config.yaml").augment.num_prompts == 7
    assert cli.main(["augment", "--run", str(run), "--num-prompts", "9", "--restart"]) == 0
    assert read_json(run / "augment/summary.json")["prompts"] == {"sequence": 9}


def test_text_flags_keep_their_text(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "2024"
    folder.mkdir()
    for file in tmp_path.glob("*.png"):
        file.rename(folder / file.name)
    monkeypatch.chdir(tmp_path)
    assert augment(data, tmp_path / "run", "--image-folder", "2024", "--num-prompts", "3") == 0


def test_errors_are_one_line_with_a_remedy(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    stage = ("augment", "--run", run, "--patch-grid", "[4, 4]")
    assert "none.json does not exist: give" in fails(capsys, *stage, "--data", tmp_path / "none.json")
    assert "--num-prompts must be an integer, got the text 'many'" in fails(capsys, *stage, "--num-prompts", "many")
    assert "command line: --num-prompts: expected 1 or more, got 0" in fails(capsys, *stage, "--num-prompts", "0")
    assert "--formats {a: not a valid value" in fails(capsys, *stage, "--formats", "{a")
    assert "must be one of paper, official_code, custom" in fails(capsys, "select", "--run", run, "--preset", "papr")
    assert "no arm 'x'" in fails(capsys, "select", "--run", run, "--arm", "x")
    assert "is a file" in fails(capsys, "augment", "--run", data)
    assert "does not exist; give a configuration file" in fails(capsys, "run", tmp_path / "none.yaml")
    assert "--set seed: expected KEY=VALUE" in fails(capsys, "run", DEMO, "--set", "seed")
    assert "unknown key 'score.layr'; did you mean 'score.layer'?" in fails(capsys, "run", DEMO, "--set", "score.layr=3")
    assert "--seed must be an integer" in fails(capsys, "run", DEMO, "--seed", "x")
    assert "command line: --seed: expected 0 or more and below" in fails(capsys, "run", DEMO, "--seed", "-1")
    assert "--formats.grid must be a number" in fails(capsys, *stage, "--formats", "{grid: x}")
    assert "no stage 'scor'" in fails(capsys, "run", DEMO, "--run-dir", run, "--restart", "scor")
    assert "no field 'learning_rat'; did you mean 'learning_rate'?" in fails(
        capsys, "run", DEMO, "--run-dir", run, "--set", "train.args.learning_rat=1e-4"
    )
    assert not (run / "augment").exists()
    (tmp_path / "empty").mkdir()
    assert "no usable record (missing: 6)" in fails(capsys, *stage, "--data", data, "--image-folder", tmp_path / "empty")
    assert augment(data, run, "--num-prompts", "3", "--image-folder", tmp_path) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("augment: {formts: {}}", "unknown key 'augment.formts'; did you mean 'augment.formats'?"),
        ("zzz: 1", "unknown key 'zzz'; valid keys: name, run_dir, model"),
        ("seed: one", "seed must be an integer, got the text 'one'"),
        ("seed: true", "seed must be an integer, got True (bool)"),
        ("model: !!binary aGk=", "model must be text, got b'hi' (bytes)"),
        ("seed: 3.0", "seed must be an integer, got 3.0 (float)"),
        ("data: {holdout: true}", "data.holdout must be a number, got True (bool)"),
        ("augment: {label: 'yes'}", "augment.label must be true or false, got the text 'yes'"),
        ("augment: {1: 2}", "unknown key 'augment.1'; valid keys: formats"),
        ("augment: {patch_grid: [1]}", "augment.patch_grid must be a list of 2 values (an integer, an integer), got [1] (list)"),
        ("augment: {pip_openings: [a, 2]}", "augment.pip_openings[1] must be text, got 2 (int)"),
        ("select: {max_length_ratio: x}", "select.max_length_ratio must be a number or one of preset or null, got the text 'x'"),
        ("select: {max_length_ratio: .inf}", "select.max_length_ratio: expected a finite number, got inf"),
        (
            "select: {preset: papr}",
            "select.preset must be one of paper, official_code, custom, got the text 'papr'; did you mean 'paper'",
        ),
        ("augment: [1]", "augment must be a mapping, got [1] (list)"),
        ("augment: {num_images: {grid: {two: 1}}}", "key of augment.num_images.grid must be an integer"),
        ("augment: {patch_grid: [1, 2, 3]}", "augment.patch_grid must be a list of 2 values (an integer, an integer)"),
        ("select: {rule: attn}", "select.rule must be one of attention, random_wrong, perplexity"),
        ("arms: {sft: {score: {layer: 2}}}", "arms.sft: 'score' cannot differ between arms"),
        ("arms: {sft: {train: {reply: 2}}}", "arms.sft: unknown key 'train.reply'; did you mean 'train.replay'?"),
        ("arms: {a/b: {}}", "arms: 'a/b' becomes a folder name"),
        ("seed: -1", "seed: expected 0 or more and below 4294967296, got -1"),
        ("threads: 0", "threads: expected 1 or more, got 0"),
        ("data: {holdout: 1}", "data.holdout: expected 0 or more and below 1, got 1.0"),
        ("generate: {batch_size: 0}", "generate.batch_size: expected 1 or more, got 0"),
        ("generate: {top_p: 1.5}", "generate.top_p: expected above 0 and at most 1, got 1.5"),
        ("generate: {temperature: .nan}", "generate.temperature: expected a finite number, got nan"),
        ("select: {min_perplexity: .inf}", "select.min_perplexity: expected a finite number, got inf"),
        ("select: {thresholds: {grid: {2: .nan}}}", "select.thresholds.grid.2: expected a finite number, got nan"),
        ("evaluate: {per_format: {grid: -1}}", "evaluate.per_format.grid: expected 0 or more, got -1"),
        ("train: {args: {learning_rate: .nan}}", "train.args.learning_rate: expected a finite number, got nan"),
        ("train: {args: {a: {b: [1, .inf]}}}", "train.args.a.b[1]: expected a finite number, got inf"),
        ("arms: {sft: {train: {args: {a: .nan}}}}", "arms.sft.train.args.a: expected a finite number, got nan"),
        ("arms: {sft: {train: {replay: -1}}}", "arms.sft: train.replay: expected 0 or more, got -1.0"),
        ("seed: 1\nseed: 2", "line 2, column 1: not valid YAML: key 'seed' is given twice"),
        ("a: [1", "line 1, column 6: not valid YAML"),
        ("- 1", "expected `key: value` lines at the top level, got list"),
    ],
)
def test_configuration_errors_name_file_key_and_remedy(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "my.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        check_method(RunConfig.from_yaml(path), str(path))
    assert str(caught.value).startswith(str(path)) and message in str(caught.value)


def test_yaml_numbers_as_people_write_them(tmp_path: Path) -> None:
    path = tmp_path / "my.yaml"
    path.write_text("train: {args: {learning_rate: 5e-5, run_name: 1e, weight_decay: 1E3}}\ndata: {holdout: 0}\n")
    config = RunConfig.from_yaml(path)
    assert config.train.args == {"learning_rate": 5e-5, "run_name": "1e", "weight_decay": 1000.0}
    assert config.data.holdout == 0.0 and RunConfig.from_dict(config.to_dict()) == config


def test_values_are_what_fingerprints_of_finished_runs_were_made_of() -> None:
    """1 and 1.0 are equal, and two fingerprints."""
    augment = {"formats": {"grid": 1}, "num_images": {"grid": {4: 1}}, "per_record": 2, "cell_size": 9, "patch_grid": [3, 4]}
    config = RunConfig.from_dict({"augment": augment, "select": {"max_length_ratio": 3}, "train": {"args": {"beta": 1}}})
    taken = {key: value for key, value in config.to_dict()["augment"].items() if key in augment}
    assert json.dumps(taken, sort_keys=True) == (
        '{"cell_size": 9, "formats": {"grid": 1.0}, "num_images": {"grid": {"4": 1.0}}, "patch_grid": [3, 4], "per_record": 2.0}'
    )
    assert repr((config.augment.patch_grid, config.augment.num_images)) == "((3, 4), {'grid': {4: 1.0}})"
    assert repr((config.select.max_length_ratio, config.train.args)) == "(3.0, {'beta': 1})"


@pytest.mark.parametrize("cls", [RunConfig, *filter(dataclasses.is_dataclass, get_type_hints(RunConfig).values())])
def test_plain_types_of_every_section_are_strict(cls: Any) -> None:
    """A plain int would take True, 3.0 and the text '3'."""

    def plain(hint: Any) -> bool:
        return hint in (bool, int, float, str) or (get_origin(hint) is not Annotated and any(map(plain, get_args(hint))))

    assert not [name for name, hint in get_type_hints(cls, include_extras=True).items() if plain(hint)]


def test_arms_are_laid_over_the_run() -> None:
    values = {
        "train": {"args": {"beta": 0.1, "seed": 1}},
        "arms": {"sft": {"train": {"args": {"beta": 0.2}}, "select": {"max_pairs": 3}}},
    }
    arm = RunConfig.from_dict(values).for_arm("sft")
    assert arm.train.args == {"beta": 0.2, "seed": 1} and arm.select.max_pairs == 3 and arm.arms == {}


def test_a_bare_no_is_a_strategy() -> None:
    config = RunConfig.from_dict({"train": {"args": {"save_strategy": False, "bf16": False}}})
    assert config.train.args == {"save_strategy": "no", "bf16": False}


def test_paths_are_made_absolute_and_names_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    sections: dict[str, Any] = {"data": {"source": "d.json"}, "model": "base", "arms": {"a": {"train": {"input": "p.jsonl"}}}}
    config = RunConfig.from_dict(sections).with_absolute_paths()
    assert (config.data.source, config.model) == (str(tmp_path / "d.json"), str(tmp_path / "base"))
    assert config.arms == {"a": {"train": {"input": str(tmp_path / "p.jsonl")}}} and config.evaluate.source is None
    named = RunConfig.from_dict({"model": "llava-hf/llava-1.5-7b-hf", "evaluate": {"source": "shapes"}}).with_absolute_paths()
    assert (named.data.source, named.evaluate.source, named.model) == ("shapes", "shapes", "llava-hf/llava-1.5-7b-hf")


def test_the_working_directory_does_not_matter_to_a_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert augment(Path("data.json"), tmp_path / "run", "--num-prompts", "3") == 0
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    assert cli.main(["augment", "--run", "../run"]) == 0
    assert "done before" in capsys.readouterr().err


def test_the_systems_errors_are_one_line_too(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Not a directory" in fails(capsys, "augment", "--run", data / "run")


def test_a_report_needs_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "holds no run to report on" in fails(capsys, "report", "--run", tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_a_flag_of_a_failed_stage_does_not_stay(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    assert augment(data, run, "--num-prompts", "3") == 0
    saved = (run / "config.yaml").read_text()
    write_scored(run / "score", ratio=0.9)
    assert "select left no pair" in fails(capsys, "select", "--run", run, "--max-pairs", "5")
    # dropped.jsonl was written, so these are the settings of the stage's files.
    assert RunConfig.from_yaml(run / "config.yaml").select.max_pairs == 5
    (run / "config.yaml").write_text(saved)
    (run / "score" / "scores.jsonl").write_text("")
    fails(capsys, "select", "--run", run, "--max-pairs", "6", "--restart")
    assert (run / "config.yaml").read_text() == saved


def write_scored(folder: Path, ratio: float) -> None:
    folder.mkdir()
    record = {"id": "a", "format": "sequence", "images": ["1.png", "2.png"], "prompt": "<image><image>?", "answer": "x"}
    record |= {"target": 0, "num_images": 2, "response": "y", "ratio": ratio, "perplexity": 2.0}
    (folder / "scores.jsonl").write_text(json.dumps(record) + "\n")


def test_ones_own_evaluation_lies_beside_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Evaluate:
        @staticmethod
        def inputs(context: StageContext) -> list[Path]:
            return []

        @staticmethod
        def run(context: StageContext) -> dict[str, Any]:
            (context.folder / "answers.jsonl").write_text(f"{context.config.evaluate.input}\n")
            return {}

    monkeypatch.setattr("mmdpo_trainers.run.pipeline.stage_module", lambda stage: Evaluate)
    run, own = tmp_path / "run", tmp_path / "mine.jsonl"
    own.write_text("{}\n")
    command = ["evaluate", "--run", str(run), "--moment", "before"]
    assert cli.main([*command, "--input", str(own)]) == 0
    assert not (run / "config.yaml").exists() and not (run / "evaluate/before").exists()
    assert cli.main(command) == 0
    assert cli.main([*command, "--input", str(own), "--restart"]) == 0
    assert (run / "evaluate/own/mine-before/answers.jsonl").read_text() == f"{own}\n"
    assert (run / "evaluate/before/answers.jsonl").read_text() == "None\n"
    assert RunConfig.from_yaml(run / "config.yaml").evaluate.input is None
    assert RunFolder(run).holds_output("evaluate") and RunFolder(run).fingerprint_of("evaluate") is None


@pytest.mark.parametrize("path", sorted(DEMO.parent.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_configurations_are_valid(path: Path, tmp_path: Path) -> None:
    config = RunConfig.from_yaml(path)
    assert config.name == path.stem
    assert (config.model in SHIPPED) == path.stem.startswith("shapes_")
    for arm in (None, *config.arms):
        check_train_args(StageContext(run=RunFolder(tmp_path), config=config.for_arm(arm), stage="train", arm=arm))


def test_env_prints_versions_devices_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["env"]) == 0
    text = capsys.readouterr().out
    assert all(word in text for word in ("torch", "transformers", "cpu", "attention_mass", "reference", "yes"))
