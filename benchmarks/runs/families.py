"""Checks of every model family on a tiny checkpoint of it, into docs/families.md.

    python -m benchmarks.runs.families                   # results/families.json and the table in docs/families.md
    python -m benchmarks.runs.families llava qwen3_vl    # just these, into build/benchmarks
    python -m benchmarks.runs.families --add glm4v       # this one's row anew, all others as they are in results/families.json

They are those of `mmdpo check`, in float64: what differs is not rounding.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers.utils import is_torchvision_available

from benchmarks.measure import ROOT, add_place, machine, markdown, place_of
from mmdpo_trainers.checks import CHECKS, run_checks
from mmdpo_trainers.checks.command import number, table
from mmdpo_trainers.models.families import CHECKED, FAMILIES, REFUSED
from mmdpo_trainers.models.loading import load_model

# The makers of tiny checkpoints are the tests' own: with weights of every published family there would be nothing to download first.
sys.path.insert(0, str(ROOT / "tests" / "support"))

from tiny_models import TINY  # noqa: E402
from tiny_models.recipes import BY_RECIPE, RECIPES  # noqa: E402

# What has a declaration and a maker of its own first.
ROWS = {**TINY, **{name: maker for name, maker in BY_RECIPE.items() if name not in TINY}}

COLUMNS = ("prompts", "parity", "segments", "mass", "tree", "gradients", "generate", "shared vision", "heads", "unpatch")


def runnable() -> list[str]:
    """The families of `ROWS` that can be checked here: some have an image processor for torchvision only."""
    return [name for name in ROWS if name not in RECIPES or not RECIPES[name].needs_torchvision or is_torchvision_available()]


def check_family(name: str, console: Console) -> dict[str, Any]:
    """The results of one family's checks, and their seconds."""
    with tempfile.TemporaryDirectory() as folder:
        loaded = load_model(ROWS[name](Path(folder) / "model"), device="cpu", dtype=torch.float64)
        start = time.perf_counter()
        found = list(run_checks(loaded))
        seconds = time.perf_counter() - start
        console.print(table(loaded, found))
    return {"checks": [each.as_dict() for each in found], "seconds": seconds}


def rows(families: Mapping[str, Mapping[str, Any]]) -> list[list[str]]:
    """A row a family: the largest difference of each check, or what else came of it."""
    found = []
    for name, result in families.items():
        by_name = {check["name"]: check for check in result["checks"]}
        cells = [_cell(by_name[column]) if column in by_name else "-" for column in COLUMNS]
        found.append([name, *cells, f"{result['seconds']:.1f} s"])
    return found


def _cell(check: Mapping[str, Any]) -> str:
    kind = check["verdict"].split(":")[0]
    if kind == "exact":
        return "exact" if not check["limit"] else number(check["figure"])
    return kind


def text_of(result: Mapping[str, Any]) -> str:
    """The section of docs/families.md."""
    families, on = result["families"], result["machine"]
    reasons: dict[str, list[str]] = {}
    for name, family in families.items():
        for check in family["checks"]:
            if check["verdict"] != "exact":
                reasons.setdefault(f"{check['name']} {check['verdict']}", []).append(name)
    lines = [markdown(["family", *COLUMNS, "time"], rows(families)), ""]
    lines += [f"- {', '.join(names)}: {reason}" for reason, names in reasons.items()]
    packages = ", ".join(f"{name} {on['packages'][name]}" for name in ("torch", "transformers"))
    lines += ["", f"{on['cpu']}, {on['threads']} threads, {packages}; float64, random weights."]
    return "\n".join(lines)


def states() -> str:
    """The section of docs/families.md that lists families by what is known of them."""
    rows = [[name, reason] for name, reason in REFUSED.items()]
    return "\n".join(
        [
            f"Declared: {', '.join(FAMILIES)}.",
            "",
            f"By transformers' conventions, and checked on a tiny checkpoint: {', '.join(CHECKED)}.",
            "",
            "Refused by name:",
            "",
            markdown(["family", "why"], rows),
        ]
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"all by default: {', '.join(ROWS)}")
    parser.add_argument(
        "--add", action="store_true", help="keep the rows of all other families as they are in results/families.json"
    )
    add_place(parser)
    options = parser.parse_args(arguments)
    # Small: the first family alone, since every checkpoint is tiny as it is.
    chosen = options.families or runnable()[: 1 if options.small else None]
    unknown = [name for name in chosen if name not in ROWS]
    if unknown:
        parser.error(f"{unknown[0]}: expected a family among {', '.join(ROWS)}")
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    console = Console()
    place = place_of(options, part=bool(options.families) and not options.add)
    found = {name: check_family(name, console) for name in chosen}
    if place.committed:
        # What is not run now stays: with --add all others, without torchvision the families that need it.
        kept = place.folder / "families.json"
        before = json.loads(kept.read_text(encoding="utf-8"))["families"] if kept.is_file() else {}
        found = {name: found.get(name) or before[name] for name in ROWS if name in found or name in before}
    result = {"checks": list(CHECKS), "families": found}
    console.print(f"written: {place.result('families', result)}")
    place.section("docs/families.md", "families", text_of({"machine": machine(), **result}))
    place.section("docs/families.md", "family_states", states())
    failed = [name for name, family in found.items() if any(check["verdict"].startswith("FAILED") for check in family["checks"])]
    if failed:
        console.print(f"FAILED: {', '.join(failed)}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
