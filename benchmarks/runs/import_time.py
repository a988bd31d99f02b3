"""What `import mmdpo_kernels` takes beyond `import torch`: fresh processes, PyTorch and numpy imported before, the goal at most 0.3 s.

    python -m benchmarks.runs.import_time

Processor seconds are what the import does; seconds on the clock are those of a machine that others may be using. A first process, which
compiles to bytecode, does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from benchmarks.measure import ROOT, add_place, machine, place_of

GOAL = 0.3
PROGRAM = """
import json, sys, time
import numpy, torch
before = len(sys.modules)
clock, processor = time.perf_counter(), time.process_time()
import mmdpo_kernels
print(json.dumps([time.perf_counter() - clock, time.process_time() - processor, len(sys.modules) - before]))
"""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, help="processes that count (default 15, small 1)")
    add_place(parser)
    arguments = parser.parse_args(argv)
    repeats, place = arguments.repeats or (1 if arguments.small else 15), place_of(arguments)
    found = [_imported() for _ in range(repeats + 1)][1:]
    clock, processor, modules = zip(*found, strict=True)
    result = {"goal": GOAL, "seconds": list(clock), "processor_seconds": list(processor), "modules": modules[0]}
    path = place.result("import_time", result)
    text = _markdown({"machine": machine(), **result})
    place.section("docs/results.md", "import_time", text)
    print(f"{text}\nwritten: {path}")


def _imported() -> tuple[float, float, int]:
    """Seconds, processor seconds, and modules that came, of one import."""
    done = subprocess.run([sys.executable, "-c", PROGRAM], check=True, capture_output=True, text=True, cwd=ROOT)
    clock, processor, modules = json.loads(done.stdout)
    return clock, processor, modules


def _markdown(result: dict[str, Any]) -> str:
    on = result["machine"]

    def of(name: str) -> str:
        taken = result[name]
        return f"{statistics.median(taken):.2f} s ({min(taken):.2f} to {max(taken):.2f})"

    return (
        f"`import mmdpo_kernels` after `import torch`, {len(result['seconds'])} fresh processes: {of('processor_seconds')} of a processor, "
        f"{of('seconds')} on the clock; the goal is at most {result['goal']} s. It brings {result['modules']} modules. "
        f"{on['cpu']}, torch {on['packages']['torch']}."
    )


if __name__ == "__main__":
    main()
