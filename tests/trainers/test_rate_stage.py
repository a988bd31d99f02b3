"""Stage rate and what comes of it: continued without asking twice, in several processes, and as MIA-DPO's arm selected by a judge."""

from __future__ import annotations

import json
import signal
import zlib
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from commands import Kill, command
from judge_server import Asked, JudgeServer, Said, ratings
from launches import launch
from prompt_records import make_prompts
from report_run import write_json, write_run

from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.errors import ConfigError, DataError, StageError
from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.methods import METHODS
from mmdpo_trainers.report.comparison import PageInputs
from mmdpo_trainers.report.contents import RunContents
from mmdpo_trainers.report.page import render
from mmdpo_trainers.run import pipeline
from mmdpo_trainers.run.pipeline import run_stage
from mmdpo_trainers.stages import rate, select
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder

KEY = "sk-77aa01bc-never-to-be-seen"
KINDS = [("sequence", 3), ("grid", 4), ("pip", 2), ("sequence", 2)] * 3


def responses(folder: Path, *, several: bool = False) -> Path:
    """Answers, every second of them right; the records lie beside their pictures."""
    records = make_prompts(folder, KINDS)
    for place, record in enumerate(records):
        text = record["answer"] if place % 2 else "grey"
        record |= {"responses": [text, "no idea"]} if several else {"response": text, "recorded": {"layer": 1}, "perplexity": 2.0}
    (folder / "responses.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "responses.jsonl"


def endpoint(url: str, **options: Any) -> dict[str, Any]:
    return {"url": url, "model": "m", "key_env": "JUDGE_KEY", "backoff": 0.0, "retries": 3, "concurrency": 1, **options}


def context_of(run: Path, stage: str = "rate", **values: Any) -> StageContext:
    config = RunConfig.from_dict({"model": "shapes", "device": "cpu", **values})
    return StageContext(run=RunFolder(run), config=config, stage=stage)


def knows(asked: Asked) -> str:
    """A judge that goes by the truth that it is told: 4 for a right answer, 1 for a wrong one."""
    if asked.answers is not None:
        first, second = (text == asked.truth for text in asked.answers)
        return json.dumps({"better": "tie" if first == second else "A" if first else "B"})
    return ratings(4 if asked.answer == asked.truth else 1)


def test_a_rated_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By the command: ratings, problems, replies, summary, tables; and the key in none of them."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    file = responses(tmp_path, several=True)

    def plays(asked: Asked) -> str | Said:
        if asked.number == 0:
            return Said(429, KEY.encode(), {"Retry-After": "0"})
        return "hm" if asked.text.count("<image>") == 3 and asked.answer == "no idea" else knows(asked)

    with JudgeServer(plays) as server:
        flags = {
            "input": file,
            "source": "endpoint",
            "endpoint": json.dumps(endpoint(server.url, concurrency=4)),
            "facts": "[answer]",
        }
        flags |= {"tries": 2, "check": 6}
        command = ["rate", "--run", str(tmp_path / "run"), *(str(w) for name, v in flags.items() for w in (f"--{name}", v))]
        assert cli.main(command) == 0
        first = len(server.asked)
        shown = capsys.readouterr()
        assert cli.main(command) == 0 and len(server.asked) == first, "done is done"
    folder = tmp_path / "run" / "rate"
    lines = list(read_jsonl(folder / "ratings.jsonl"))
    assert [line["id"] for line in lines] == [r["id"] for r in sorted(read_jsonl(file), key=lambda r: len(r["images"]))]
    for line in lines:
        right = line["responses"][0] == line["answer"]
        assert line["ratings"][0]["correctness"] == (4 if right else 1)
        assert (line["ratings"][1] is None) == (len(line["images"]) == 3) == ("problems" in line)
    summary = read_json(folder / "summary.json")
    assert summary["answers"] == 24 and summary["unrated"] == {"malformed": 3} and "lost" not in summary
    assert summary["mean"]["helpfulness"] == pytest.approx((6 * 4 + 15) / 21)
    problems = list(read_jsonl(folder / "problems.jsonl"))
    assert [each["answer"] for each in problems] == [1, 1, 1] and "asked 2 times" in problems[0]["detail"]
    # A judge that knows the truth rates every true answer higher, and does not mind the order.
    checked = summary["check"]
    assert checked["of"] == "truth" and checked["agree"] | {"low": 0} == {
        "correct": 6,
        "total": 6,
        "value": 1.0,
        "low": 0,
        "high": 1.0,
    }
    assert checked["agree"]["low"] == pytest.approx(0.6097, abs=1e-4) and checked["consistent"]["value"] == 1
    assert checked["compared_agree"]["value"] == 1 and checked["first"]["value"] == 0.5 and checked["tied"]["value"] == 0
    assert summary["costs"]["requests"] == first == summary["costs"]["replies"] + 1 and summary["costs"]["repeated"] == 1
    for words in ("ratings by endpoint", "not rated: malformed", "better answer rated higher", "0.610 to 1.000", "prompt tokens"):
        assert words in " ".join(shown.err.split()), words
    written = "".join(p.read_bytes().decode(errors="replace") for p in (tmp_path / "run").rglob("*") if p.is_file())
    assert KEY not in written + shown.err + shown.out and "JUDGE_KEY" in (tmp_path / "run" / "config.yaml").read_text()
    assert all(asked.headers["authorization"] == f"Bearer {KEY}" for asked in server.asked)


def test_a_killed_command_asks_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed when five replies are on disk, in the middle of a batch; then in the check; then continued to the end."""
    monkeypatch.setenv("JUDGE_KEY", KEY)
    file = responses(tmp_path)
    values = {"input": str(file), "source": "endpoint", "facts": ["answer"], "check": 4, "batch_size": 4}

    def start(run: Path, url: str, replies: int = 0) -> int:
        (tmp_path / "rate.yaml").write_text(yaml.safe_dump({"model": "shapes", "rate": {**values, "endpoint": endpoint(url)}}))
        kill = Kill(run, "rate/replies.jsonl", replies) if replies else None
        return command("rate", "--run", run, "--config", tmp_path / "rate.yaml", kill=kill)

    with JudgeServer(knows) as server:
        run = tmp_path / "run"
        assert start(run, server.url, 5) == -signal.SIGKILL
        assert len(server.asked) == 5 and len((run / "rate/ratings.jsonl").read_text().splitlines()) == 4
        assert start(run, server.url, 15) == -signal.SIGKILL
        assert len(server.asked) == 15 and len((run / "rate/ratings.jsonl").read_text().splitlines()) == 12
    # The endpoint is elsewhere now, which changes no rating.
    with JudgeServer(knows) as later:
        assert start(run, later.url) == 0
    bodies = Counter(json.dumps(asked.body) for asked in (*server.asked, *later.asked))
    assert set(bodies.values()) == {1} and len(bodies) == read_json(run / "rate/summary.json")["costs"]["requests"]
    with JudgeServer(knows) as alone:
        assert start(tmp_path / "alone", alone.url) == 0
    assert len(alone.asked) == len(bodies)
    for name in ("ratings.jsonl", "summary.json"):
        first, second = ((folder / "rate" / name).read_text() for folder in (run, tmp_path / "alone"))
        if name == "summary.json":
            first, second = (json.dumps({**json.loads(text), "seconds": 0, "fingerprint": ""}) for text in (first, second))
        assert first == second


def rate_in(run: Path, values: dict[str, Any], rank: int) -> None:
    torch.set_num_threads(1)
    run_stage(context_of(run, rate=values))


def test_two_processes_share_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = responses(tmp_path)
    values = {"input": str(file), "source": "endpoint", "facts": ["answer"], "check": 3, "batch_size": 1}
    with JudgeServer(knows) as server:
        values["endpoint"] = endpoint(server.url, concurrency=2)
        monkeypatch.setattr(rate, "_IN_FLIGHT", 1)
        assert launch(2, partial(rate_in, tmp_path / "run", values)) == [0, 0]
    folder = tmp_path / "run" / "rate"
    with JudgeServer(knows) as alone:
        run_stage(context_of(tmp_path / "alone", rate={**values, "endpoint": endpoint(alone.url)}))
    assert (folder / "ratings.jsonl").read_bytes() == (tmp_path / "alone" / "rate" / "ratings.jsonl").read_bytes()
    assert len(server.asked) == len(alone.asked) == read_json(folder / "summary.json")["costs"]["replies"]
    assert (folder / "replies-00001.jsonl").read_text() and not list(folder.glob("*.part-*"))


def test_records_without_a_rating_are_lost_and_counted(tmp_path: Path) -> None:
    file = responses(tmp_path)
    records = [{**record, "answer": None if place < 4 else record["answer"]} for place, record in enumerate(read_jsonl(file))]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    summary = run_stage(context_of(tmp_path / "run", rate={"input": str(file), "source": "exact"}))
    assert summary["lost"] == {"records": 4, "of": 12, "reasons": {"no_truth": 4}} and summary["check"]["pairs"] == 8
    assert summary["check"]["agree"]["value"] == 1 and "consistent" not in summary["check"] and summary["costs"] == {}
    file.write_text("".join(json.dumps({**record, "answer": None}) + "\n" for record in records[:3]))
    with pytest.raises(DataError, match="3 of 3 records got no rating .*expected a record with an `answer`.*--allow-missing"):
        run_stage(context_of(tmp_path / "other", rate={"input": str(file), "source": "exact"}))
    summary = run_stage(context_of(tmp_path / "other", rate={"input": str(file), "source": "exact"}, allow_missing=True))
    assert summary["lost"]["records"] == 3 and summary["mean"] == {} and summary["check"] is None


def test_records_that_are_no_answers(tmp_path: Path) -> None:
    make_prompts(tmp_path, [("single", 1)])
    with pytest.raises(DataError, match="record 'r0/single': expected `response`"):
        run_stage(context_of(tmp_path / "run", rate={"input": str(tmp_path / "prompts.jsonl"), "source": "exact"}))


def test_the_check_on_pairs_of_the_user_s_own(tmp_path: Path) -> None:
    """TRL's columns; the judge is told no truth, and prefers long answers and the first place."""
    file = responses(tmp_path)
    pairs = []
    for place, record in enumerate(read_jsonl(file)):
        sides = ("a long answer", "short") if place % 3 else ("short", "a long answer")
        pairs.append(
            {"id": record["id"], "images": record["images"], "prompt": record["prompt"]}
            | dict(zip(("chosen", "rejected"), sides, strict=True))
        )
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    def plays(asked: Asked) -> str:
        return json.dumps({"better": "A"}) if asked.answers is not None else ratings(4 if len(asked.answer) > 5 else 0)

    with JudgeServer(plays) as server:
        values = {
            "input": str(file),
            "source": "endpoint",
            "endpoint": endpoint(server.url),
            "check_pairs": str(tmp_path / "pairs.jsonl"),
        }
        summary = run_stage(context_of(tmp_path / "run", rate=values))
    checked = summary["check"]
    assert checked["of"] == "check_pairs" and checked["pairs"] == 12
    assert {name: checked[name]["value"] for name in ("agree", "consistent", "compared_agree", "first")} == {
        "agree": 8 / 12, "consistent": 0.0, "compared_agree": 0.0, "first": 1.0,
    }  # fmt: skip
    assert checked["agree"]["low"] == pytest.approx(0.3906, abs=1e-3)


def test_only_a_run_with_a_judge_s_arm_has_ratings(tmp_path: Path) -> None:
    def stages(**values: Any) -> list[str]:
        return [f"{arm}/{stage}" if arm else stage for stage, _, arm in pipeline._steps(RunConfig.from_dict(values))]

    judged = {"judged": {"select": {"rule": "judge"}}}
    plain = ["augment", "generate", "score", "select", "train", "evaluate", "evaluate", "report"]
    assert stages() == plain and stages(arms={"wrong": {"select": {"rule": "random_wrong"}}})[:3] == plain[:3]
    assert stages(arms=judged)[:4] == ["augment", "generate", "rate", "score"] and stages(arms=judged)[-4:-1] == [
        "judged/select", "judged/train", "judged/evaluate",
    ]  # fmt: skip
    assert stages(select={"rule": "judge"})[2] == "rate"
    # Answers and scores of the user's own are rated as well.
    for section, expected in (("score", ["rate", "score"]), ("select", ["rate", "select"]), ("generate", ["generate", "rate"])):
        values = {section: {"input": str(tmp_path / "own.jsonl")}, "arms": judged}
        assert stages(**values)[:2] == expected
        own = context_of(tmp_path, **values).to_rate
        assert own == (tmp_path / "own.jsonl" if section != "generate" else tmp_path / "generate" / "responses.jsonl")
    assert stages(rate={"input": "own.jsonl"}, arms=judged)[:2] == ["augment", "generate"]
    with pytest.raises(ConfigError, match="--until: there is no stage 'rate'"):
        pipeline.run_pipeline(RunConfig(run_dir=str(tmp_path / "run")), until="rate")


def scored(folder: Path) -> list[dict[str, Any]]:
    """240 scored answers of three formats, a half of them wrong, and half of these looking away."""
    records = []
    for place in range(240):
        format, count = [("sequence", 2), ("sequence", 3), ("grid", 4), ("pip", 2)][place % 4]
        wrong = place % 8 < 4
        records.append({
            "id": f"r{place}", "source_id": f"r{place}", "format": format, "images": ["/1.png"] * (count if format == "sequence" else 1),
            "prompt": "<image>" * (count if format == "sequence" else 1) + " what colour?", "answer": "red", "target": 0,
            "num_images": count, "response": "blue" if wrong else "red", "perplexity": 1.5, "ratio": 0.1 if place % 16 < 8 else 0.9,
        })  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "scores.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def write_ratings(run: Path, records: list[dict[str, Any]], value: Any) -> None:
    (run / "rate").mkdir(parents=True, exist_ok=True)
    lines = [{**record, "responses": [record["response"]], "ratings": [value(record)]} for record in records]
    (run / "rate" / "ratings.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def by_group(pairs: list[dict[str, Any]]) -> Counter[tuple[str, int]]:
    return Counter((pair["format"], pair["num_images"]) for pair in pairs)


def test_a_judge_selects_with_the_attention_arm_s_mix(tmp_path: Path) -> None:
    """The perfect judge takes wrong answers alone, wherever they looked; one that likes nothing is kept from the truth itself."""
    records = scored(tmp_path / "score")
    write_ratings(tmp_path, records, lambda record: {"a": 4.0, "b": 2.0} if record["response"] == "red" else {"a": 0.0, "b": 2.0})
    rules = {"preset": "paper", "max_rating": 2.0}
    attention = select.run(context_of(tmp_path, "select", select={"preset": "paper"}))
    main = list(read_jsonl(tmp_path / "select" / "pairs.jsonl"))
    values: dict[str, Any] = {"rate": {"attributes": ["a", "b"]}, "select": {**rules, "rule": "judge"}}
    summary = select.run(context_of(tmp_path, "select", **values))
    found = list(read_jsonl(tmp_path / "select" / "pairs.jsonl"))
    assert by_group(found) == by_group(main) and summary["pairs"] == attention["pairs"] and sum(summary["pairs"].values()) == 60
    ids = {record["id"]: record for record in records}
    assert all(ids[pair["id"]]["response"] == "blue" for pair in found)
    assert {ids[pair["id"]]["ratio"] for pair in found} == {0.1, 0.9} and {ids[pair["id"]]["ratio"] for pair in main} == {0.1}
    assert summary["dropped"] == {"rating": 120, "not_drawn": 60} and summary["max_rating"] == 2.0 and summary["rating"] == "mean"
    # By one attribute, of which both answers have 2: what is the truth word for word is the only right answer then.
    values["select"] |= {"rating": "b"}
    assert select.run(context_of(tmp_path, "select", **values))["dropped"] == {"answer": 120, "not_drawn": 60}
    values["select"] |= {"rating": "c"}
    with pytest.raises(ConfigError, match="select.rating: expected one of rate.attributes, a, b, or null, got 'c'"):
        select.run(context_of(tmp_path, "select", **values))


def test_a_noisy_judge_and_one_that_fails(tmp_path: Path) -> None:
    """One in four verdicts is turned round, one in ten missing: fewer pairs are never made up, and what a judge calls wrong is believed."""
    records = scored(tmp_path / "score")
    for record in records:
        # "Reddish" is not the truth word for word, so that the judge alone keeps it from being rejected.
        record["response"] = "reddish" if record["response"] == "red" else record["response"]
    (tmp_path / "score" / "scores.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    def noisy(record: dict[str, Any]) -> dict[str, float] | None:
        drawn = zlib.crc32(record["id"].encode()) % 40
        right = (record["response"] == "reddish") != (drawn < 10)
        return None if drawn >= 36 else dict.fromkeys(RunConfig().rate.attributes, 4.0 if right else 0.0)

    write_ratings(tmp_path, records, noisy)
    rules = {"preset": "paper", "rule": "judge", "match": "contains", "min_edit_distance": None}
    summary = select.run(context_of(tmp_path, "select", select=rules))
    missing = sum(noisy(record) is None for record in records)
    assert summary["dropped"]["no_rating"] == missing > 0
    pairs = list(read_jsonl(tmp_path / "select" / "pairs.jsonl"))
    said = Counter(pair["rejected"][0]["content"][0]["text"] for pair in pairs)
    assert 0 < said["reddish"] < said["blue"]
    away = Counter((r["format"], r["num_images"]) for r in records if r["ratio"] == 0.1)
    low = Counter((r["format"], r["num_images"]) for r in records if 0.0 in (noisy(r) or {}).values())
    assert by_group(pairs) == {group: min(low[group], count) for group, count in away.items()}


def test_ratings_of_other_answers_are_refused(tmp_path: Path) -> None:
    records = scored(tmp_path / "score")
    write_ratings(tmp_path, [{**record, "response": "green"} for record in records], lambda record: None)
    with pytest.raises(StageError, match=r"expected a rating of the answer to record 'r0', 'blue', got one of \['green'\]"):
        select.run(context_of(tmp_path, "select", select={"rule": "judge"}))


def test_the_page_shows_the_judge(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")

    def page() -> str:
        contents = RunContents.read(run)
        return render(PageInputs(run=contents, method=METHODS["mia_dpo"], title="t", config={}, heat=None, pairs=1, seeds=[]))

    assert 'id="judge"' not in page()
    share = {"correct": 81, "total": 263, "value": 81 / 263, "low": 0.2553, "high": 0.3662}
    summary = {
        "source": "endpoint", "scale": [0, 4], "answers": 1234, "mean": {"correctness": 2.345}, "unrated": {"malformed": 3},
        "costs": {"requests": 2000, "prompt_tokens": 98765}, "check": {"pairs": 263, "of": "truth", "agree": share}, "seconds": 1.0,
    }  # fmt: skip
    write_json(run / "rate" / "summary.json", summary)
    shown = page().replace("\N{NO-BREAK SPACE}", " ")
    for words in ('id="judge"', "2.35", "98,765", "Not rated: malformed", "Better answer rated higher", "30.8 %", "25.5–36.6"):
        assert words in shown, words
    write_json(run / "rate" / "summary.json", {**summary, "check": None})
    assert "was not tried" in page()
