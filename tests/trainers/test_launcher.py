"""How the processes of a launch find each other: restarts, processes that do not come, environments that contradict themselves."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
from launches import IDS, launch, write_all
from processes import HANGS
from tiny_models import make_tiny_llava
from torch.distributed import TCPStore

from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.errors import StageError
from mmdpo_trainers.processes import launcher, ranks
from mmdpo_trainers.processes import parts as shards
from mmdpo_trainers.run.preflight import check_train_args
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder


def written(path: Path) -> list[str]:
    return [json.loads(line)["id"] for line in path.read_text().splitlines()]


def attempt(path: Path, die_at: int | None, fails: bool, rank: int) -> None:
    if fails:
        ranks.on_rank_0(lambda: [1 / 0])
    assert ranks.on_rank_0(lambda: [die_at]) == [die_at], "an answer of an earlier attempt"
    ranks.barrier()
    write_all(path, die_at)


def test_attempts_on_one_store_have_keys_of_their_own(tmp_path: Path) -> None:
    """The store of a launcher outlives the processes: one attempt fails, one is killed, one ends well, and another has nothing to do."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)

    def attempts(die_at: int | None, fails: bool = False) -> list[int]:
        work = partial(attempt, tmp_path / "x.jsonl", die_at, fails)
        return launch(2, work, port=store.port, TORCHELASTIC_USE_AGENT_STORE="True")

    assert attempts(None, fails=True) == [1, 2]
    assert -signal.SIGKILL in attempts(2)
    assert attempts(None) == attempts(None) == [0, 0]
    assert written(tmp_path / "x.jsonl") == IDS and shards.part_files(tmp_path / "x.jsonl") == []


def test_torchrun_starts_a_killed_process_again(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"import os, sys\nfrom pathlib import Path\nsys.path.insert(0, {str(Path(__file__).parents[1] / 'support')!r})\n"
        "from launches import write_all\n"
        f"write_all(Path({str(tmp_path / 'x.jsonl')!r}), 2 if os.environ['TORCHELASTIC_RESTART_COUNT'] == '0' else None)\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max-restarts", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=HANGS, env=environment)
    assert ran.returncode == 0, ran.stderr
    assert "Signal 9" in ran.stderr or "exitcode: -9" in ran.stderr, "it was killed"
    assert written(tmp_path / "x.jsonl") == IDS


def take_a_large_result(rank: int) -> None:
    found = ranks.on_rank_0(lambda: ["ä" * 2**20] * 9 + [0])
    assert len(found) == 10 and found[8] == "ä" * 2**20


def test_a_result_of_any_size_reaches_all() -> None:
    """A store takes values of up to 8 MiB."""
    assert launch(2, take_a_large_result) == [0, 0]


def write_in_folders(folders: list[Path], visible: float, rank: int) -> None:
    shards._VISIBLE = visible
    write_all(folders[rank] / "x.jsonl")


def test_one_folder_under_two_names(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "other").symlink_to(tmp_path / "folder")
    assert launch(2, partial(write_in_folders, [tmp_path / "folder", tmp_path / "other"], HANGS)) == [0, 0]
    assert written(tmp_path / "folder" / "x.jsonl") == IDS


def test_a_folder_that_is_not_shared(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(2, partial(write_in_folders, [tmp_path / "0", tmp_path / "1"], 0.2)) == [2, 2]
    error = capfd.readouterr().err
    assert f"{tmp_path}/0/x.jsonl: 6 of 12 lines are neither in it nor in the part files beside it" in error
    assert "Put it on a file system that all machines share" in error


def fail_in_blocks(rank: int) -> None:
    """The last process is in a batch while the first one fails, and hears of it after all others did."""
    with ranks.failing(), ranks.failing(), ranks.failing():
        ranks.barrier()
        if rank == 0:
            raise StageError("the real reason")
        if rank == 3:
            while ranks._State.store.add("heard", 0) < 2:
                time.sleep(0.01)
        ranks.wait_for(lambda: False)


def test_a_failure_is_heard_once_by_each(capfd: pytest.CaptureFixture[str]) -> None:
    """Errors go through several blocks that tell of them; the first process waits for those who are still in a batch."""
    assert launch(4, fail_in_blocks) == [2, 2, 2, 2]
    assert capfd.readouterr().err.count("process 0 of 4 failed, and this one ends with it: the real reason") == 3


def start_in_time(seconds: float, folder: Path, rank: int) -> None:
    """The time begins when both processes are at work."""
    launcher.CONNECT = timedelta(seconds=seconds)
    (folder / str(rank)).touch()
    while not (folder / str(1 - rank)).exists():
        time.sleep(0.01)
    ranks.start()


@pytest.mark.parametrize("agent", [False, True])
def test_processes_that_do_not_come(agent: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Of three that WORLD_SIZE names, as an old shell may have it, two are started; with a launcher's store and with their own."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if agent else None
    environment = {"WORLD_SIZE": "3", **({"TORCHELASTIC_USE_AGENT_STORE": "True"} if agent else {})}
    assert launch(2, partial(start_in_time, 8, tmp_path), port=None if store is None else store.port, **environment)[0] == 2
    error = capfd.readouterr().err
    assert (
        "[0] only 2 of 3 processes came within 8 s; start all of them with torchrun or accelerate launch, or take WORLD_SIZE"
        in error
    )


def test_finish_without_a_start() -> None:
    ranks.finish()


def make_a_group(rank: int) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    assert (ranks.rank(), ranks.world_size()) == (rank, 2)
    ranks.barrier()
    for name in ("RANK", "WORLD_SIZE"):
        del os.environ[name]
    assert (ranks.rank(), ranks.world_size()) == (rank, 2)


def test_a_group_of_ones_own_changes_nothing() -> None:
    assert launch(2, make_a_group) == [0, 0]


def look_at_settings(folder: Path, model: Path, rank: int) -> None:
    config = RunConfig.from_dict({"model": str(model), "device": "cpu"})
    context = StageContext(run=RunFolder(folder), config=config, stage="train")
    before = dict(os.environ)
    ranks.on_rank_0(lambda: check_train_args(context))
    assert not torch.distributed.is_initialized() and dict(os.environ) == before


def test_looking_at_settings_makes_no_process_group(tmp_path: Path) -> None:
    """One process looks, while the others wait for it: transformers must not wait for them in turn."""
    assert launch(2, partial(look_at_settings, tmp_path / "run", make_tiny_llava(tmp_path / "model"))) == [0, 0]


@pytest.mark.parametrize(
    ("environment", "gpus", "message"),
    [
        ({"RANK": "4", "LOCAL_RANK": "0"}, 0, "RANK: expected 0 to 3, as WORLD_SIZE is 4, got '4': start all of them"),
        ({"RANK": "x", "LOCAL_RANK": "0"}, 0, "RANK: expected 0 to 3, as WORLD_SIZE is 4, got 'x'"),
        ({"RANK": "1"}, 2, "LOCAL_RANK is not set for process 1 of 4, which sees 2 GPUs"),
        ({"RANK": "1", "LOCAL_RANK": "2"}, 2, "LOCAL_RANK: expected 0 to 1, as this process sees 2 GPUs, got 2"),
    ],
)
def test_an_environment_that_contradicts_itself(
    environment: dict[str, str], gpus: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**environment, "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    with pytest.raises(StageError, match=message):
        ranks.device() if gpus else ranks.start()
