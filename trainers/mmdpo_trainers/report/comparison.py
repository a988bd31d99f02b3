"""What the sections of a page are given: the run folder's contents, its arms side by side, and settings."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.methods import Method
from mmdpo_trainers.methods.held_out import BASE, held_out_summary

from .contents import Record, RunContents
from .heatmaps import HeatMaps
from .held_out import HeldOut


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Arms side by side: their figures, their held-out pairs, and the answers of the base ("no training") and of each arm by question id."""

    summary: Mapping[str, Any]
    answers: Mapping[str, Mapping[str, Record]]
    held_out: HeldOut

    @classmethod
    def read(cls, run: RunContents, main: str) -> Comparison:
        """Of a run folder, leniently: what is not there yet is left out. main: what the main arm is called."""
        folder = run.folder
        arms = [path.name for path in sorted((folder / "arms").glob("*")) if path.is_dir()]
        # Arms of the configuration come in its order, which the run's own summary keeps.
        known = list(read_json(folder / "summary.json").get("arms", ())) if (folder / "summary.json").is_file() else []
        arms = sorted(arms, key=lambda arm: (known.index(arm) if arm in known else len(known), arm))
        answers = {BASE: _by_id(run.before), main: _by_id(run.after)}
        answers |= {arm: _by_id(run.arms[arm][0]) for arm in arms if arm in run.arms}
        summary = held_out_summary(folder, arms, main=main)
        held_out = HeldOut.read(folder, summary["arms"], main)
        return cls(summary=summary, answers={arm: a for arm, a in answers.items() if a}, held_out=held_out)

    @property
    def figures(self) -> dict[str, Mapping[str, Any]]:
        """Base and arms that have been evaluated -> their figures."""
        found = {BASE: self.summary["before"], **self.summary["arms"]}
        return {arm: figures for arm, figures in found.items() if figures.get("held_out") or figures.get("accuracy")}


@dataclass(frozen=True, kw_only=True)
class PageInputs:
    """What a section is made of."""

    run: RunContents
    method: Method
    title: str
    config: Mapping[str, Any]
    """Nested settings, shown as YAML."""
    heat: HeatMaps | None = None
    pairs: int = 6
    """About how many example pairs to show, and as many questions."""
    seeds: Sequence[Mapping[str, Any]] = ()
    """Summaries of runs with other seeds."""
    now: datetime | None = None

    @functools.cached_property
    def comparison(self) -> Comparison:
        """Arms side by side."""
        return Comparison.read(self.run, self.method.name)


def _by_id(answers: Iterable[Record]) -> dict[str, Record]:
    return {str(answer["id"]): answer for answer in answers}


def group_of(answer: Record) -> str:
    """What an answer is counted under."""
    return str(answer.get("group") or answer["format"])
