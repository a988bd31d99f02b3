"""A method is one declaration: a third one, in a file of its own, runs, and no room above `methods/` names one."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml
from rooms import PACKAGES

from mmdpo_trainers import methods
from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.shipped import SHIPPED
from mmdpo_trainers.config.stages import STAGES
from mmdpo_trainers.data.pair_records import BRANCHES
from mmdpo_trainers.errors import ConfigError
from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.methods import METHODS, check_method, method_named, preset_args
from mmdpo_trainers.run.preflight import check_declaration

THIRD = '''
"""IPO on pairs that exist, judged by held-out pairs alone."""

from mmdpo_trainers.methods import Method
from mmdpo_trainers.methods.held_out import held_out_summary

METHOD = Method(
    name="ipo_run",
    title="IPO",
    about="pairs that exist, by the loss of arXiv 2310.12036",
    stages=("pairs", "train", "evaluate", "report"),
    presets={"ipo_small": {"loss_type": ["ipo"], "beta": 0.2, "learning_rate": 2e-3, "lora_r": 4, "lora_alpha": 8}},
    evaluation_prompts="pairs",
    measures=("held_out",),
    summary=lambda folder, arms: {"made_up": True, **held_out_summary(folder, arms, main="ipo_run")},
    tables=("held_out",),
    page=("main_training", "comparison", "pairs"),
    arm_names={"weak": "IPO, small beta"},
    baseline="weak",
)
'''
RUN = {
    "name": "third",
    "model": "shapes_prior",
    "threads": 1,
    "pairs": {"pictures": 8, "held_out": 0.5, "questions": {"disagree": 2, "agree": 2}},
    "train": {"args": {"per_device_train_batch_size": 4, "logging_steps": 1}},
    "evaluate": {"batch_size": 4},
    "arms": {"weak": {"train": {"args": {"beta": 0.01}}}},
}


@pytest.fixture
def third(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A configuration of the made-up method, whose declaration lies beside it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ipo_run.py").write_text(THIRD)
    (tmp_path / "third.yaml").write_text(yaml.safe_dump({**RUN, "method": "ipo_run.py"}))
    return tmp_path


def test_a_third_method_in_one_file(third: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "third.yaml", "--run-dir", "run"]) == 0
    run, shown = third / "run", capsys.readouterr().out
    summary, log = read_json(run / "summary.json"), list(read_jsonl(run / "train" / "log.jsonl"))
    assert summary["made_up"] and list(summary["arms"]) == ["ipo_run", "weak"]
    assert read_json(run / "train" / "summary.json")["loss_type"] == ["ipo"] and log[0]["loss"] == pytest.approx(6.25, rel=1e-5)
    assert summary["arms"]["ipo_run"]["held_out"]["all"]["pairs"] == 4 and not (run / "evaluate/before/answers.jsonl").exists()
    page = (run / "report.html").read_text()
    places = [page.index(f'id="{name}"') for name in ("training", "arms", "pairs")]
    assert places == sorted(places) and 'id="accuracy"' not in page
    assert "nats after IPO" in page and "IPO, small beta" in page and "log-probability gaps" in shown
    # Everything is done; a changed declaration is noticed.
    assert cli.main(["run", "third.yaml", "--run-dir", "run"]) == 0
    assert capsys.readouterr().err.count("done before") == 7
    methods._of_file.cache_clear()
    (third / "ipo_run.py").write_text(THIRD.replace('"beta": 0.2', '"beta": 0.3'))
    assert cli.main(["run", "third.yaml", "--run-dir", "run"]) == 2
    assert "method: was" in capsys.readouterr().err


def test_a_stage_command_of_the_third_method(third: Path) -> None:
    assert cli.main(["pairs", "--run", "run", "--config", "third.yaml"]) == 0
    assert (third / "run" / "pairs" / "held_out.jsonl").is_file()
    # What is saved holds from anywhere.
    assert yaml.safe_load((third / "run" / "config.yaml").read_text())["method"] == str(third / "ipo_run.py")


def test_a_file_of_the_folder_is_a_method(third: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(third)])
    found = methods._found()
    # The default comes first.
    assert list(found) == ["mia_dpo", *sorted({"ipo_run", *METHODS} - {"mia_dpo"})]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"method": "mdpoo"},
            "method must be one of mia_dpo, .*mdpo.*, or a .py file .*, got the text 'mdpoo'; did you mean 'mdpo'?",
        ),
        ({"method": "none.py"}, "none.py does not exist; expected one of mia_dpo, .*mdpo.*, or a .py file"),
        ({"method": "empty.py"}, "empty.py declares none: expected METHOD"),
        ({"method": "broken.py"}, r"broken.py cannot be imported \(ZeroDivisionError"),
        (
            {"train": {"preset": "mdpo_papr"}},
            "train.preset must be one of mia_dpo_paper, mdpo_paper, .* did you mean 'mdpo_paper'?",
        ),
        ({"arms": {"mia_dpo": {}}}, "'mia_dpo' is the name of the main arm"),
        ({"arms": {"a": {"evaluate": {}}}}, r"arms.a: 'evaluate' cannot differ between arms; an arm overrides select and train"),
        ({"arms": {"a": {"train": {"preset": "x"}}}}, "train.preset must be one of"),
    ],
)
def test_methods_that_there_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, object], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("empty.py").write_text("")
    Path("broken.py").write_text("1 / 0")
    with pytest.raises(ConfigError, match=f"^my.yaml: .*{message}"):
        check_method(RunConfig.from_dict(values, where="my.yaml"), "my.yaml")


@pytest.mark.parametrize(
    ("text", "other", "message"),
    [
        ('measures=("held_out",)', 'measures=("gaps",)', "measures: expected some of answers, held_out, got gaps"),
        ('tables=("held_out",)', 'tables=("gaps",)', "tables: expected some of accuracy, .* got gaps"),
        ('"comparison", "pairs")', '"comparisons", "pairs")', "page: expected some of accuracy, .* got comparisons"),
        ('("pairs", "train"', '("pears", "train"', "stages: expected some of augment, .* got pears"),
        ('("pairs", "train"', '("train"', "stages: expected one that makes pairs, then train"),
        ('"evaluate", "report")', '"report", "evaluate")', "stages: expected one that makes pairs, .* in the order of augment"),
    ],
)
def test_a_declaration_of_what_there_is_not(
    third: Path, capsys: pytest.CaptureFixture[str], text: str, other: str, message: str
) -> None:
    methods._of_file.cache_clear()
    assert text in THIRD
    (third / "ipo_run.py").write_text(THIRD.replace(text, other))
    assert cli.main(["run", "third.yaml", "--run-dir", "run"]) == 2
    assert re.search(f"method ipo_run: {message}", capsys.readouterr().err) and not (third / "run").exists()


@pytest.mark.parametrize("name", METHODS)
def test_declarations_name_what_there_is(name: str) -> None:
    method = method_named(name)
    check_declaration(method)
    assert all(STAGES[section].arm for section in method.arm_sections) and method.pairs_stage in method.stages
    assert preset_args(RunConfig(method=name))["loss_type"] == method.presets[method.default_preset]["loss_type"]


def test_no_other_room_names_a_method() -> None:
    """But for the default of `method:`, the shipped models' data, and names of branches that a record has."""
    names, found = set(METHODS), []
    for path in sorted(PACKAGES["mmdpo_trainers"].rglob("*.py")):
        room = path.relative_to(PACKAGES["mmdpo_trainers"]).parts[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and node.value in names and room != "methods":
                found.append(f"{path.name}:{node.lineno}")
    assert [each.partition(":")[0] for each in found] == ["run_config.py"]
    assert not names & {*STAGES, *BRANCHES, *SHIPPED}
