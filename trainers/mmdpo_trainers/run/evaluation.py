"""`mmdpo evaluate` without a run: a model, or an adapter beside its base, on prompts with answers of the user's own.

It is the stage evaluate in a folder of its own, so a killed command continues, and several processes share the work.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.data.records import Moment
from mmdpo_trainers.errors import ConfigError, StageError
from mmdpo_trainers.files.fingerprint import content_hash
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.processes import ranks
from mmdpo_trainers.processes.progress import Progress
from mmdpo_trainers.report.benchmarks import benchmark_summary
from mmdpo_trainers.report.contents import label_of
from mmdpo_trainers.report.intervals import paired_change
from mmdpo_trainers.run.pipeline import held, run_stage, set_threads
from mmdpo_trainers.run.tables import benchmark_tables
from mmdpo_trainers.stages.benchmarks import check_benchmarks
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder


def folder_for(given: str) -> Path:
    """Where an evaluation of an adapter or a model works, if nobody says: in a folder named by it and its content."""
    path = Path(given).expanduser()
    digest = f"-{content_hash(path)[:8]}" if path.is_dir() else ""
    return Path("runs") / f"evaluate-{path.name}{digest}"


def evaluate(config: RunConfig, *, adapter: Path | None, restart: bool = False, as_json: bool = False) -> dict[str, Any]:
    """Answer `evaluate.input` and `evaluate.benchmarks` with the model, and with `adapter` on it; print and return figures with 95 % intervals.

    Raises MmdpoError as the stage does.
    """
    if not config.evaluate.input and not config.evaluate.benchmarks:
        raise ConfigError("evaluate: give prompts with answers (.jsonl) with --input, or published benchmarks with --benchmarks")
    if adapter is not None and not any((adapter / name).is_file() for name in ("adapter_config.json", "config.json")):
        raise StageError(f"--adapter {adapter}: expected the folder of a PEFT adapter, or of a whole model; there is neither")
    run = RunFolder(config.run_path)
    set_threads(config.threads)
    # What may not fit comes first.
    moments: tuple[Moment, ...] = ("before",) if adapter is None else ("after", "before")
    contexts = {moment: _context(run, config, moment, adapter) for moment in moments}
    check_benchmarks(contexts["before"])
    with held(run), ranks.failing():
        for context in contexts.values():
            if restart:
                ranks.on_rank_0(functools.partial(run.remove, context.name))
            run_stage(context)
    if not ranks.is_rank_0():
        return {}
    folders = {moment: run.path / context.name for moment, context in contexts.items()}
    found: dict[str, Any] = {
        "model": config.model,
        "adapter": None if adapter is None else str(adapter),
        "input": config.evaluate.input,
        "match": config.evaluate.match,
        "folder": str(run.path),
        "accuracy": compared(folders, run) if config.evaluate.input else {},
    }
    if benchmarks := benchmark_summary({str(moment): folders[moment] for moment in reversed(folders)}):
        found["benchmarks"] = benchmarks
    if as_json:
        print(json.dumps(found, indent=2))
        return found
    console = Console()
    for each in [*([table(found)] if found["accuracy"] else []), *benchmark_tables(found.get("benchmarks") or {})]:
        console.print(each)
    return found


def _context(run: RunFolder, config: RunConfig, moment: Moment, adapter: Path | None) -> StageContext:
    own = Path(config.evaluate.input).stem if config.evaluate.input else "benchmarks"
    return StageContext(run=run, config=config, stage="evaluate", moment=moment, own=own, adapter=adapter, progress=Progress())


def compared(folders: Mapping[Moment, Path], run: RunFolder) -> dict[str, dict[str, Any]]:
    """By group of questions: `questions`, `base` and `adapter` ({accuracy, interval}), and `change`, paired by question."""
    summaries = {moment: run.summary(folder.relative_to(run.path).as_posix()) for moment, folder in folders.items()}
    answers = {moment: list(read_jsonl(folder / "answers.jsonl")) for moment, folder in folders.items()}
    found: dict[str, dict[str, Any]] = {}
    for name, count in summaries["before"]["counts"].items():
        row: dict[str, Any] = {"questions": count}
        for moment, label in (("before", "base"), ("after", "adapter")):
            if moment in summaries:
                summary = summaries[moment]
                row[label] = {"accuracy": summary["accuracy"][name], "interval": summary["intervals"][name]}
        if "after" in answers:
            outcomes = (
                {
                    str(each["id"]): bool(each["correct"])
                    for each in answers[moment]
                    if (each.get("group") or each["format"]) == name
                }
                for moment in ("before", "after")
            )
            change = paired_change(*outcomes)
            row["change"] = None if change is None else {"value": change.value, "interval": [change.low, change.high]}
        found[name] = row
    return found


def table(found: Mapping[str, Any]) -> Table:
    """A row a group of questions, with the interval below each figure."""
    both = found["adapter"] is not None
    shown = Table(title=f"right answers, compared by {found['match']}, with 95 % intervals", title_justify="left")
    shown.add_column("questions")
    for name in ("number", "base", *(("adapter", "change") if both else ())):
        shown.add_column(name, justify="right", no_wrap=True)
    for name, row in found["accuracy"].items():
        shares = [f"{row[key]['accuracy']:.3f}\n{_interval(row[key]['interval'])}" for key in ("base", "adapter") if key in row]
        change = row.get("change")
        said = [] if not both else ["-" if change is None else f"{change['value']:+.3f}\n{_interval(change['interval'], '+')}"]
        shown.add_row(label_of(name), f"{row['questions']:,}", *shares, *said)
    return shown


def _interval(interval: tuple[float, float], sign: str = "") -> str:
    return f"{interval[0]:{sign}.3f} to {interval[1]:{sign}.3f}"
