"""What a run folder says, read leniently: a stage that has not run is simply absent."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mmdpo_trainers.answers.layer_choice import FILE
from mmdpo_trainers.config.options import Match
from mmdpo_trainers.config.stages import stage_folders
from mmdpo_trainers.data.match import is_right
from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.files.json_lines import read_jsonl

from .intervals import Estimate, Outcomes, Proportion, mean_change, paired_change

Record = dict[str, Any]
T = TypeVar("T")

FORMATS = {
    "sequence": "Sequence",
    "grid": "Grid collage",
    "pip": "Picture in picture",
    "single": "Single image",
    "text": "Text only",
}
MULTI_IMAGE = ("sequence", "grid", "pip")


def label_of(format: str) -> str:
    """A format's name for readers; an unknown format is its own name."""
    return FORMATS.get(format, format)


def by_format(records: Iterable[Record]) -> dict[str, list[Record]]:
    """Records grouped by their `format`, known formats first and in their fixed order."""
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record["format"]].append(record)
    order = [*(name for name in FORMATS if name in groups), *sorted(groups.keys() - FORMATS.keys())]
    return {name: groups[name] for name in order}


def spread(records: Sequence[T], count: int) -> list[T]:
    """`count` of the records at even distances (files are sorted by number of pictures), or all where there are fewer."""
    count = min(count, len(records))
    return [records[(2 * place + 1) * len(records) // (2 * count)] for place in range(count)]


def proportion(answers: Sequence[Record]) -> Proportion | None:
    """Share of correct answers; None where there are none."""
    return Proportion(sum(bool(a["correct"]) for a in answers), len(answers)) if answers else None


def outcomes(answers: Iterable[Record]) -> Outcomes:
    """Question id -> whether it was answered right."""
    return {str(answer["id"]): bool(answer["correct"]) for answer in answers}


def multi_image_difference(first: Iterable[Record], second: Iterable[Record]) -> Estimate | None:
    """Accuracy of `second` minus that of `first`, averaged over the multi-image formats, paired by question."""
    old, new = by_format(first), by_format(second)
    formats = [name for name in MULTI_IMAGE if name in old or name in new]
    return mean_change([(outcomes(old.get(name, ())), outcomes(new.get(name, ()))) for name in formats])


def mean_ratio(answers: Iterable[Record]) -> float | None:
    """Mean `ratio` over the records that have one; None where none has."""
    ratios = [float(a["ratio"]) for a in answers if a.get("ratio") is not None]
    return sum(ratios) / len(ratios) if ratios else None


@dataclass(frozen=True, kw_only=True)
class AccuracyRow:
    """One line of the accuracy table: a format, or one number of pictures within it (`nested`)."""

    label: str
    before: Proportion | None
    after: Proportion | None
    change: Estimate | None
    ratio_before: float | None
    ratio_after: float | None
    nested: bool = False

    @property
    def questions(self) -> int:
        return max((p.total for p in (self.before, self.after) if p is not None), default=0)


@dataclass(kw_only=True)
class RunContents:
    """Everything the page shows, as it stands in the files of a run folder.

    before, after: evaluation answers; scores, ratings, pairs (selected or ranked), own_pairs (of stage pairs), dropped, log: the records of
    those files; summaries: stage (or arms/<arm>/<stage>) -> its summary.json; arms: arm name -> (answers after training, number of pairs).
    """

    folder: Path
    before: list[Record] = field(default_factory=list)
    after: list[Record] = field(default_factory=list)
    scores: list[Record] = field(default_factory=list)
    ratings: list[Record] = field(default_factory=list)
    pairs: list[Record] | None = None
    own_pairs: list[Record] = field(default_factory=list)
    dropped: list[Record] = field(default_factory=list)
    log: list[Record] = field(default_factory=list)
    summaries: dict[str, Record] = field(default_factory=dict)
    arms: dict[str, tuple[list[Record], int | None]] = field(default_factory=dict)
    layers: Record = field(default_factory=dict)
    """How each decoder layer's ratio tells right answers from wrong ones, where stage score recorded all."""
    evaluation_data: Record = field(default_factory=dict)
    """Summary of how the evaluation prompts were made."""

    @classmethod
    def read(cls, folder: Path) -> RunContents:
        """Read a run folder. Raises RunFolderError where a file that is there is not what it should be."""
        return cls(
            folder=folder,
            before=_records(folder / "evaluate" / "before" / "answers.jsonl"),
            after=_records(folder / "evaluate" / "after" / "answers.jsonl"),
            scores=_records(folder / "score" / "scores.jsonl"),
            ratings=_records(folder / "rate" / "ratings.jsonl"),
            pairs=_pairs(folder),
            own_pairs=_records(folder / "pairs" / "pairs.jsonl"),
            dropped=_records(folder / "select" / "dropped.jsonl"),
            log=_records(folder / "train" / "log.jsonl"),
            summaries=_summaries(folder),
            arms=_arms(folder / "arms"),
            layers=read_json(folder / "score" / FILE, missing={}),
            evaluation_data=read_json(made) if (made := folder / "evaluate" / "summary.json").is_file() else {},
        )

    def accuracy_rows(self, *, nested: bool) -> list[AccuracyRow]:
        """One row a format; with `nested`, also one for each number of pictures where a format has several."""
        before, after = by_format(self.before), by_format(self.after)
        rows = []
        for name in [*before, *(name for name in after if name not in before)]:
            old, new = before.get(name, []), after.get(name, [])
            rows.append(_accuracy_row(label_of(name), old, new))
            counts = sorted({int(a["num_images"]) for a in (*old, *new) if a.get("num_images")})
            if nested and len(counts) > 1:
                rows += [_accuracy_row(f"{n} pictures", *(_with_images(g, n) for g in (old, new)), nested=True) for n in counts]
        return rows + [
            _accuracy_row(label_of(name), [], []) for name in self.empty_formats if name not in before and name not in after
        ]

    def multi_image_mean(self) -> tuple[float | None, float | None]:
        """Accuracy before and after, averaged over the multi-image formats (each format counts the same)."""
        means: list[float | None] = []
        for answers in (self.before, self.after):
            values = [p.value for name, group in by_format(answers).items() if name in MULTI_IMAGE and (p := proportion(group))]
            means.append(sum(values) / len(values) if values else None)
        return means[0], means[1]

    @property
    def selection_match(self) -> Match:
        """How selection compared answers with the truth, as its summary says."""
        return self.summaries.get("select", {}).get("match", "exact")  # type: ignore[no-any-return]

    @property
    def evaluation_match(self) -> str:
        """The same of the evaluations; empty where there is none."""
        found = [self.summaries.get(f"evaluate/{moment}", {}).get("match") for moment in ("before", "after")]
        return next((match for match in found if match), "")

    @property
    def empty_formats(self) -> list[str]:
        """Formats that were to be evaluated, of which there is no question."""
        counts = self.summaries.get("evaluate/before") or self.summaries.get("evaluate/after") or {}
        return [name for name, count in (counts.get("counts") or {}).items() if not count]

    def thresholds(self) -> dict[str, dict[int, float]]:
        """Format -> number of pictures -> largest ratio selected, as the select stage's summary says."""
        recorded = self.summaries.get("select", {}).get("thresholds") or {}
        return {format: {int(n): float(t) for n, t in table.items()} for format, table in recorded.items()}


def verdict(record: Mapping[str, Any], match: Match) -> str:
    """Whether a scored response is `right`, `wrong` or `unclear`, as selection sees it; `answers` without a truth."""
    if not record.get("answer") or record.get("response") is None:
        return "answers"
    right = is_right(str(record["response"]), str(record["answer"]), options=record.get("options"), match=match)
    return "unclear" if right is None else "right" if right else "wrong"


def _records(path: Path) -> list[Record]:
    return list(read_jsonl(path)) if path.is_file() else []


def _pairs(folder: Path) -> list[Record] | None:
    """What was made of answers to train on, by the stage that a run has; None: nothing yet."""
    made = next((file for stage in ("select", "rank") if (file := folder / stage / "pairs.jsonl").is_file()), None)
    return None if made is None else _records(made)


def _summaries(folder: Path) -> dict[str, Record]:
    arms = sorted(path.name for path in (folder / "arms").glob("*"))
    # The page that is drawn is not one of its own contents.
    names = [name for name in stage_folders(arms) if name != "report"]
    return {name: read_json(path) for name in names if (path := folder / name / "summary.json").is_file()}


def _arms(folder: Path) -> dict[str, tuple[list[Record], int | None]]:
    arms = {}
    for arm in sorted(p for p in folder.iterdir() if p.is_dir()) if folder.is_dir() else ():
        answers = _records(arm / "evaluate" / "after" / "answers.jsonl")
        pairs = _pairs(arm)
        if answers:
            arms[arm.name] = (answers, None if pairs is None else len(pairs))
    return arms


def _with_images(answers: Sequence[Record], count: int) -> list[Record]:
    return [a for a in answers if a.get("num_images") == count]


def _accuracy_row(label: str, before: Sequence[Record], after: Sequence[Record], *, nested: bool = False) -> AccuracyRow:
    return AccuracyRow(
        label=label,
        before=proportion(before),
        after=proportion(after),
        change=paired_change(outcomes(before), outcomes(after)),
        ratio_before=mean_ratio(before),
        ratio_after=mean_ratio(after),
        nested=nested,
    )
