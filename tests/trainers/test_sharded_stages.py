"""Generating, scoring and evaluating in several processes: the file of one process, whatever is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from launches import launch
from prompt_records import make_prompts
from tiny_models import make_tiny_llava

from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.errors import ConfigError, RunFolderError, StageError
from mmdpo_trainers.processes import ranks
from mmdpo_trainers.processes.parts import part_file, part_files
from mmdpo_trainers.run.pipeline import run_stage
from mmdpo_trainers.stages import generate
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder

# Six batches of two, of different formats, the last one of one record.
KINDS = [("sequence", 3), ("grid", 4), ("pip", 2), ("sequence", 2), ("single", 1), ("single", 1)] * 2


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    make_prompts(folder, KINDS[:-1])
    return folder / "prompts.jsonl"


def settings(model: Path, prompts: Path) -> dict[str, Any]:
    options = {"input": str(prompts), "batch_size": 2, "max_new_tokens": 4}
    # Answers that carry no attention are measured by score's own pass, with the model.
    generated = {**options, "do_sample": True, "noise": "paper", "record_attention": False}
    return {
        "model": str(model),
        "device": "cpu",
        "generate": generated,
        "evaluate": options,
        "score": {"batch_size": 4, "layer": "best"},
    }


def context_of(folder: Path, model: Path, prompts: Path, stage: str) -> StageContext:
    moment: Any = "before" if stage == "evaluate" else None
    return StageContext(run=RunFolder(folder), config=RunConfig.from_dict(settings(model, prompts)), stage=stage, moment=moment)


STAGES = {"generate": "responses.jsonl", "score": "scores.jsonl", "evaluate": "answers.jsonl"}


def all_stages(folder: Path, model: Path, prompts: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    contexts = {stage: context_of(folder, model, prompts, stage) for stage in STAGES}
    return {stage: run_stage(context) for stage, context in contexts.items()}


def files(folder: Path, model: Path, prompts: Path) -> dict[str, bytes]:
    contexts = {stage: context_of(folder, model, prompts, stage) for stage in STAGES}
    named = [*STAGES.items(), ("score", "layers.json")]
    return {f"{stage}/{name}": (contexts[stage].folder / name).read_bytes() for stage, name in named}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, model: Path, prompts: Path) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("alone")
    all_stages(folder, model, prompts)
    return files(folder, model, prompts)


def run_generate(folder: Path, model: Path, prompts: Path, rank: int) -> None:
    generate.run(context_of(folder, model, prompts, "generate"))


def say(log: Path, line: Any) -> None:
    """One line from any process."""
    with log.open("a") as file:
        file.write(f"{line}\n")


def say_summaries(folder: Path, model: Path, prompts: Path, rank: int) -> None:
    summaries = all_stages(folder / "run", model, prompts)
    say(folder / "log", json.dumps({stage: {**each, "seconds": 0} for stage, each in summaries.items()}, sort_keys=True))


def test_the_files_are_those_of_one_process(tmp_path: Path, model: Path, prompts: Path, alone: Any) -> None:
    """Three processes for six batches; two for the work of three that is done."""
    work = partial(say_summaries, tmp_path, model, prompts)
    assert launch(3, work) == [0, 0, 0]
    assert files(tmp_path / "run", model, prompts) == alone
    assert not list((tmp_path / "run").rglob("*.part-*"))
    told = (tmp_path / "log").read_text().splitlines()
    assert len(told) == 3 and len(set(told)) == 1, "every process returns the first one's summary"
    # Done work is not done again, by any number of processes.
    assert launch(2, work) == [0, 0]
    assert len(set((tmp_path / "log").read_text().splitlines())) == 1


def run_several(folder: Path, model: Path, prompts: Path, rank: int) -> None:
    context = context_of(folder, model, prompts, "generate")
    context.config.generate.num_answers = 3
    generate.run(context)


def test_several_answers_a_prompt_are_those_of_one_process(tmp_path: Path, model: Path, prompts: Path) -> None:
    torch.set_num_threads(1)
    run_several(tmp_path / "alone", model, prompts, 0)
    assert launch(2, partial(run_several, tmp_path / "run", model, prompts)) == [0, 0]
    files = [tmp_path / name / "generate" / "responses.jsonl" for name in ("alone", "run")]
    assert files[0].read_bytes() == files[1].read_bytes()
    assert {len(json.loads(line)["responses"]) for line in files[0].read_text().splitlines()} == {3}


def generate_logged(folder: Path, model: Path, prompts: Path, log: Path, dies: bool, rank: int) -> None:
    """Log the records of each batch. dies: the second process is killed in its second batch, the first one waits for that in its third."""
    context, original = context_of(folder, model, prompts, "generate"), generate.generate_responses
    path = context.folder / "responses.jsonl"

    def logged(loaded: Any, batch: Any, **options: Any) -> Any:
        own = len(part_file(path, ranks.rank()).read_bytes().splitlines())
        if dies and ranks.rank() == 1 and own == 2:
            ranks.wait_for(lambda: bool(part_file(path, 0).read_bytes()))
            os.kill(os.getpid(), signal.SIGKILL)
        if dies and ranks.rank() == 0 and own == 4:
            signal.pause()
        say(log, [record["id"] for record in batch])
        return original(loaded, batch, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "generate_responses", logged)
        generate.run(context)


@pytest.mark.parametrize("again", [1, 3])
def test_killed_and_started_again_with_another_number(tmp_path: Path, model: Path, prompts: Path, alone: Any, again: int) -> None:
    """The second process dies in its second batch; the first one gets somewhere, and a torn line is left too."""
    context = context_of(tmp_path / "run", model, prompts, "generate")
    path, log = context.folder / "responses.jsonl", tmp_path / "log"
    dying, work = (partial(generate_logged, tmp_path / "run", model, prompts, log, dies) for dies in (True, False))
    assert launch(2, dying) == [-signal.SIGKILL] * 2, "the other one by the launcher"
    kept = {json.loads(line)["id"] for part in part_files(path) for line in part.read_bytes().splitlines()}
    assert len(kept) >= 4 and path.read_bytes() == b""
    with part_file(path, 1).open("ab") as file:
        file.write(b'{"id": "torn')
    log.write_text("")

    if again == 1:
        work(0)
    else:
        assert launch(again, work) == [0] * again
    assert path.read_bytes() == alone["generate/responses.jsonl"]
    assert part_files(path) == []
    done_again = [id for line in log.read_text().splitlines() for id in yaml.safe_load(line)]
    assert not kept & set(done_again) and len(done_again) == len(set(done_again)) == len(KINDS) - 1 - len(kept)


def test_several_continue_what_one_began(tmp_path: Path, model: Path, prompts: Path, alone: Any) -> None:
    context = context_of(tmp_path / "run", model, prompts, "generate")
    path = context.folder / "responses.jsonl"
    lines = alone["generate/responses.jsonl"].splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    part_file(path, 7).write_bytes(lines[8])
    assert launch(2, partial(run_generate, tmp_path / "run", model, prompts)) == [0, 0]
    assert path.read_bytes() == alone["generate/responses.jsonl"] and part_files(path) == []


def test_a_failing_process_ends_the_others_with_its_message(
    tmp_path: Path, model: Path, prompts: Path, alone: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """A picture is missing: nothing that was done is lost, and the same command continues once it is back."""
    context = context_of(tmp_path / "run", model, prompts, "generate")
    path = context.folder / "responses.jsonl"
    picture = prompts.parent / "r2-0.png"
    away = picture.rename(tmp_path / "away.png")
    try:
        assert launch(2, partial(run_generate, tmp_path / "run", model, prompts)) == [2, 2]
    finally:
        away.rename(picture)
    errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith(("[0] ", "[1] "))]
    own, other = sorted(errors, key=lambda line: "and this one ends with it" in line)
    message = f"record r2/pip: missing: {picture} is not a file"
    assert message in own and f"failed, and this one ends with it: {message}" in other
    assert launch(2, partial(run_generate, tmp_path / "run", model, prompts)) == [0, 0]
    assert path.read_bytes() == alone["generate/responses.jsonl"]


def test_a_part_that_another_process_still_writes(tmp_path: Path, model: Path, prompts: Path) -> None:
    context = context_of(tmp_path / "run", model, prompts, "generate")
    part = part_file(context.folder / "responses.jsonl", 1)
    program = (
        f"import fcntl, sys; f = open({str(part)!r}, 'a'); fcntl.flock(f, fcntl.LOCK_EX); print(1, flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None and holder.stdout.readline()
        with pytest.raises(RunFolderError, match="responses.part-00001.jsonl is being written by another process.*end it"):
            generate.run(context)
    finally:
        holder.kill()
        holder.wait()


def done_once(folder: Path, rank: int) -> None:
    say(folder / "log", ranks.on_rank_0(lambda: say(folder / "calls", rank) or {"rank": rank}))  # type: ignore[func-returns-value]
    assert ranks.world_size() == 2 and ranks.rank() == rank
    ranks.barrier()
    ranks.on_rank_0(lambda: 1 / 0)


def test_stages_of_one_process_are_done_once_and_errors_reach_all(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(2, partial(done_once, tmp_path)) == [1, 2]
    assert (tmp_path / "calls").read_text() == "0\n" and (tmp_path / "log").read_text() == "{'rank': 0}\n" * 2
    assert "[1] process 0 of 2 failed, and this one ends with it: division by zero" in capfd.readouterr().err


def test_one_process_needs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert (ranks.rank(), ranks.world_size(), ranks.local_rank(), ranks.is_rank_0(), ranks.device()) == (0, 1, 0, True, "auto")
    ranks.start()
    ranks.barrier()
    assert not torch.distributed.is_initialized() and ranks.on_rank_0(lambda: {1: 2}) == {1: 2}
    monkeypatch.setenv("WORLD_SIZE", "4")
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(StageError, match="WORLD_SIZE is 4, but RANK, MASTER_ADDR, MASTER_PORT is not set: start .* torchrun"):
        ranks.start()


def test_each_process_has_its_own_gpu(tmp_path: Path, model: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    context = context_of(tmp_path, model, prompts, "generate")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert context.device == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for count, expected in ((4, "cuda:3"), (1, "cuda:0")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        for chosen in (None, "auto", "cuda"):
            context.config.device = chosen
            assert context.device == expected
    context.config.device = "cuda:1"
    with pytest.raises(ConfigError, match="cuda:1 would be shared by 4 processes; leave it out"):
        _ = context.device


def run_command(arguments: list[str], rank: int) -> None:
    assert cli.main(arguments) == 0


def test_the_command_in_several_processes(
    tmp_path: Path, model: Path, prompts: Path, alone: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    """Stages that the first process does alone come before and after the shared ones."""
    values = settings(model, prompts)
    values |= {"select": {"min_perplexity": None, "max_length_ratio": None}, "threads": 1}
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(values))

    arguments = ["run", str(config), "--run-dir", str(tmp_path / "run"), "--until", "select"]
    assert launch(2, partial(run_command, arguments)) == [0, 0]
    for stage in ("generate", "score"):
        assert (tmp_path / "run" / stage / STAGES[stage]).read_bytes() == alone[f"{stage}/{STAGES[stage]}"]
    assert (tmp_path / "run" / "select" / "summary.json").exists()
    said = capfd.readouterr()
    assert said.err.count("generate: 11/11") == 1 and said.out.count("run folder:") == 1
