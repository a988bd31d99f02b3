"""Every op against what a user would pick instead.

    python -m benchmarks                          # all ops and cases on the best device; results/ops_<device>.json and docs/kernels.md
    python -m benchmarks attention_mass --case rows --repeats 15
    python -m benchmarks --small --check          # every result against float64, nothing timed
    python -m benchmarks --tables                 # docs/kernels.md, its charts and README's table again from the committed JSON

A contestant is checked against a float64 reference before it is timed; with a wrong result it has no time. Contestants take turns in
one process. On a GPU times are of the GPU alone, with an empty L2 cache; the time of a whole call stands beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
warnings.filterwarnings("ignore", category=FutureWarning)

import torch  # noqa: E402

from benchmarks.kernels import page, registry  # noqa: E402
from benchmarks.kernels.harness import Setting, measure_ceilings, memory_of, race  # noqa: E402
from benchmarks.measure import RESULTS, ROOT, machine, write_result  # noqa: E402
from benchmarks.progress import show_table, steps  # noqa: E402

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
REPEATS = {"cuda": 15, "cpu": 7}


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 where a backend of ours failed or was wrong."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    if arguments.memory_of:
        print(_memory_of(json.loads(arguments.memory_of)))
        return 0
    if arguments.tables:
        for path in page.write_all():
            print(path.relative_to(ROOT))
        return 0
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU")
    if arguments.repeats is not None and arguments.repeats < 1:
        parser.error(f"--repeats must be at least 1, got {arguments.repeats}")
    dtype = DTYPES[arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    setting = Setting(
        device=device,
        dtype=dtype,
        size="small" if arguments.small else device.type,
        repeats=arguments.repeats or REPEATS[device.type],
        check_only=arguments.check,
        memory=arguments.memory,
        deadline=time.monotonic() + arguments.seconds,
    )
    folder = _folder(arguments)
    try:
        cases = registry.cases(arguments.ops, arguments.case, setting.size)
        _check_contestants(arguments.contestant)
        folder.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    result = {"machine": machine(), "device": device.type, "dtype": str(dtype).removeprefix("torch."), "size": setting.size}
    result["cases"] = _others(folder, result, cases)
    ceilings = measure_ceilings(device, dtype, small=arguments.small)
    result["ceilings"] = {"flops_per_second": ceilings.flops_per_second, "bytes_per_second": ceilings.bytes_per_second}
    measured: list[dict[str, Any]] = []
    with steps(len(cases)) as progress:
        for case in cases:
            left_out = "out of time" if time.monotonic() > setting.deadline else case.unfit(device)
            if left_out:
                progress.step(f"{case.op} {case.name}: left out, {left_out}")
                continue
            contestants = [c for c in registry.contestants(case.op) if not arguments.contestant or c.name in arguments.contestant]
            begun = time.monotonic()
            measured.append(race(case, contestants, setting, ceilings, progress.say))
            progress.step(f"{case.op} {case.name}: {time.monotonic() - begun:.0f} s")
            # Case by case, so that a kill loses no more than one.
            found = {**result, "cases": _in_order([*result["cases"], *measured])}
            path = write_result(f"ops_{device.type}", found, folder)
    for entry in measured:
        show_table(page.title(entry), *page.table(entry))
    if not measured:
        return 1
    rows = page.goal_rows(found)
    if rows:
        show_table("Goals", page.GOAL_COLUMNS, rows)
    print(f"written: {path}")
    if folder == RESULTS:
        page.write_all()
    return 1 if _faults(measured) else 0


def _folder(arguments: argparse.Namespace) -> Path:
    """Where the result goes: to the committed ones only what may stand in their place."""
    part = arguments.small or arguments.check or arguments.contestant or arguments.dtype
    return arguments.output or (ROOT / "build" / "benchmarks" if part else RESULTS)


def _check_contestants(names: list[str]) -> None:
    """Raises ValueError where no op has a contestant of such a name."""
    known = {contestant.name for op in registry.all_cases() for contestant in registry.contestants(op)}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"no contestant is called {', '.join(unknown)}; there are {'; '.join(sorted(known))}")


def _faults(measured: list[dict[str, Any]]) -> list[str]:
    """Backends of ours that failed or gave a wrong result."""
    faults = [
        f"{entry['op']} {entry['case']}: {name} {kind}: {found[kind]}"
        for entry in measured
        for name, found in entry["contestants"].items()
        for kind in ("wrong", "failed")
        if found["ours"] and kind in found
    ]
    for fault in faults:
        print(fault, file=sys.stderr)
    return faults


def _others(folder: Path, result: dict[str, Any], cases: list[Any]) -> list[dict[str, Any]]:
    """Cases in the result file that this run does not measure, where they are still there and of this machine and size."""
    path = folder / f"ops_{result['device']}.json"
    before: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if any(before.get(name) != result[name] for name in ("machine", "dtype", "size")):
        return []
    others = {*_order()} - {(case.op, case.name) for case in cases}
    return [entry for entry in before["cases"] if (entry["op"], entry["case"]) in others]


def _in_order(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(entries, key=lambda entry: _order().index((entry["op"], entry["case"])))


def _order() -> list[tuple[str, str]]:
    return [(op, case.name) for op, cases in registry.all_cases().items() for case in cases]


def _memory_of(wanted: dict[str, str]) -> int:
    [case] = registry.cases([wanted["op"]], [wanted["case"]])
    [contestant] = [c for c in registry.contestants(case.op) if c.name == wanted["contestant"]]
    return memory_of(case, contestant, getattr(torch, wanted["dtype"].removeprefix("torch.")), wanted["size"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="op", help=f"any of {', '.join(registry.all_cases())} (default all)")
    parser.add_argument("--case", action="append", default=[], help="this case only; may be repeated")
    parser.add_argument(
        "--contestant", action="append", default=[], help="this contestant only, written to build/benchmarks; may be repeated"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="written to build/benchmarks (default bfloat16 on cuda, float32 on cpu)")
    parser.add_argument("--repeats", type=int, help="turns that count, after one warm-up (default 15 on cuda, 7 on cpu)")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing new after this many seconds")
    parser.add_argument(
        "--small", action="store_true", help="tiny inputs, to see that everything runs; written to build/benchmarks"
    )
    parser.add_argument("--check", action="store_true", help="compare results with float64 and time nothing")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="measure peak memory (default)")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where ops_<device>.json goes (default benchmarks/results)")
    parser.add_argument(
        "--tables", action="store_true", help="write docs/kernels.md, its charts and README's table again from the JSON, and stop"
    )
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
