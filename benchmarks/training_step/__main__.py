"""Command line of the training-step benchmark; see the package."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import time
import warnings

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
warnings.filterwarnings("ignore", category=FutureWarning)

from rich.console import Console  # noqa: E402
from rich.markdown import Markdown  # noqa: E402

import benchmarks.training_step as package  # noqa: E402
from benchmarks.measure import machine, write_result, write_section  # noqa: E402
from benchmarks.training_step import parts  # noqa: E402
from benchmarks.training_step.page import text_of  # noqa: E402
from benchmarks.training_step.setting import Setting  # noqa: E402
from benchmarks.training_step.sides import Side  # noqa: E402

PARTS = ("dpo", "mdpo", "memory", "best", "questions", "features", "growth")


def main() -> None:
    parser = argparse.ArgumentParser(description=package.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="measure this only, and write no files; may be repeated")
    parser.add_argument("--repeats", type=int, default=4, help="turns that count, after one warm-up (default 4; long parts half)")
    parser.add_argument("--processor-time", action="store_true", help="seconds of processor time, for a machine that is shared")
    parser.add_argument("--memory-of", help="print the peak bytes above the model of a side and setting (JSON), and stop")
    arguments = parser.parse_args()
    if arguments.memory_of:
        wanted = json.loads(arguments.memory_of)
        print(parts.memory_of(Side(**wanted["side"]), Setting(**wanted["setting"])))
        return
    console = Console()
    started = time.monotonic()
    bench = parts.Bench(
        setting=Setting(),
        repeats=arguments.repeats,
        progress=lambda line: console.print(line, highlight=False, markup=False, soft_wrap=True),
        clock=time.process_time if arguments.processor_time else time.perf_counter,
    )
    chosen = arguments.part or PARTS
    result: dict[str, object] = {"machine": machine(), "setting": dataclasses.asdict(bench.setting), "parts": chosen}
    for name in PARTS:
        if name in chosen or (name == "memory" and "best" in chosen):
            console.rule(name)
            arguments_of = (result["memory"],) if name == "best" else ()
            result[name] = getattr(parts, name)(bench, *arguments_of)
    result["minutes"] = (time.monotonic() - started) / 60
    text = text_of(result)
    console.print(Markdown(text))
    console.print(f"{result['minutes']:.1f} minutes")
    if not arguments.part and not arguments.processor_time:
        console.print(f"written: {write_result('training_step_cpu', result)}")
        write_section("docs/results.md", "training_step", f"{text}\n\n{_where(result)}")


def _where(result: dict[str, object]) -> str:
    on = result["machine"]
    assert isinstance(on, dict)
    packages = ", ".join(f"{name} {on['packages'][name]}" for name in ("torch", "transformers", "peft", "trl"))
    return f"{on['cpu']}, {on['threads']} threads, {packages}; float32, random weights."


if __name__ == "__main__":
    main()
