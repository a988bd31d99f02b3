"""`mmdpo calibrate`: whether a model's attention tells its right answers from its wrong ones, at which layer, and settings that follow.

It is the beginning of a run, up to stage score with all layers recorded, and a page about that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console

from mmdpo_trainers.answers.layer_choice import ALL, FILE, verdicts
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.data.left_out import counted
from mmdpo_trainers.errors import DataError, StageError
from mmdpo_trainers.files.atomic import read_json, write_atomic
from mmdpo_trainers.methods import method_named
from mmdpo_trainers.methods.selection import match_of
from mmdpo_trainers.processes import ranks
from mmdpo_trainers.processes.progress import Progress
from mmdpo_trainers.run.pipeline import run_pipeline
from mmdpo_trainers.stages.batches import read_records
from mmdpo_trainers.stages.report import PAGE

LAST = "score"
SECTIONS = ("layers", "ratios", "time")


def calibrate(config: RunConfig, *, restart: str | None = None, console: Console | None = None) -> None:
    """Do, or continue, what a run does up to stage score, and print what came of it. Raises MmdpoError as `run_pipeline` does."""
    console, folder = console or Console(), config.run_path
    _check_answers(config)
    done = (folder / LAST / "summary.json").exists() and restart is None
    run_pipeline(config, until=LAST, restart=restart, progress=Progress(), console=Console(quiet=True))
    if not ranks.is_rank_0():
        return
    curves = read_json(folder / LAST / FILE)
    if done:
        # The stage has said it when it ran.
        from mmdpo_trainers.stages.score import layers_table

        console.print(layers_table(curves))
        for sentence in verdicts(curves):
            console.print(sentence, markup=False, highlight=False, soft_wrap=True)
    console.print(f"\nFor a configuration file:\n\n{settings(curves, config)}", markup=False, highlight=False, soft_wrap=True)
    console.print(_page(config, folder), markup=False, highlight=False, soft_wrap=True)


def _check_answers(config: RunConfig) -> None:
    """Raise DataError for a file of the user's own in which no prompt could say anything."""
    given = config.score.input or config.generate.input
    if given and Path(given).exists():
        records = read_records(Path(given), "records")
        if not any(record["num_images"] > 1 and str(record.get("answer") or "").strip() for record in records):
            raise DataError(
                f"{given}: none of its {counted(len(records), 'record')} has both several pictures and an `answer` to compare the model's with; "
                "add true answers, or let prompts be made from --data"
            )


def settings(curves: Mapping[str, Any], config: RunConfig) -> str:
    """The layer and thresholds as YAML."""
    chosen = curves["chosen"]
    one = len(set(chosen.values())) == 1
    values: dict[str, Any] = {"score": {"layer": chosen[ALL]} if one else {"layer": "best", "best_by": "format"}}
    thresholds = {
        name: {int(count): each["threshold"] for count, each in table.items()}
        for name, table in curves["thresholds"].items()
        if table
    }
    values["select"] = {"match": match_of(config.select), "thresholds": thresholds}
    if not thresholds:
        values["select"].pop("thresholds")
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None)


def _page(config: RunConfig, folder: Path) -> str:
    """Write the page; where it is, or why there is none."""
    from mmdpo_trainers.report.comparison import PageInputs
    from mmdpo_trainers.report.contents import RunContents
    from mmdpo_trainers.report.page import render

    inputs = PageInputs(
        run=RunContents.read(folder),
        method=dataclasses.replace(method_named(config.method), page=SECTIONS),
        title=f"Attention of {Path(config.model).name}",
        config=config.to_dict(),
    )
    try:
        return f"report: {write_atomic(folder / PAGE, render(inputs))}"
    except StageError as error:
        return str(error)
