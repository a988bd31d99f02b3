"""report: one self-contained HTML page about the run, `report.html` in the run folder."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmdpo_trainers.config.stages import STAGES, stage_folders
from mmdpo_trainers.data.records import Moment
from mmdpo_trainers.files.atomic import read_json, write_atomic
from mmdpo_trainers.report.comparison import PageInputs
from mmdpo_trainers.report.contents import RunContents
from mmdpo_trainers.report.heatmaps import heat_maps
from mmdpo_trainers.report.page import render
from mmdpo_trainers.report.plots import require_matplotlib
from mmdpo_trainers.stages.context import StageContext

if TYPE_CHECKING:
    from mmdpo_trainers.models.loaded import LoadedModel

PAGE = "report.html"


def inputs(context: StageContext) -> list[Path]:
    """The files the page shows, as far as they exist: a report of an unfinished run is a report too."""
    run = context.run.path
    arms = sorted(path.name for path in (run / "arms").glob("*"))
    files = [run / folder / name for folder, stage in stage_folders(arms).items() for name in STAGES[stage].shown]
    files += [Path(seed) / "summary.json" for seed in context.options.seeds]
    return [file for file in files if file.is_file()]


def run(context: StageContext) -> dict[str, Any]:
    """Write the page. Raises StageError where matplotlib is missing, before any work is done."""
    require_matplotlib()
    config, contents = context.config, RunContents.read(context.run.path)
    drawn = config.report.heat_maps if "heat_maps" in context.method.page else 0
    with context.progress.task("report", total=2) as task:
        heat = None
        if drawn:
            heat = heat_maps(
                contents,
                load=lambda moment: _load(context, moment),
                count=drawn,
                batch_size=config.report.batch_size,
                score=config.score,
                cache=context.folder / "heatmaps.json",
            )
        task.advance(note="heat maps")
        page = PageInputs(
            run=contents,
            method=context.method,
            title=config.report.title or config.name,
            config=config.to_dict(),
            heat=heat,
            pairs=config.report.pairs,
            seeds=[read_json(Path(seed) / "summary.json") for seed in config.report.seeds],
        )
        path = write_atomic(context.run.path / PAGE, render(page))
        task.advance(note="page")
    return {"page": PAGE, "bytes": path.stat().st_size, "heat_maps": len(heat.examples) if heat else 0}


def _load(context: StageContext, moment: Moment) -> LoadedModel:
    from mmdpo_kernels import patch_model
    from mmdpo_trainers.stages.models import load_evaluated

    loaded = load_evaluated(dataclasses.replace(context, stage="evaluate", moment=moment))
    patch_model(loaded.model)
    return loaded
