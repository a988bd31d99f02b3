"""Everything that wants a GPU, in order of worth, in two commands of at most five minutes each and without network: `make gpu`.

    python benchmarks/gpu --part 1                # is every kernel right, how fast are heads and attention; into $OUT, or build/gpu
    python benchmarks/gpu --part 2                # steps of 7B models; candidates, for tiles.json and choice_<gpu>.json; accuracy, sanitizer
    python benchmarks/gpu                         # both
    python benchmarks/gpu --dry-run               # the phases, their times and their commands
    python benchmarks/gpu --device cpu --small    # every phase on tiny inputs, to see that it runs

Nothing has to be installed: it runs from the source tree with torch, triton, numpy and pytest, and builds with nvcc, pybind11 and ninja.
A phase that fails or runs out of its time is reported, the next one runs, and the exit status is 1 at the end. What a phase leaves of its
time the next ones may use. Begun again with the same folder, GPU and code, what has passed is not run again, but for the environment and the
build; `--again` runs all. MMDPO_MEASURED=build/gpu then has backend "auto" and the Triton kernels take what was fastest on that GPU. Peers
that the machine lacks are taken from build/gpu_peers, where `make gpu-peers` has laid them.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    # As a script, this folder would come first, and nothing in it is meant to be imported by its bare name.
    sys.path[0] = str(ROOT)

from benchmarks.gpu import peers  # noqa: E402 - found by the path above
from benchmarks.gpu.outcomes import Outcome, earlier, fingerprint, keep  # noqa: E402

# Of all ops; those of each are in its row of the table of ops.
TESTS = ("test_properties", "test_choice")
# Of a phase's output, its end stays in the log.
LOG_CHARACTERS = 1 << 20
# Seconds to end in after an interruption: pytest waits ten for its processes before it writes its report.
GRACE = 15
# As in benchmarks/gpu/sanitize_cases.py, which imports torch.
SANITIZED = (
    "tree, mass",
    "tree, softcap, window",
    "mass",
    "mass, mean, softcap, window",
    "mass, tokens",
    "head",
    "head, softcap, statistics",
    "loss",
)
# As in mmdpo_kernels/backends/measured.py, which imports torch.
MEASURED = "MMDPO_MEASURED"
# What is compiled at its first use.
COMPILED = ("auto", "triton", "triton, no mass", "flex", "FlexAttention")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What the phases are run with."""

    device: str
    small: bool
    folder: Path
    """Where results go, flat."""

    @property
    def scratch(self) -> Path:
        return ROOT / "build" / "gpu_scratch"


class LeftOut(Exception):  # noqa: N818 - an answer, not an error
    """A phase has nothing to do here; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One step. Its commands run at the same time."""

    name: str
    seconds: float
    commands: Callable[[Plan, float], Sequence[Sequence[str]]]
    """Plan and seconds at hand -> argument lists. Raises `LeftOut`."""
    parts: tuple[int, ...] = (1, 2)


def _module(name: str, *arguments: str) -> list[str]:
    return [sys.executable, "-m", name, *arguments]


def _environment(plan: Plan, seconds: float) -> list[list[str]]:
    return [_module("benchmarks.gpu.environment")]


def _build(plan: Plan, seconds: float) -> list[list[str]]:
    # A trial leaves the extension in use alone.
    where = ["--build-lib", str(plan.scratch / "lib")] if plan.small else ["--inplace"]
    return [[sys.executable, "setup.py", "build_ext", *where, "--build-temp", str(plan.scratch / "objects")]]


def test_names() -> list[str]:
    """First those that compile most: one of each op, then the next of each."""
    from mmdpo_kernels.backends.ops_table import OPS

    turns = zip_longest(*(op.gpu_tests for op in OPS.values()))
    return [TESTS[0], *(name for turn in turns for name in turn if name is not None), *TESTS[1:]]


def compiled_cases() -> dict[str, tuple[tuple[str, ...], ...]]:
    """Per op the cases in which something is compiled at its first use, a process for each group."""
    from benchmarks.kernels import ops

    return {name: module.COMPILED for name, module in ops.modules().items() if hasattr(module, "COMPILED")}


