"""Judged benchmarks in an evaluation: a tiny model beside its adapter, a judge on loopback, kills, failures, and what is refused before."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import judged_files
import pytest
from judge_server import Asked, JudgeServer, Said

from mmdpo_trainers.answers.raters.judge import Question
from mmdpo_trainers.answers.raters.local import LocalModel
from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.stages.models import LazyModel

TOKENS = "3"


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("published")
    makers = {
        name: getattr(judged_files, name)
        for name in ("mmhal", "mm_vet", "llava_bench", "mt_bench", "alpaca_eval", "object_halbench", "amber")
    }
    found = {name: make(folder / name) for name, make in makers.items()}
    return {**found, "object_halbench_judged": found["object_halbench"]}


def kind_of(asked: Asked) -> str:
    """Which benchmark's prompt it is."""
    for kind, words in {
        "mmhal": "from 0 to 6",
        "mm_vet": "how correct it is",
        "llava_bench": "Assistant 2:",
        "mt_bench": "from 1 (worst) to 10",
        "alpaca_eval": "most people prefer",
        "objects": '{"objects"',
    }.items():
        if words in asked.text and (kind != "mt_bench" or "Assistant 2:" not in asked.text):
            return kind
    raise AssertionError(asked.text)


REPLIES = {
    "mmhal": '{"rating": 2}',
    "mm_vet": 'Half. {"score": 0.5}',
    "llava_bench": '{"first": 8, "second": 4}',
    "mt_bench": '{"rating": 7}',
    "alpaca_eval": '{"better": "A"}',
    "objects": '{"objects": ["puppy", "cat"]}',
}


def plays(asked: Asked) -> str:
    assert not asked.images
    return REPLIES[kind_of(asked)]


def command(base: Path, benchmarks: dict[str, Path], url: str, *more: str) -> list[str]:
    given = json.dumps({name: str(path) for name, path in benchmarks.items()})
    judge = json.dumps({"source": "endpoint", "endpoint": {"url": url, "model": "my-judge", "backoff": 0.0, "retries": 1}})
    return [
        *("evaluate", "--model", str(base), "--benchmarks", given, "--judge", judge),
        *("--benchmark-tokens", TOKENS, "--json", *more),
    ]


