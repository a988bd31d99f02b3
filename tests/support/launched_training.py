"""`accelerate launch … launched_training.py FOLDER OUTPUT CASE`: a script that trains, for tests/trainers/test_accelerate_launch.py."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import distributed
import torch
from accelerate.state import AcceleratorState

if __name__ == "__main__":
    folder, output, case = sys.argv[1:]
    if os.environ["STRATEGY"] != "ddp":
        distributed.pretend_accelerators(os.environ["STRATEGY"])
    distributed.train(Path(folder), Path(output), json.loads(case))
    Path(output, f"kind-{os.environ['RANK']}").write_text(
        f"{AcceleratorState().distributed_type.value} {torch.distributed.get_world_size()}"
    )
    torch.distributed.destroy_process_group()
