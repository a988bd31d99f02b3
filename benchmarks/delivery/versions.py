"""`make versions`: core tests on the installed wheel, not the checkout, with other versions of what it stands on.

    python -m benchmarks.delivery.versions                            # all rows; what is done already stays, so it can be stopped
    python -m benchmarks.delivery.versions --row "triton 3.6" --again
    python -m benchmarks.delivery.versions --list

A row has a virtual environment of its own below build/versions: the wheel with [train] and the row's versions, installed by pip's own
rules. What all rows have in common lies once, in an environment behind them on the path. Tests are copied to a folder without the
packages, and one of them looks where these were imported from. Needs the wheels of `make wheels`.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks.delivery import environments, without_torch
from benchmarks.delivery.environments import PROJECT, Failed, run
from benchmarks.delivery.page import versions_table
from benchmarks.delivery.rows import ROWS, SUITES, Row
from benchmarks.measure import ROOT, machine, place_of
from benchmarks.progress import steps

BUILD = ROOT / "build" / "versions"
SUITE = BUILD / "suite"
TEST_TOOLS = ["pytest", "hypothesis", "num2words"]
INI = """[pytest]
pythonpath = . tests/support
addopts = -q -m "not nightly" -p no:cacheprovider
markers =
"""
# Goes into the suite, with the mark by which some of it is chosen: what the other tests import is what is installed.
INSTALLED = """
import sys
from pathlib import Path

import mmdpo_kernels
import mmdpo_trainers
import pytest


@pytest.mark.smoke
def test_the_packages_are_the_installed_ones():
    for package in (mmdpo_kernels, mmdpo_trainers):
        folder = Path(package.__file__).parents[1]
        assert folder.name == "site-packages" and folder.is_relative_to(sys.prefix), folder
"""
SAY_VERSIONS = """
import json, sys
from importlib import metadata
print(json.dumps({name: metadata.version(name) for name in sys.argv[1:]}))
"""
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": ""}
NAMES = ("torch", "triton", "transformers", "peft", "accelerate")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 1 where a row failed."""
    arguments = _parser().parse_args(argv)
    if arguments.list:
        print("\n".join(f"{row.name}: {row.reason or ', '.join(row.suites)}" for row in ROWS))
        return 0
    unknown = set(arguments.row or ()) - {row.name for row in ROWS}
    if unknown:
        raise SystemExit(f"no row is called {', '.join(sorted(unknown))}; there are: {', '.join(row.name for row in ROWS)}")
    pythons = environments.interpreters([*arguments.python, *environments.PYTHONS, sys.executable])
    kept = BUILD / "rows.json"
    done: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8")) if kept.is_file() else {}
    copy_suite()
    with steps(len(ROWS)) as progress:
        for row in ROWS:
            before = done.get(row.name, {})
            if arguments.row and row.name not in arguments.row:
                continue
            wheel = wheel_of(row)
            key = _fingerprint(row, wheel)
            if before.get("key") == key and before["state"] == "passed" and not arguments.again:
                progress.step(f"{row.name}: {before['state']}, as before")
                continue
            progress.say(row.name)
            done[row.name] = {"key": key, **result_of(row, wheel, pythons)}
            kept.write_text(json.dumps(done, indent=2) + "\n", encoding="utf-8")
            progress.step(f"{row.name}: {done[row.name]['state']} {done[row.name]['note']}".rstrip())
    rows = [done[row.name] for row in ROWS if row.name in done]
    place = place_of(arguments, part=len(rows) < len(ROWS))
    result = {"machine": machine(), "rows": [{name: value for name, value in row.items() if name != "key"} for row in rows]}
    place.result("versions", result)
    place.section("docs/installing.md", "versions", versions_table(result))
    return 1 if any(row["state"] == "failed" for row in rows) else 0


def copy_suite() -> None:
    """The tests without the packages that they test, below build/versions."""
    shutil.rmtree(SUITE, ignore_errors=True)
    for name in ("tests", "benchmarks"):  # some tests say what the committed results hold
        shutil.copytree(ROOT / name, SUITE / name, ignore=shutil.ignore_patterns("__pycache__"))
    markers = "\n".join(f"    {marker}" for marker in PROJECT["tool"]["pytest"]["ini_options"]["markers"])
    (SUITE / "pytest.ini").write_text(INI + markers + "\n", encoding="utf-8")
    (SUITE / "tests" / "test_installed.py").write_text(INSTALLED, encoding="utf-8")


def wheel_of(row: Row) -> Path:
    """The wheel in dist/ for a row's Python and kind."""
    tag = f"cp{row.python.replace('.', '')}"
    local = "+cu*" if row.cuda else ""
    found = sorted((ROOT / "dist").glob(f"mmdpo_kernels-{PROJECT['project']['version']}{local}-{tag}-*.whl"))
    if not found and not row.reason:
        raise SystemExit(
            f"dist/ has no {'CUDA' if row.cuda else 'CPU'} wheel for Python {row.python}, which row {row.name!r} installs: make wheels"
        )
    return found[-1] if found else Path()