def test_a_judge_marks_before_and_after_and_is_asked_nothing_twice(
    base: Path,
    adapter: Path,
    published: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    with JudgeServer(plays) as server:
        arguments = command(base, published, server.url, "--adapter", str(adapter), "--run", "r")
        assert cli.main(arguments) == 0
        found = json.loads(capsys.readouterr().out)["benchmarks"]
        models = found["models"]
        figures = {
            key: {name: each["value"] for name, each in models["before"][key]["figures"].items()} for key in models["before"]
        }
        assert figures["mmhal"] == {"score": 2, "hallucination_rate": 1} and figures["mm_vet"] == {"score": 0.5}
        assert figures["llava_bench"]["relative"] == 50
        assert figures["mt_bench"] == {"score": 7, "turn_1": 7, "turn_2": 7}
        assert figures["alpaca_eval"]["win_rate"] == 0.5 and figures["alpaca_eval"]["kept"] == 0
        assert set(figures["amber"]) >= {"score", "chair", "f1"} and set(figures["object_halbench"]) >= {"chair_s", "chair_i"}
        assert found["benchmarks"]["mmhal"]["judge"] == {
            "name": "my-judge",
            "source": "endpoint",
            "settings": {
                "judge": "my-judge",
                "max_image_side": 1024,
                "parameters": {"temperature": 0},
                "json_schema": False,
                "max_new_tokens": 256,
            },
            "template": False,
        }
        assert found["benchmarks"]["object_halbench"]["note"] == "objects are told by synonyms.txt, 81 words"
        assert "hallucination" not in str(found["changes"]["after"]["mt_bench"])

        # Second turns were asked behind first answers, and every question to the judge once.
        folder = tmp_path / "r" / "evaluate" / "own"
        turns = list(read_jsonl(folder / "benchmarks-before" / "benchmark-mt_bench.jsonl"))
        assert all(len(turn["responses"]) == 2 for turn in turns)
        texts = Counter(asked.text for asked in server.asked)
        assert set(texts.values()) == {1}
        summaries = {
            moment: json.loads((folder / f"benchmarks-{moment}" / "summary.json").read_text()) for moment in ("before", "after")
        }
        assert sum(each["judge"]["costs"]["requests"] for each in summaries.values()) == len(server.asked)

        # Killed in the middle of the judge's work: nothing is asked again, and the files are the same.
        count = len(server.asked)
        names = ("judged-mmhal.jsonl", "judged-mt_bench.jsonl", "benchmarks.json", "benchmark-mt_bench.jsonl")
        own = folder / "benchmarks-before"
        whole = {name: (own / name).read_bytes() for name in names}
        (own / "summary.json").unlink()
        (own / "benchmarks.json").unlink()
        (own / "judged-mmhal.jsonl").unlink()
        (own / "judged-mt_bench.jsonl").write_bytes(whole["judged-mt_bench.jsonl"][:-40])
        assert cli.main(arguments) == 0
        capsys.readouterr()
        assert whole == {name: (own / name).read_bytes() for name in names} and len(server.asked) == count


def test_what_a_judge_does_not_say_is_counted(
    base: Path, published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One of two questions gets no rating, however often it is asked; with both, the evaluation ends before there are figures."""
    monkeypatch.chdir(tmp_path)
    missing = re.compile("what colour . 0")

    def silent(asked: Asked) -> str | Said:
        return "I cannot say." if missing.search(asked.text) else plays(asked)

    chosen = {"mmhal": published["mmhal"]}
    with JudgeServer(silent) as server:
        assert cli.main(command(base, chosen, server.url)) == 0
        captured = capsys.readouterr()
        mmhal: dict[str, Any] = json.loads(captured.out)["benchmarks"]["models"]["before"]["mmhal"]
        assert mmhal["unjudged"] == {"malformed": 1} and mmhal["figures"]["score"]["count"] == mmhal["questions"] == 1
        assert "1 of 2 answers were not judged" in " ".join(captured.err.split())
        assert len(server.asked) == 4
        assert cli.main([part for part in command(base, chosen, server.url) if part != "--json"]) == 0
        shown = " ".join(capsys.readouterr().out.split())
        assert (
            "marked by my-judge with a prompt of this project's" in shown and "judgements missing: 1 before (malformed)" in shown
        )
    missing = re.compile("what colour")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    with JudgeServer(silent) as server:
        assert cli.main(command(base, chosen, server.url)) == 2
        assert "2 of 2 answers were not judged" in " ".join(capsys.readouterr().err.split())


def test_a_judge_in_a_local_folder_has_the_room_of_the_model_that_answered(
    base: Path, published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    held: list[LazyModel] = []
    made = LazyModel.__init__
    monkeypatch.setattr(LazyModel, "__init__", lambda self, load: (held.append(self), made(self, load))[1])

    def answers(self: LocalModel, batch: Sequence[Question]) -> list[dict[str, Any]]:
        assert [model._loaded for model in held] == [None]
        return [{"response": '{"score": 0.3}', "ended": True, "num_tokens": 4} for _ in batch]

    monkeypatch.setattr(LocalModel, "_answers", answers)
    given = json.dumps({"mm_vet": str(published["mm_vet"])})
    judge = json.dumps({"source": "model", "judge": str(base)})
    command = ["evaluate", "--model", str(base), "--benchmarks", given, "--judge", judge, "--benchmark-tokens", TOKENS, "--json"]
    assert cli.main(command) == 0
    found = json.loads(capsys.readouterr().out)["benchmarks"]
    assert found["models"]["before"]["mm_vet"]["figures"]["score"]["value"] == pytest.approx(0.3)
    assert found["benchmarks"]["mm_vet"]["judge"]["name"] == "tiny-llava"


@pytest.mark.parametrize(
    ("judge", "message"),
    [
        ("{}", "evaluate.benchmarks: a judge marks mmhal; say which as evaluate.judge.source"),
        ("{source: model}", "evaluate.judge.judge: expected a path"),
        ("{source: endpoint}", "evaluate.judge.endpoint.model: expected the model's name"),
        (
            "{source: endpoint, endpoint: {model: m}, templates: {pope: x}}",
            "'pope' is none of evaluate.benchmarks that a judge marks",
        ),
        ("{source: endpoint, endpoint: {model: m}, templates: {mmhal: none.j2}}", "evaluate.judge.templates.mmhal: "),
    ],
)
def test_a_judge_that_cannot_be_is_refused_before_any_work(
    base: Path,
    published: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    judge: str,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    given = json.dumps({"mmhal": str(published["mmhal"])})
    assert cli.main(["evaluate", "--model", str(base), "--benchmarks", given, "--judge", judge]) == 2
    assert message in " ".join(capsys.readouterr().err.split())
    assert not list(tmp_path.iterdir())


def test_a_run_without_its_judge_is_refused_before_training(
    published: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    given = json.dumps({"mt_bench": str(published["mt_bench"])})
    assert cli.main(["run", "shapes_mia_dpo", "--set", f"evaluate.benchmarks={given}"]) == 2
    assert "a judge marks mt_bench; say which as evaluate.judge.source" in " ".join(capsys.readouterr().err.split())
    assert not list((tmp_path / "runs").glob("*/augment"))
