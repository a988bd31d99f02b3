"""What a benchmark declares: the one type that reading, evaluation and the page ask. It is all they know of a benchmark."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmdpo_trainers.answers.raters.judge import Form

Record = Mapping[str, Any]
"""A prompt record, or an answer: the record with what the model said."""

Row = Mapping[str, Any]
"""A row of a benchmark's file: its cells that hold something, by column."""

Marks = dict[str, float | Sequence[float]]
"""What an answer is worth: by figure a number, of which the figure is the mean, or a numerator and a denominator, of which it is the ratio
of the sums (precision: [said yes and right, said yes])."""


class BadRow(Exception):
    """A row that cannot be asked. reason: a word to count by; detail: what was expected, what came."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class SameAs:
    """In place of pictures: those of the row with this id."""

    id: str


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a layout makes of a row."""

    id: str
    text: str
    """With `<image>` in the places of its pictures, or without one: then they come in front."""
    pictures: Sequence[bytes | str] | SameAs
    """A file's bytes, or a path relative to the folder of pictures."""
    answer: str
    """The truth: an option's letter, yes or no, a text."""
    choices: Mapping[str, str] = field(default_factory=dict)
    """Letter -> option that an answer may name."""
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Kind of group (`split`, `category`) -> those that it is counted in."""
    unit: str | None = None
    """What is right where all questions of that name are (circular evaluation); None: the question by itself."""
    target: int | None = None
    """The asked-about picture, counted from 0, where the file says it."""
    more: Mapping[str, Any] = field(default_factory=dict)
    """What else marking needs, JSON-able."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where a row comes from."""

    file: Path
    number: int
    """Of the row in its file, from 1."""
    pictures: Path
    """The folder that paths of pictures are relative to."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A form that a benchmark is published in."""

    about: str
    """What readers call it."""
    columns: frozenset[str]
    """Columns that a file of this layout has, by which it is told."""
    question: Callable[[Row, Source], Question]
    """Raises BadRow where the row cannot be asked."""


@dataclass(frozen=True, kw_only=True)
class Judging:
    """What a benchmark asks of a judge."""

    template: str
    """File in `asked/`, jinja2."""
    form: Form
    parse: Callable[[str], Any]
    """Reads a reply; raises ReplyError."""
    asked: Callable[[Record, Record], Sequence[Mapping[str, Any]]]
    """(record, answer) -> the template's values, of each question about the answer; none where there is nothing to ask."""
    marked: Callable[[Record, Record, Sequence[Any]], tuple[str | None, Marks]]
    """(record, answer, what was read off each reply, None where nothing was) -> as `Suite.mark`; no marks where it cannot be judged."""
    sample: Mapping[str, Any]
    """Values as the template is filled with, for trying one."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A number that a benchmark is reported as."""

    label: str
    kind: Literal["share", "mean"] = "share"
    """share: between 0 and 1, shown in percent."""
    lower_is_better: bool = False
    of_units: bool = True
    """Whether several questions of one unit count once, with the least of their marks."""
    sum_of: Mapping[str, float] = field(default_factory=dict)
    """Figure -> weight, of a figure that has no marks of its own and is a sum of others, which are of different questions."""
    plus: float = 0.0
    """Added to that sum."""


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A benchmark. A file of `declared/` holds a tuple of them as `SUITES`."""

    name: str
    """What `evaluate.benchmarks` calls it."""
    title: str
    """What readers call it."""
    paper: str
    """Where it was published: an arXiv id with a word before it, or an address."""
    cited: str
    """Whose rules the prompt and the marks follow: an address."""
    layouts: Sequence[Layout]
    """Tried in order; the first whose columns a file has is its layout."""
    figures: Mapping[str, Figure]
    """Name -> figure; the first is the one that the benchmark is known by."""
    mark: Callable[[Mapping[str, Any], str], tuple[str | None, Marks]] | None
    """(record, response) -> (what was read out of the response, or None where nothing was; marks). None: a judge marks it."""
    suffix: str = ""
    """Put behind each question; `evaluate.benchmark_suffix` names another."""
    max_new_tokens: int = 64
    """Longest answer; `evaluate.benchmark_tokens` names another."""
    files: Callable[[Path], Sequence[Path]] | None = None
    """What was given -> the files whose rows are its questions; None: all that there are. Raises DataError where they lack."""
    rows: Callable[[Path], Iterable[Row]] | None = None
    """Rows of such a file, where they are not those that any file of its kind has."""
    beside: Callable[[Path], Sequence[Path]] | None = None
    """What was given -> further files that answers and marks depend on: annotations, references. Raises DataError where they lack."""
    common: Callable[[Path], Mapping[str, Any]] | None = None
    """What was given -> what marking needs beside each record, as its `common`; JSON-able."""
    note: Callable[[Mapping[str, Any]], str] | None = None
    """`common` -> what readers of the figures have to know."""
    further: Callable[[Record, Sequence[str]], Sequence[Mapping[str, Any]] | None] | None = None
    """(record, responses so far) -> the messages of the next turn, or None where the conversation has ended."""
    judging: Judging | None = None
    """How a judge marks answers, where `mark` is None."""
    mean_of: str | None = None
    """A kind of group over which the first figure's mean is reported too, each group counting the same."""

    @property
    def primary(self) -> str:
        """The figure that the benchmark is known by."""
        return next(iter(self.figures))
