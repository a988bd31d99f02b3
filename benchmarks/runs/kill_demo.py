"""Kill `make demo` five times, in five stages, and compare its end with an undisturbed run.

    python -m benchmarks.runs.kill_demo                  # results/kill_demo.json; removes runs/shapes_mia_dpo and runs/undisturbed first
    python -m benchmarks.runs.kill_demo --small          # one kill in a run of a few pictures, into build/benchmarks

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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, Place, add_place, markdown, place_of, run_mmdpo, settings_of
from benchmarks.runs.mia_dpo_seeds import SMALL

CONFIG = "shapes_mia_dpo"
STAGES = ("augment", "generate", "train", "evaluate/before", "evaluate/after")
COMPARED = ("select/pairs.jsonl", "train/final/adapter_model.safetensors", "train/log.jsonl", "evaluate/after/answers.jsonl")


@dataclass(frozen=True, kw_only=True)
class Demo:
    """What is killed."""

    folder: Path
    undisturbed: Path
    command: list[str]
    """Starts or continues it in `folder`."""
    settings: list[str]
    """Options of `mmdpo run` beside the configuration."""
    stages: tuple[str, ...]

    def finish(self) -> None:
        """Continue to the end."""
        subprocess.run(self.command, cwd=ROOT, check=True)


def demo_of(place: Place, *, small: bool) -> Demo:
    """`make demo`, or a run of a few pictures that is killed in training alone."""
    runs = ROOT / "runs" if place.committed else place.folder / "runs"
    folder, settings = runs / "shapes_mia_dpo", settings_of(SMALL) if small else []
    mmdpo = [sys.executable, "-m", "mmdpo_trainers.cli.main", "run", CONFIG, "--run-dir", str(folder), *settings]
    return Demo(
        folder=folder,
        undisturbed=runs / "undisturbed",
        command=["make", "demo"] if place.committed else mmdpo,
        settings=settings,
        stages=("train",) if small else STAGES,
    )


def kill_in(demo: Demo, stage: str, share: float, seconds: float) -> dict[str, Any]:
    """Start the demo and kill it when `share` of the stage's usual time has passed in it."""
    process = subprocess.Popen(demo.command, cwd=ROOT, start_new_session=True, stdout=subprocess.DEVNULL)
    folder = demo.folder / stage
    while not (folder / "state.json").exists():
        if process.poll() is not None:
            raise SystemExit(f"{' '.join(demo.command)} ended with {process.returncode} before {stage}")
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


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments (default 0)")
    add_place(parser)
    arguments = parser.parse_args(argv)
    place = place_of(arguments)
    demo = demo_of(place, small=arguments.small)
    for folder in (demo.folder, demo.undisturbed):
        shutil.rmtree(folder, ignore_errors=True)
    run_mmdpo("run", CONFIG, "--run-dir", str(demo.undisturbed), *demo.settings)
    seconds = json.loads((demo.undisturbed / "summary.json").read_text(encoding="utf-8"))["seconds"]
    rng = random.Random(arguments.seed)
    kills = [kill_in(demo, stage, rng.uniform(0.15, 0.85), seconds[stage]) for stage in demo.stages]
    demo.finish()
    undisturbed, killed = compared(demo.undisturbed), compared(demo.folder)
    path = place.result(
        "kill_demo", {"kills": kills, "same": undisturbed == killed, "undisturbed": undisturbed, "killed": killed}
    )
    text = _table(kills, undisturbed == killed)
    print(f"{text}\nwritten: {path}")
    place.section("docs/results.md", "kill_demo", text)
    if undisturbed != killed:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
