"""What recording the attention of all layers costs beside recording that of one: while generating, and in a teacher-forced pass.

    python -m benchmarks.runs.layer_cost            # table, and results/layer_cost_cpu.json
    python -m benchmarks.runs.layer_cost --small    # the same on tiny inputs, into build/benchmarks

The model and prompt of `benchmarks.runs.attention_ratio`: a LLaVA of random weights, 8 layers, five pictures, 1,500 prompt tokens, a 40-token
answer, float32. The stages' own functions are run in turn in one process; processor time is counted, which neighbours on the machine do not
stretch as they do seconds.

- `generate`: nothing is recorded. `generate, one layer`, `generate, all layers`: the middle one, and all with their heads.
- `pass, last layer`, `pass, all layers`: a teacher-forced pass to the last layer. `pass, middle layer`: it ends after the middle one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.measure import add_place, alternate, machine, markdown, place_of, ratios
from benchmarks.runs.attention_ratio import PICTURES, SMALL, Setting, build, prompt_record, with_answer
from mmdpo_trainers.answers.attention_ratios import recorded_answers, resolve_layer
from mmdpo_trainers.answers.transformers_engine import generate_responses
from mmdpo_trainers.models.loaded import LoadedModel

COMPARISONS = {
    "generate, one layer": "generate",
    "generate, all layers": "generate, one layer",
    "pass, all layers": "pass, last layer",
}
GOALS = {"generate, all layers": 1.05, "pass, all layers": 1.05}


def ways_of(loaded: LoadedModel, record: dict[str, Any]) -> dict[str, Callable[[], dict[str, Any]]]:
    """What is timed; the ones that record give a recording."""
    middle, last = resolve_layer(loaded.image_layers), loaded.image_layers[-1]
    how = {"regions": "box", "drop_first_row": False}

    def generate(layer: Any = "none") -> dict[str, Any]:
        settings = None if layer == "none" else {**how, "layer": layer}
        [answer] = generate_responses(loaded, [record], max_new_tokens=record["answer_tokens"], record=settings)
        return dict(answer.get("recorded", {}))

    def forced(layer: Any) -> dict[str, Any]:
        return recorded_answers(loaded, [{**record, "ended": False}], layer=layer, regions="box", drop_first_row=False)[0]

    return {
        "generate": generate,
        "generate, one layer": lambda: generate(middle),
        "generate, all layers": lambda: generate("all"),
        "pass, middle layer": lambda: forced(middle),
        "pass, last layer": lambda: forced(last),
        "pass, all layers": lambda: forced("all"),
    }


def check(ways: dict[str, Callable[[], dict[str, Any]]]) -> None:
    """All recordings say the same of a layer. Raises SystemExit where they do not."""
    every = np.array(ways["pass, all layers"]()["attention"])
    found = {
        "generate, all layers": (np.array(ways["generate, all layers"]()["attention"]), every),
        "generate, one layer": (np.array(ways["generate, one layer"]()["attention"]), every[len(every) // 2]),
        "pass, middle layer": (np.array(ways["pass, middle layer"]()["attention"]), every[len(every) // 2]),
        "pass, last layer": (np.array(ways["pass, last layer"]()["attention"]), every[-1]),
    }
    for name, (one, other) in found.items():
        if not np.allclose(one, other, atol=1e-5):
            raise SystemExit(f"{name} records {one}, the pass of all layers {other}: not comparable")


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, help="turns that count, after one warm-up (default 11, small 1)")
    add_place(parser)
    arguments = parser.parse_args(argv)
    setting = SMALL if arguments.small else Setting()
    console, place = Console(), place_of(arguments)
    loaded = build(setting)
    record = with_answer(loaded, prompt_record(loaded, setting))
    ways = ways_of(loaded, record)
    check(ways)
    seconds = alternate(ways, arguments.repeats or (1 if arguments.small else 11), console.print, clock=time.process_time)
    result = {
        "machine": machine(),
        "setting": {"pictures": PICTURES, **asdict(setting), "dtype": "float32"},
        "processor_seconds": seconds,
        "times": {name: ratios(seconds, name, other) for name, other in COMPARISONS.items()},
    }
    path = place.result("layer_cost_cpu", result)
    table = Table(title="recording all layers")
    for column in COLUMNS:
        table.add_column(column)
    for row in _rows(result):
        table.add_row(*row)
    console.print(table)
    place.section("docs/results.md", "layer_cost", _markdown(result))
    console.print(f"written: {path}")


COLUMNS = ["way", "processor seconds (median)", "times (min to max)", "of", "goal"]


def _rows(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name, taken in result["processor_seconds"].items():
        row = [name, f"{statistics.median(taken):.2f}"]
        if name in COMPARISONS:
            times = result["times"][name]
            goal = f"at most {GOALS[name]}" if name in GOALS else ""
            row += [f"{times['median']:.3f} ({times['min']:.3f} to {times['max']:.3f})", COMPARISONS[name], goal]
        rows.append(row + [""] * (len(COLUMNS) - len(row)))
    return rows


def _markdown(result: dict[str, Any]) -> str:
    on = result["machine"]
    packages = ", ".join(f"{name} {on['packages'][name]}" for name in ("torch", "transformers"))
    return f"{markdown(COLUMNS, _rows(result))}\n\n{on['cpu']}, threads: {on['threads']}, {packages}; float32, random weights."


if __name__ == "__main__":
    main()
