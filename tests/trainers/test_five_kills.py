"""Killed by SIGKILL five times, one kill behind the other, evaluations on benchmarks, a judge of them and servers that generate end with the
bytes of undisturbed ones.

Augment and select: `benchmarks/runs/data_at_size.py`; the other stages: `test_run_end_to_end.py` and the tests of each.
"""

from __future__ import annotations

import json
import signal
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import judged_files
import pytest
import yaml
from commands import Kill, command
from judge_server import JudgeServer
from prompt_records import make_prompts
from published_files import write_lines
from server_double import ModelServer
from tiny_models import make_tiny_qwen, sample_pictures

pytestmark = pytest.mark.nightly


def files(folder: Path) -> dict[str, bytes]:
    """What a stage left, but for seconds and places."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.jsonl"))}


def killed_five_times(arguments: Sequence[object], run: Path, pattern: str, lines: Sequence[int]) -> None:
    """Killed when a file has so many lines on disk, each time by the command that continues; then to the end."""
    for count in lines:
        assert command(*arguments, kill=Kill(run, pattern, count)) == -signal.SIGKILL
    assert command(*arguments) == 0
    assert len(lines) == 5


def test_benchmarks_of_a_model_and_its_adapter(base: Path, adapter: Path, tmp_path: Path) -> None:
    for number, picture in enumerate(sample_pictures(4)):
        picture.save(tmp_path / f"{number}.png")
    lines = [
        {"question_id": n, "image": f"{n % 4}.png", "text": f"is it {n} ?", "label": "yes" if n % 2 else "no"} for n in range(12)
    ]
    write_lines(tmp_path / "coco_pope_random.json", lines)

    def arguments(run: Path) -> list[object]:
        given = json.dumps({"pope": str(tmp_path / "coco_pope_random.json")})
        own = ["--benchmarks", given, "--benchmark-tokens", 3, "--batch-size", 2, "--threads", 1]
        return ["evaluate", "--model", base, "--adapter", adapter, "--run", run, *own]

    assert command(*arguments(tmp_path / "whole")) == 0
    run = tmp_path / "killed"
    killed_five_times(arguments(run), run, "evaluate/own/benchmarks-after/benchmark-pope.jsonl", (2, 4, 6, 8, 10))
    assert files(run) == files(tmp_path / "whole") and len(files(run)) >= 3


def test_a_judge_of_benchmarks(base: Path, adapter: Path, tmp_path: Path) -> None:
    published = {name: str(getattr(judged_files, name)(tmp_path / name)) for name in ("mt_bench", "mmhal")}

    def arguments(run: Path, url: str) -> list[object]:
        judge = json.dumps(
            {"source": "endpoint", "batch_size": 1, "endpoint": {"url": url, "model": "my-judge", "concurrency": 1}}
        )
        own = [
            "--benchmarks",
            json.dumps(published),
            "--judge",
            judge,
            "--benchmark-tokens",
            3,
            "--batch-size",
            1,
            "--threads",
            1,
        ]
        return ["evaluate", "--model", base, "--adapter", adapter, "--run", run, *own]

    run = tmp_path / "killed"
    with JudgeServer(lambda asked: '{"rating": 5}') as server:
        assert command(*arguments(tmp_path / "whole", server.url)) == 0
        count = len(server.asked)
    replies, steps = "evaluate/own/benchmarks-before/judge/replies.jsonl", range(1, 6)
    assert count > len(steps)
    with JudgeServer(lambda asked: '{"rating": 5}') as server:
        killed_five_times(arguments(run, server.url), run, replies, list(steps))
        assert set(Counter(asked.text for asked in server.asked).values()) == {1}
    assert files(run) == files(tmp_path / "whole")


def test_a_server_that_generates(tmp_path: Path) -> None:
    model = make_tiny_qwen(tmp_path / "model")
    make_prompts(tmp_path, [("single", 1), ("sequence", 3), ("grid", 4), ("pip", 2)] * 4)

    def arguments(run: Path, url: str) -> list[object]:
        options = {
            "input": str(tmp_path / "prompts.jsonl"),
            "engine": "server",
            "max_new_tokens": 4,
            "server": {"urls": [url], "concurrency": 1, "backoff": 0.0},
        }
        path = run.with_suffix(".yaml")
        path.write_text(yaml.safe_dump({"model": str(model), "threads": 1, "device": "cpu", "generate": options}))
        return ["generate", "--run", run, "--config", path]

    plays = ModelServer(model)
    with JudgeServer(plays, serves=["model"]) as server:
        assert command(*arguments(tmp_path / "whole", server.url)) == 0
        count = len(server.asked)
    with JudgeServer(plays, serves=["model"]) as server:
        run = tmp_path / "killed"
        killed_five_times(arguments(run, server.url), run, "generate/came-*.jsonl", (2, 5, 8, 11, 14))
        assert len(server.asked) == count == 16
    assert files(run) == files(tmp_path / "whole")