def result_of(row: Row, wheel: Path, pythons: dict[str, str]) -> dict[str, Any]:
    """One row: state (passed, failed, not run), a note, versions, numbers of tests, seconds."""
    base = {"name": row.name, "python": row.python, "suites": row.suites, "versions": {}, "tests": {}, "seconds": 0}
    if row.reason:
        return {**base, "state": "not run", "note": row.reason}
    if row.python not in pythons:
        return {**base, "state": "not run", "note": f"no Python {row.python} was found"}
    started = time.perf_counter()
    try:
        found = _loaded(row, wheel, pythons[row.python]) if "load" in row.suites else _tested(row, wheel, pythons[row.python])
    except Failed as error:
        return {**base, "state": "failed", "note": str(error)[-2000:]}
    return {**base, **found, "seconds": round(time.perf_counter() - started)}


def _loaded(row: Row, wheel: Path, program: str) -> dict[str, Any]:
    """Installed alone: without torch there is no importing it, but the compiled half computes on what NumPy has."""
    python = environments.make(program, BUILD / _folder(row), ["numpy"])
    environments.pip(python, ["--no-deps", "--force-reinstall", wheel])
    run([python, Path(without_torch.__file__)], folder=SUITE)
    return {"state": "passed", "note": "", "tests": {"passed": 1, "failed": 0, "skipped": 0}}


def _tested(row: Row, wheel: Path, program: str) -> dict[str, Any]:
    python = environment_of(row, wheel, program)
    versions = json.loads(run([python, "-c", SAY_VERSIONS, *NAMES], environment=QUIET, folder=SUITE))
    for name, wanted in row.pins.items():
        if name in versions and versions[name].partition("+")[0] != wanted:
            raise Failed(f"{name} {versions[name]} was installed, not {wanted}")
    tests, notes = Counter({"passed": 0, "failed": 0, "skipped": 0}), []
    for suite in row.suites:
        report = BUILD / f"{_folder(row)}_{suite}.xml"
        report.unlink(missing_ok=True)
        command = [python, "-m", "pytest", f"--junitxml={report}", "tests/test_installed.py", *SUITES[suite]]
        try:
            run(command, environment=QUIET, folder=SUITE)
        except Failed as error:
            notes.append(str(error)[-2000:])
        tests.update(_counts(report))
    state = "failed" if notes or not tests["passed"] else "passed"
    return {"state": state, "note": "\n".join(notes), "versions": versions, "tests": dict(tests)}


def environment_of(row: Row, wheel: Path, program: str) -> Path:
    """The Python of a row's environment, made where it is not there yet; the wheel is always installed anew."""
    needs = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["train"], *TEST_TOOLS]
    common = environments.make(program, BUILD / f"common{row.python}", needs)
    python = environments.make(program, BUILD / _folder(row))
    behind = run([common, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip()
    own = Path(run([python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]).strip())
    (own / "common.pth").write_text(behind + "\n", encoding="utf-8")
    constraints = BUILD / f"{_folder(row)}.txt"
    constraints.write_text(constraints_of(row), encoding="utf-8")
    environments.pip(python, ["--no-deps", "--force-reinstall", wheel], constrained=False)
    pins = [f"{name}=={version}" for name, version in row.pins.items()]
    environments.pip(python, [f"{wheel}[train]", *pins, "-c", constraints], constrained=False)
    return python


def constraints_of(row: Row) -> str:
    """constraints.txt with the row's versions in the place of its own."""
    lines = [(ROOT / name).read_text(encoding="utf-8").splitlines() for name in ("constraints.txt", *row.constraints)]
    exact = {_name(line): line for line in sum(lines, []) if "==" in line and not line.startswith("#")}
    exact.update({_name(name): f"{name}=={version}" for name, version in row.pins.items()})
    return "\n".join(exact.values()) + "\n"


def _name(requirement: str) -> str:
    return requirement.partition("==")[0].lower().replace("_", "-")


def _counts(report: Path) -> dict[str, int]:
    if not report.is_file():
        return {"passed": 0, "failed": 0, "skipped": 0}
    (suite,) = ElementTree.parse(report).getroot().iter("testsuite")
    total, failures, errors, skipped = (int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped"))
    return {"passed": total - failures - errors - skipped, "failed": failures + errors, "skipped": skipped}


def _folder(row: Row) -> str:
    return "".join(letter if letter.isalnum() or letter == "." else "_" for letter in row.name)


def _fingerprint(row: Row, wheel: Path) -> str:
    """Changes with the row, the wheel and the tests: then it is run again."""
    words = [word for name in row.suites for word in SUITES[name]]
    digest = hashlib.sha256(json.dumps([asdict(row), words, INSTALLED]).encode())
    tests = {ROOT / word for word in words if word.endswith(".py")}
    for path in [wheel, *sorted(tests), *sorted((ROOT / "tests" / "support").rglob("*.py"))]:
        if path.is_file():
            digest.update(path.read_bytes())
    return digest.hexdigest()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.delivery.versions", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.set_defaults(small=False)
    parser.add_argument("--row", nargs="+", metavar="NAME", help="those rows alone, beside what is done already")
    parser.add_argument("--again", action="store_true", help="also what is done already")
    parser.add_argument("--list", action="store_true", help="print the rows")
    parser.add_argument("--python", nargs="+", default=[], metavar="PROGRAM", help="Pythons beside those on the PATH")
    parser.add_argument(
        "--output", type=Path, metavar="FOLDER", help="where the result goes in place of benchmarks/results and the page"
    )
    return parser


if __name__ == "__main__":
    raise SystemExit(main())
