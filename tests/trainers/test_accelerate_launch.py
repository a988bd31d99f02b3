"""The files in configs/accelerate, as they are, by the command itself: `accelerate launch` starts two processes that end as one does."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from distributed import STRATEGIES, fill, launch, needs
from processes import HANGS
from test_distributed_training import assert_same

from mmdpo_trainers.config.shipped import CONFIGS

CASE = {"full_finetune": True, "max_steps": 2, "logging_steps": 1}
KINDS = {"ddp": "MULTI_CPU", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED", "fsdp2": "FSDP"}
SCRIPT = Path(__file__).parents[1] / "support" / "launched_training.py"
COMMAND = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = fill(tmp_path_factory.mktemp("launched"))
    launch("alone", folder, folder / "alone", {"full": CASE})
    return folder


# The one that differs most in every run, the others nightly: `test_distributed_training.py` has them all.
_OFTEN = ("zero3",)


@pytest.mark.parametrize(
    "strategy", [pytest.param(each, marks=[] if each in _OFTEN else pytest.mark.nightly) for each in STRATEGIES]
)
def test_the_command_trains_as_one_process(folder: Path, strategy: str) -> None:
    needs(strategy)
    output = folder / strategy
    output.mkdir()
    command = [
        *COMMAND,
        "--config_file",
        f"accelerate/{strategy}.yaml",
        "--num_processes",
        "2",
        "--main_process_port",
        "0",
    ]
    # What a machine without a GPU needs.
    cpu = {"ACCELERATE_USE_CPU": "true"} if strategy == "ddp" else {"ACCELERATE_TORCH_DEVICE": "cpu"}
    environment = {**os.environ, **cpu, "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "STRATEGY": strategy}
    ran = subprocess.run(
        [*command, str(SCRIPT), str(folder), str(output / "full"), json.dumps(CASE)],
        cwd=CONFIGS,
        env={**environment, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=HANGS,
    )
    assert ran.returncode == 0, ran.stderr[-5000:]
    kinds = [(output / "full" / f"kind-{rank}").read_text() for rank in range(2)]
    assert kinds == [f"{KINDS[strategy]} 2"] * 2
    assert_same(output / "full", folder / "alone" / "full")
