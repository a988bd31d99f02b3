"""Kill `make demo` five times, in five stages, and compare its end with an undisturbed run.

    python -m benchmarks.kill_demo                  # results/kill_demo.json; removes runs/shapes_mia_dpo and runs/undisturbed first

Each kill is SIGKILL to the whole process group at a random moment of a stage. The demo is then started again, which continues the run.
Selected pairs, trained weights and final metrics must be the same to the byte.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, markdown, write_result, write_section

CONFIG = "configs/shapes_mia_dpo.yaml"
DEMO, UNDISTURBED = ROOT / "runs" / "shapes_mia_dpo", ROOT / "runs" / "undisturbed"
STAGES = ("augment", "generate", "train", "evaluate/before", "evaluate/after")
COMPARED = ("select/pairs.jsonl", "train/final/adapter_model.safetensors", "train/log.jsonl", "evaluate/after/answers.jsonl")


def kill_in(stage: str, share: float, seconds: float) -> dict[str, Any]:
    """Start the demo and kill it when `share` of the stage's usual time has passed in it."""
    process = subprocess.Popen(["make", "demo"], cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    folder = DEMO / stage
    while not (folder / "state.json").exists():
        if process.poll() is not None:
            raise SystemExit(f"make demo ended with {process.returncode} before {stage}")
        time.sleep(0.02)
    time.sleep(share * seconds)
    done = (folder / "summary.json").exists()
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return {"stage": stage, "seconds_into_stage": round(share * seconds, 2), "stage_was_done": done}


def compared(folder: Path) -> dict[str, Any]:
    """What must not depend on being killed."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    files = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in COMPARED}
    return {"files": files, **{name: summary[name] for name in ("accuracy", "pairs", "dropped")}}


def _table(kills: list[dict[str, Any]], same: bool) -> str:
    rows = [[str(number), kill["stage"], str(kill["seconds_into_stage"])] for number, kill in enumerate(kills, start=1)]
    verdict = "the same" if same else "NOT the same"
    table = markdown(["kill", "in stage", "seconds into it"], rows)
    return f"{table}\n\nSelected pairs, trained weights, training log, answers and final metrics are {verdict} as those of an undisturbed run."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default 0)")
    arguments = parser.parse_args()
    for folder in (DEMO, UNDISTURBED):
        shutil.rmtree(folder, ignore_errors=True)
    mmdpo = [sys.executable, "-m", "mmdpo_trainers.cli", "run", CONFIG, "--run-dir", str(UNDISTURBED)]
    subprocess.run(mmdpo, cwd=ROOT, check=True)
    seconds = json.loads((UNDISTURBED / "summary.json").read_text(encoding="utf-8"))["seconds"]
    rng = random.Random(arguments.seed)
    kills = [kill_in(stage, rng.uniform(0.15, 0.85), seconds[stage]) for stage in STAGES]
    subprocess.run(["make", "demo"], cwd=ROOT, check=True)
    undisturbed, killed = compared(UNDISTURBED), compared(DEMO)
    path = write_result(
        "kill_demo", {"kills": kills, "same": undisturbed == killed, "undisturbed": undisturbed, "killed": killed}
    )
    text = _table(kills, undisturbed == killed)
    print(f"{text}\nwritten: {path}")
    write_section("docs/results.md", "kill_demo", text)
    if undisturbed != killed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
