"""Published benchmarks in an evaluation: figures by hand-made truth, a model beside its adapter, a killed run, a run's summary and page."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from published_files import hub_picture, write_lines, write_parquet
from rich.console import Console
from tiny_models import sample_pictures

from mmdpo_trainers.answers.transformers_engine import generate_responses
from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.methods import METHODS
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.report.benchmarks import benchmark_summary, changes_of, figures_of
from mmdpo_trainers.report.comparison import PageInputs
from mmdpo_trainers.report.contents import RunContents
from mmdpo_trainers.report.intervals import Proportion
from mmdpo_trainers.report.page import render
from mmdpo_trainers.report.sections.benchmarks import benchmarks
from mmdpo_trainers.run.pipeline import run_pipeline
from mmdpo_trainers.run.tables import benchmark_tables
from mmdpo_trainers.stages.benchmarks import described
from mmdpo_trainers.suites import suite_named

TOKENS = 4


def marked(name: str, rows: list[tuple[dict[str, Any], str]]) -> list[dict[str, Any]]:
    """Answers as the stage writes them: of records with what marking needs, and responses."""
    mark = suite_named(name).mark
    assert mark is not None
    found = []
    for number, (record, response) in enumerate(rows):
        said, marks = mark(record, response)
        found.append({"id": str(number), "unit": str(number), "groups": {}, **record, "said": said, "marks": marks})
    return found


def test_figures_of_pope() -> None:
    """Three right of five: 2 of 3 yeses are so, 2 of 3 true ones are found; an unread answer is wrong, and no yes."""
    said = [("yes", "Yes."), ("yes", "yes it is"), ("yes", "perhaps"), ("no", "Yes"), ("no", "no")]
    splits = ["random", "popular", "popular", "random", "random"]
    answers = marked(
        "pope", [({"answer": truth, "groups": {"split": [s]}}, r) for (truth, r), s in zip(said, splits, strict=True)]
    )
    found = figures_of(answers, described(suite_named("pope")))
    values = {name: figure["value"] for name, figure in found["figures"].items()}
    assert values == pytest.approx({"accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3, "yes_rate": 3 / 5})
    precision = Proportion(2, 3)
    assert found["figures"]["precision"]["interval"] == [precision.low, precision.high]
    low, high = found["figures"]["f1"]["interval"]
    assert 0 <= low < 2 / 3 < high <= 1
    assert found["unread"] == 1 and found["by"]["split"]["popular"]["recall"]["value"] == 1 / 2
    assert found["by"]["split"]["random"]["precision"]["value"] == 1 / 2
    silent = figures_of(marked("pope", [({"answer": "no"}, "no")]), described(suite_named("pope")))["figures"]
    assert silent["precision"]["value"] is None and silent["accuracy"]["value"] == 1
    worse = marked("pope", [({"answer": truth}, "no") for truth, _ in said])
    change = changes_of(answers, worse, described(suite_named("pope")))["figures"]
    assert change["accuracy"]["value"] == pytest.approx(-1 / 5) and change["precision"] is None
    assert change["f1"]["value"] == pytest.approx(-2 / 3) and change["f1"]["interval"][0] < -2 / 3 < change["f1"]["interval"][1]


def test_a_circular_question_is_right_where_all_its_orders_are() -> None:
    record = {"choices": {"A": "one", "B": "two"}, "circular": True, "unit": "7"}
    turned = {"choices": {"A": "two", "B": "one"}, "circular": True, "unit": "7"}
    alone = {"choices": {"A": "one", "B": "two"}, "circular": True, "unit": "8", "answer": "A"}
    rows = [({**record, "answer": "A"}, "A"), ({**turned, "answer": "B"}, "A"), (alone, "one")]
    figures = figures_of(marked("mmbench", rows), described(suite_named("mmbench")))["figures"]
    assert (figures["accuracy"]["value"], figures["accuracy"]["count"]) == (1 / 2, 2)
    assert (figures["each"]["value"], figures["each"]["count"]) == (pytest.approx(2 / 3), 3)


def test_the_mean_over_categories() -> None:
    choices = {"A": "one", "B": "two"}
    rows = [({"choices": choices, "answer": "A", "circular": False, "groups": {"category": [c]}}, "A") for c in "xxx"]
    rows.append(({"choices": choices, "answer": "B", "circular": False, "groups": {"category": ["y"]}}, "A"))
    figures = figures_of(marked("blink", rows), described(suite_named("blink")))["figures"]
    assert figures["accuracy"]["value"] == 3 / 4 and figures["mean_of_category"]["value"] == 1 / 2 and "each" not in figures


def test_benchmarks_on_the_page_and_the_console(tmp_path: Path) -> None:
    """Before, after and an arm: figures by group, changes, the table of the paper; a run without benchmarks has no such section."""
    method = METHODS["mia_dpo"]

    def section() -> dict[str, Any] | None:
        return benchmarks(PageInputs(run=RunContents(folder=tmp_path), method=method, title="", config={}))

    assert section() is None
    choices, folders = {"A": "one", "B": "two"}, ("evaluate/before", "evaluate/after", "arms/sft/evaluate/after")
    for number, folder in enumerate(folders):
        (tmp_path / folder).mkdir(parents=True)
        rows = [
            (
                {"choices": choices, "answer": "A", "circular": False, "groups": {"category": ["xy"[place % 2]]}},
                "AB"[place > number],
            )
            for place in range(4)
        ]
        answers = [{**each, "attention": [0.3, 0.1]} for each in marked("blink", rows)]
        write_lines(tmp_path / folder / "benchmark-blink.jsonl", answers)
        listed = {
            "blink": {**described(suite_named("blink")), "records": 4, "lost": {"records": 1, "of": 5, "reasons": {"missing": 1}}}
        }
        (tmp_path / folder / "benchmarks.json").write_text(json.dumps(listed))
    found = section()
    assert found is not None and found["plot"].startswith("<svg")
    (table,), (published,) = found["tables"], found["published"]
    assert table.head == ["Figure", "Questions", "Before", "After", "sft", "Change, After", "Change, sft"]
    assert [cell if isinstance(cell, str) else cell.value for cell in table.rows[0]] == [
        *("Accuracy", "4", "25.0", "50.0", "75.0"),
        *("+25.0", "+50.0"),
    ]
    assert "1 of 5 rows could not be asked" in table.caption and [row[0] for row in table.rows[2:]] == [
        "category x",
        "category y",
    ]
    assert published.rows[1][published.head.index("BLINK")] == "50.00" and "After 0.750" in found["notes"][-1]
    summary = benchmark_summary({"before": tmp_path / folders[0], "after": tmp_path / folders[1]})
    console = Console(width=100, record=True, file=io.StringIO())
    for each in benchmark_tables(summary):
        console.print(each)
    assert "0.250" in (text := console.export_text()) and "+0.250" in text and "50.00" in text
    page = render(PageInputs(run=RunContents(folder=tmp_path), method=method, title="", config={}))
    assert page.index('id="accuracy"') < page.index('id="benchmarks"') < page.index('id="time"')


@pytest.fixture(scope="module")
def published(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """BLINK with two pictures a question, of which the base answers the first four right: among the options is what it says; and POPE."""
    folder = tmp_path_factory.mktemp("published")
    pictures = sample_pictures(6)
    prompts = [f"what colour ? {number}" for number in range(6)]
    for number, picture in enumerate(pictures):
        picture.save(folder / f"{number}.png")
    records = [
        {
            "id": str(number),
            "format": "sequence",
            "images": [str(folder / f"{number}.png"), str(folder / f"{5 - number}.png")],
            "prompt": f"<image>\n<image>\n{prompt}",
            "num_images": 2,
            "target": 0,
        }
        for number, prompt in enumerate(prompts)
    ]
    rows = []
    for number, record in enumerate(records):
        (said,) = generate_responses(load_model(base, device="cpu"), [record], max_new_tokens=TOKENS)
        rows.append(
            {
                "idx": f"val_{number}",
                "sub_task": "Counting" if number % 2 else "Jigsaw",
                "prompt": prompts[number],
                "choices": [said["response"], "unheard of"],
                "answer": "(A)" if number < 4 else "(B)",
                "image_1": {"bytes": (folder / f"{number}.png").read_bytes(), "path": None},
                "image_2": {"bytes": (folder / f"{5 - number}.png").read_bytes(), "path": None},
            }
        )
    write_parquet(
        folder / "blink" / "val.parquet", [*rows, {**rows[0], "idx": "val_6", "image_1": hub_picture(pictures[0]), "answer": "?"}]
    )
    lines = [
        {"question_id": n, "image": f"{n % 6}.png", "text": "is it there ?", "label": "yes" if n % 2 else "no"} for n in range(4)
    ]
    write_lines(folder / "coco_pope_random.json", lines)
    return folder


def test_an_adapter_beside_its_base_on_benchmarks(
    base: Path,
    adapter: Path,
    published: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Figures are those of a scorer by itself, the attention on each of several pictures is measured, a killed evaluation goes on to the
    same bytes."""
    monkeypatch.chdir(tmp_path)
    given = f"{{blink: {published / 'blink'}, pope: {published / 'coco_pope_random.json'}}}"
    command = ["evaluate", "--model", str(base), "--adapter", str(adapter), "--run", "r", "--benchmarks", given]
    command += ["--benchmark-tokens", str(TOKENS)]
    assert cli.main(command) == 0
    shown = capsys.readouterr()
    assert "BLINK, accuracy" in shown.out and "0.667" in shown.out and "POPE, f1" in shown.out
    assert "Benchmarks with several pictures, as in MIA-DPO" in shown.out
    assert "BLINK: 1 of 7 records left out (no answer: 1)" in " ".join(shown.err.split())

    assert cli.main([*command, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err.count("done before") == 2
    found = json.loads(captured.out)["benchmarks"]
    folder = tmp_path / "r" / "evaluate" / "own" / "benchmarks-before"
    answers = list(read_jsonl(folder / "benchmark-blink.jsonl"))
    right = [sum(c.lower() in a["response"].lower() for c in a["options"]) == 1 and a["answer"] == "A" for a in answers]
    blink = found["models"]["before"]["blink"]
    assert blink["figures"]["accuracy"]["value"] == sum(right) / len(right) == 4 / 6
    assert blink["by"]["category"]["Counting"]["accuracy"]["count"] == 3 and blink["attention"]["count"] == 6
    assert 1 / 2 <= blink["attention"]["largest"] <= 1 and all(len(answer["attention"]) == 2 for answer in answers)
    assert found["changes"]["after"]["blink"]["figures"]["accuracy"]["interval"] is not None
    assert found["tables"]["several_images"]["rows"]["before"]["BLINK"] == pytest.approx(100 * 4 / 6)

    whole = (folder / "benchmark-blink.jsonl").read_bytes(), (folder / "benchmarks.json").read_bytes()
    (folder / "summary.json").unlink()
    (folder / "benchmark-pope.jsonl").unlink()
    (folder / "benchmark-blink.jsonl").write_bytes(whole[0][:-100])
    shutil.rmtree(next((tmp_path / "r" / "evaluate" / "benchmarks").glob("blink-*")))
    assert cli.main(command) == 0
    assert whole == ((folder / "benchmark-blink.jsonl").read_bytes(), (folder / "benchmarks.json").read_bytes())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("{blonk: X}", "there is no benchmark 'blonk'; did you mean 'blink'?"),
        ("{blink: none.tsv}", "none.tsv does not exist"),
        ("{pope: BLINK}", "is no file of POPE: expected the columns"),
        ("{blink/x: BLINK}", "'blink/x' becomes a file name"),
    ],
)
def test_what_is_no_benchmark_is_said_before_any_work(
    base: Path,
    published: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    given: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["evaluate", "--model", str(base), "--benchmarks", given.replace("BLINK", str(published / "blink"))]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_pictures_that_are_elsewhere_are_said_before_a_run(published: Path, tmp_path: Path) -> None:
    """Not after its training."""
    moved = tmp_path / "coco_pope_random.json"
    shutil.copy(published / "coco_pope_random.json", moved)
    settings = {"evaluate": {"benchmarks": {"pope": str(moved)}, "per_format": {"single": 10}}, "method": "mia_dpo"}
    with pytest.raises(DataError, match=r"its first 4 rows lack their pictures.*evaluate.benchmark_images: \{pope: FOLDER\}"):
        run_pipeline(RunConfig.from_dict({"run_dir": str(tmp_path / "run"), **settings}))
    assert not (tmp_path / "run").exists()