def _tests(plan: Plan, seconds: float) -> list[list[str]]:
    names = ("test_attention_mass",) if plan.small else test_names()
    files = [str(path.relative_to(ROOT)) for name in names for path in sorted((ROOT / "tests").rglob(f"{name}.py"))]
    # Most of the time goes into compiling kernels, one core each; neighbours, which compile alike, go to different processes.
    workers = str(max(1, (os.cpu_count() or 1) - 2))
    parallel = ["-n", workers, "--maxschedchunk", "1"] if importlib.util.find_spec("xdist") and not plan.small else []
    report = f"--junitxml={plan.folder / 'tests.xml'}"
    return [_module("pytest", "-q", "-p", "no:cacheprovider", "--durations=15", *parallel, report, *files)]


def _sanitizer(plan: Plan, seconds: float) -> list[list[str]]:
    if plan.device != "cuda":
        raise LeftOut("compute-sanitizer watches CUDA kernels, there are none on the CPU")
    if shutil.which("compute-sanitizer") is None:
        raise FileNotFoundError("compute-sanitizer is not on the PATH")
    options = ("--target-processes", "all", "--error-exitcode", "9", "--print-limit", "30")
    cases = _module("benchmarks.gpu.sanitize_cases", "--device", plan.device)
    return [["compute-sanitizer", "--tool", tool, *options, *cases] for tool in ("memcheck", "racecheck")]


def _kernels_run(plan: Plan, seconds: float) -> list[list[str]]:
    # At once, since each compiles; the sanitizer then finds everything compiled.
    return [_module("benchmarks.gpu.sanitize_cases", "--device", plan.device, "--case", name) for name in SANITIZED]


def _compile(plan: Plan, seconds: float) -> list[list[str]]:
    if plan.device != "cuda":
        raise LeftOut("kernels are compiled for a GPU")
    commands = []
    for op, groups in compiled_cases().items():
        for number, names in enumerate(groups):
            folder = plan.scratch / f"{op}_{number}"
            chosen = [f"--case={name}" for name in names] + [f"--contestant={name}" for name in COMPILED]
            commands.append(_module("benchmarks", op, *chosen, "--check", "--output", str(folder)))
    return commands


def _benchmarks(plan: Plan, seconds: float) -> list[list[str]]:
    small = ["--small", "--repeats", "1", "--no-memory"] if plan.small else []
    # A compilation that has begun is waited for.
    options = ["--device", plan.device, "--output", str(plan.folder), "--seconds", str(max(5, seconds - 25)), *small]
    return [_module("benchmarks", *options)]


def _accuracy(plan: Plan, seconds: float) -> list[list[str]]:
    options = ["--device", plan.device, "--output", str(plan.folder), "--seconds", str(max(5, seconds - 15))]
    # Interpreted kernels would take the phase's whole time.
    return [[*_other("kernels.accuracy"), *options, *_small(plan), *(["--backends", "reference"] if plan.small else [])]]


def _tiles(plan: Plan, seconds: float) -> list[list[str]]:
    if plan.device != "cuda":
        raise LeftOut("tiles of interpreted kernels have no speed")
    return [
        _module(
            "benchmarks.kernels.sweep_tiles", "--output", str(plan.folder), "--seconds", str(max(5, seconds - 15)), *_small(plan)
        )
    ]


def _whole_step(plan: Plan, seconds: float) -> list[list[str]]:
    # Small, one model stands for all: the others have their tests.
    tiny = ["--small", "--shape", "LLaVA-1.5-7B", "--method", "dpo"] if plan.small else []
    where = ["--device", plan.device, "--output", str(plan.folder), "--resume", "--seconds", str(max(5, seconds - 15))]
    return [[*_other("runs.whole_shapes"), *where, *tiny]]


def _choices(plan: Plan, seconds: float) -> list[list[str]]:
    options = ["--device", plan.device, "--repeats", "3", "--output", str(plan.folder), "--seconds", str(max(5, seconds - 15))]
    command = [*_other("kernels.choose_backends"), *options, *_small(plan)]
    found = plan.folder / "tiles.json"
    if not found.exists():
        return [command]
    # With the tiles that calls will take, and no earlier choice beside them, which would stand for the table's.
    alone = plan.scratch / "measured"
    alone.mkdir(parents=True, exist_ok=True)
    shutil.copy(found, alone)
    return [["env", f"{MEASURED}={alone}", *command]]


