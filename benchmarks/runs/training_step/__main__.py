"""Command line of the training-step benchmark; see the package."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
import warnings
from collections.abc import Sequence
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
warnings.filterwarnings("ignore", category=FutureWarning)

from rich.console import Console  # noqa: E402
from rich.markdown import Markdown  # noqa: E402

import benchmarks.runs.training_step as package  # noqa: E402
from benchmarks import readme  # noqa: E402
from benchmarks.measure import Place, add_place, machine, place_of  # noqa: E402
from benchmarks.runs.training_step import parts, profiled  # noqa: E402
from benchmarks.runs.training_step.page import text_of  # noqa: E402
from benchmarks.runs.training_step.setting import SMALL, Setting  # noqa: E402
from benchmarks.runs.training_step.sides import Side  # noqa: E402

RESULT = "training_step_cpu"
PARTS = ("dpo", "mdpo", "memory", "best", "questions", "features", "growth", "loading", "profile")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--part",
        choices=PARTS,
        action="append",
        help="measure this only and put it into the result file; may be repeated",
    )
    parser.add_argument("--repeats", type=int, help="turns that count, after one warm-up (default 3, small 1)")
    parser.add_argument(
        "--processor-time", action="store_true", help="seconds of processor time, for a machine that is shared; writes nothing"
    )
    parser.add_argument("--memory-of", help="print the peak bytes above the model of a side and setting (JSON), and stop")
    add_place(parser)
    arguments = parser.parse_args(argv)
    if arguments.memory_of:
        wanted = json.loads(arguments.memory_of)
        print(parts.memory_of(Side(**wanted["side"]), Setting(**wanted["setting"])))
        return
    console = Console()
    bench = parts.Bench(
        setting=SMALL if arguments.small else Setting(),
        repeats=arguments.repeats or (1 if arguments.small else 3),
        progress=lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True),
        clock=time.process_time if arguments.processor_time else time.perf_counter,
        small=arguments.small,
    )
    place = place_of(arguments)
    chosen = [name for name in PARTS if name in (arguments.part or PARTS)]
    keep = not arguments.processor_time
    result = _measured_before(bench, place) if keep and arguments.part else {}
    if "best" in chosen and "memory" not in (*chosen, *result):
        chosen.insert(0, "memory")
    result |= {"machine": machine(), "setting": dataclasses.asdict(bench.setting)}
    for name in chosen:
        console.rule(name)
        begun = time.monotonic()
        part = profiled.profile if name == "profile" else getattr(parts, name)
        result[name] = part(bench, *([result["memory"]] if name == "best" else []))
        result.setdefault("minutes", {})[name] = (time.monotonic() - begun) / 60
        if keep:
            # Part by part, so that a kill loses no more than one.
            place.result(RESULT, result)
            place.section("docs/results.md", "training_step", f"{text_of(result)}\n\n{_where(result)}")
            if place.committed:
                readme.write()
    console.print(Markdown(text_of(result)))
    console.print(f"{sum(result['minutes'][name] for name in chosen):.1f} minutes")


def _measured_before(bench: parts.Bench, place: Place) -> dict[str, Any]:
    """The parts in the result file, where they are of this machine and setting."""
    path = place.folder / f"{RESULT}.json"
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    same = before.get("machine") == machine() and before.get("setting") == dataclasses.asdict(bench.setting)
    return before if same else {}


def _where(result: dict[str, Any]) -> str:
    on = result["machine"]
    packages = ", ".join(f"{name} {on['packages'][name]}" for name in ("torch", "transformers", "peft", "trl"))
    return f"{on['cpu']}, {on['threads']} threads, {packages}; float32, random weights."


if __name__ == "__main__":
    main()