def _small(plan: Plan) -> list[str]:
    return ["--small"] if plan.small else []


def _other(module: str) -> list[str]:
    return _module(f"benchmarks.{module}")


PHASES = (
    Phase(name="environment", seconds=15, commands=_environment),
    Phase(name="build", seconds=75, commands=_build),
    Phase(name="kernels run", seconds=30, commands=_kernels_run, parts=(1,)),
    Phase(name="tests", seconds=60, commands=_tests, parts=(1,)),
    Phase(name="compile and check", seconds=40, commands=_compile, parts=(1,)),
    Phase(name="benchmarks", seconds=80, commands=_benchmarks, parts=(1,)),
    Phase(name="whole step", seconds=75, commands=_whole_step, parts=(2,)),
    Phase(name="tiles", seconds=50, commands=_tiles, parts=(2,)),
    Phase(name="choices", seconds=35, commands=_choices, parts=(2,)),
    Phase(name="accuracy", seconds=25, commands=_accuracy, parts=(2,)),
    Phase(name="sanitizer", seconds=25, commands=_sanitizer, parts=(2,)),
)
ALWAYS = ("environment", "build")
"""Phases that are run again whatever an earlier command has done: a machine may be another one, a build finds what is built."""


def run_phase(phase: Phase, plan: Plan, seconds: float) -> Outcome:
    """Run the phase's commands at once, and end them when their time is over."""
    begun = time.monotonic()

    def outcome(state: str, note: str = "", output: str = "") -> Outcome:
        return Outcome(name=phase.name, state=state, note=note, seconds=time.monotonic() - begun, output=output)

    if seconds <= 0:
        return outcome("out of time", "nothing was left for it")
    try:
        commands = phase.commands(plan, seconds)
    except LeftOut as answer:
        return outcome("left out", str(answer))
    except OSError as error:
        return outcome("failed", str(error))
    plan.scratch.mkdir(parents=True, exist_ok=True)
    files = [plan.scratch / f"{phase.name.replace(' ', '_')}_{number}.txt" for number in range(len(commands))]
    environment = {
        # Interpreted kernels are not what is asked for, wherever this is called from, nor what was measured before.
        **{name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", MEASURED)},
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"), str(peers.FOLDER)))),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
    }
    started = []
    for command, file in zip(commands, files, strict=True):
        with file.open("w") as sink:
            # A session of its own, so that it ends with all its children.
            started.append(
                subprocess.Popen(
                    command, stdout=sink, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
                )
            )
    late = [process for process in started if not _ends_by(begun + seconds, process)]
    for process in late:  # pytest writes its report when it is interrupted
        os.killpg(process.pid, signal.SIGINT)
    for process in late:
        if not _ends_by(begun + seconds + GRACE, process):
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    output = "".join(
        f"$ {' '.join(command)}\n{file.read_text(errors='replace')[-LOG_CHARACTERS:]}\nexit status {process.returncode}\n"
        for command, file, process in zip(commands, files, started, strict=True)
    )
    if late:
        return outcome("out of time", f"ended after {seconds:.0f} s", output)
    statuses = [process.returncode for process in started]
    return outcome("failed" if any(statuses) else "passed", _telling_line(output) if any(statuses) else "", output)


def _ends_by(end: float, process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(timeout=max(0.1, end - time.monotonic()))
    except subprocess.TimeoutExpired:
        return False
    return True


def _telling_line(output: str) -> str:
    """The last line about a failure, or the last at all."""
    lines = [line.strip() for line in output.splitlines() if line.strip() and not line.startswith("exit status")]
    telling = [line for line in lines if any(word in line for word in ("FAILED", "failed", "Error", "ERROR"))]
    return (telling or lines or [""])[-1][:200].replace("|", "/")


def summary(plan: Plan, outcomes: Sequence[Outcome]) -> str:
    """Markdown: phases, tests, goals, and the tables of the benchmarks."""
    from benchmarks.kernels import page
    from benchmarks.measure import markdown

    rows = [[o.name, o.state, f"{o.seconds:.0f}", o.note] for o in outcomes]
    pieces = ["# GPU run", markdown(["phase", "", "seconds", ""], rows)]
    pieces += [_tests_line(plan.folder / "tests.xml")]
    path = plan.folder / f"ops_{plan.device}.json"
    if path.exists():
        content = json.loads(path.read_text(encoding="utf-8"))
        goals = page.goal_rows(content)
        if goals:
            pieces += ["## Goals", markdown(page.GOAL_COLUMNS, goals)]
        pieces += ["## Benchmarks", page.text_of(content)]
    for outcome in outcomes:
        if outcome.name in ("environment", "whole step", "accuracy", "tiles", "choices") and outcome.output:
            pieces += [f"## {outcome.name.capitalize()}", outcome.output]
    return "\n\n".join(pieces) + "\n"


def _tests_line(path: Path) -> str:
    if not path.exists():
        return "No test report."
    suites = list(ElementTree.parse(path).getroot().iter("testsuite"))
    counts = {name: sum(int(suite.get(name, 0)) for suite in suites) for name in ("tests", "failures", "errors", "skipped")}
    return "Tests: " + ", ".join(f"{count} {name}" for name, count in counts.items())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny inputs and a few tests, to see that everything runs")
    parser.add_argument("--dry-run", action="store_true", help="print the phases and stop")
    parser.add_argument(
        "--phase", action="append", choices=[phase.name for phase in PHASES], help="this phase only; may be repeated"
    )
    parser.add_argument("--part", type=int, choices=(1, 2), help="one of the two commands")
    parser.add_argument("--again", action="store_true", help="also what has passed in the same folder before")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where results go (default $OUT, else build/gpu)")
    arguments = parser.parse_args(argv)
    folder = arguments.output or Path(os.environ.get("OUT") or ROOT / "build" / "gpu")
    plan = Plan(device=arguments.device, small=arguments.small, folder=folder.resolve())
    phases = [
        phase
        for phase in PHASES
        if (not arguments.phase or phase.name in arguments.phase) and (arguments.part is None or arguments.part in phase.parts)
    ]
    if arguments.dry_run:
        for phase in phases:
            print(f"{phase.name}, {phase.seconds:.0f} s")
            try:
                print("".join(f"  {' '.join(command)}\n" for command in phase.commands(plan, phase.seconds)), end="")
            except (LeftOut, OSError) as answer:
                print(f"  {answer}")
        print(f"{sum(phase.seconds for phase in phases):.0f} s at most")
        return 0
    return run_phases(phases, plan, again=arguments.again)


def run_phases(phases: Sequence[Phase], plan: Plan, *, again: bool) -> int:
    """One after the other, with a log and, after each, the summary of this command's and earlier ones'. -> exit status."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    of = fingerprint(ROOT)
    known = {} if again else earlier(plan.folder, of)
    outcomes: list[Outcome] = []
    # With a phase's surplus for the ones after it.
    end = time.monotonic()
    with (plan.folder / "log.txt").open("a" if known else "w", encoding="utf-8") as log:
        for phase in phases:
            passed = known.get(phase.name)
            if passed is not None and passed.state == "passed" and phase.name not in ALWAYS:
                print(f"{phase.name}: passed before, {passed.seconds:.0f} s", flush=True)
                continue
            end += phase.seconds
            print(f"{phase.name} …", flush=True)
            outcome = run_phase(phase, plan, end - time.monotonic())
            outcomes.append(outcome)
            known[phase.name] = outcome
            keep(plan.folder, of, known)
            log.write(f"=== {phase.name}: {outcome.state}, {outcome.seconds:.0f} s {outcome.note}\n{outcome.output}\n")
            log.flush()
            if phase.name == "sanitizer" and outcome.output:
                (plan.folder / "sanitizer.txt").write_text(outcome.output, encoding="utf-8")
            print(f"{phase.name}: {outcome.state}, {outcome.seconds:.0f} s {outcome.note}", flush=True)
            # After each phase, so that a kill loses no more than one.
            _write_summary(plan, known)
    print(f"\n{_write_summary(plan, known).split('## Benchmarks')[0]}\nresults: {plan.folder}")
    return int(any(outcome.state in ("failed", "out of time") for outcome in outcomes))


def _write_summary(plan: Plan, known: Mapping[str, Outcome]) -> str:
    order = [phase.name for phase in PHASES]
    text = summary(plan, sorted(known.values(), key=lambda outcome: order.index(outcome.name)))
    (plan.folder / "summary.md").write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    sys.exit(main())
