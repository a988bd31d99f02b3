"""A benchmark's files as prompt records; what cannot be asked is a `Problem` with its id and reason."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmdpo_trainers.data.images import MAX_PIXELS, ImageError, content_key, locate_image, read_image
from mmdpo_trainers.data.records import IMAGE_TOKEN, check_prompt, prompt_record
from mmdpo_trainers.data.sources import Problem
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.files.atomic import write_atomic
from mmdpo_trainers.suites.rows import benchmark_files, columns_of, rows_of
from mmdpo_trainers.suites.suite import BadRow, Layout, Question, SameAs, Source, Suite

_KINDS = ((b"\xff\xd8", ".jpg"), (b"\x89PNG", ".png"), (b"RIFF", ".webp"), (b"GIF8", ".gif"))


def files_of(suite: Suite, path: Path) -> list[Path]:
    """The files whose rows are a benchmark's questions. Raises DataError where there are none."""
    return benchmark_files(path) if suite.files is None else list(suite.files(path))


def layouts_of(suite: Suite, path: Path) -> list[tuple[Path, Layout]]:
    """The files of a benchmark with the layout of each. Raises DataError naming the columns where one has none of its layouts."""
    found = []
    for file in files_of(suite, path):
        columns = columns_of(file) if suite.rows is None else list(next(iter(suite.rows(file)), {}))
        layout = next((each for each in suite.layouts if each.columns <= set(columns)), None)
        if layout is None:
            known = "; or ".join(f"{', '.join(sorted(each.columns))} ({each.about})" for each in suite.layouts)
            raise DataError(
                f"{file} is no file of {suite.title}: expected the columns {known}; got {', '.join(columns[:20]) or 'none'}"
            )
        found.append((file, layout))
    return found


def read(
    suite: Suite, path: Path, *, images: Path | None, cache: Path, suffix: str | None = None, max_pixels: int = MAX_PIXELS
) -> Iterator[dict[str, Any] | Problem]:
    """Yield the prompt records of a benchmark, and a Problem for each row that cannot be asked.

    images: what paths of pictures are relative to and may not leave; None: the folder of the file. cache: folder that pictures inside the
    file are written to as they are, named by their content. suffix: in place of the benchmark's own.

    A record is a prompt record with `benchmark`, `choices` (letter -> option), `groups`, `unit` and what else marking needs; `target` is
    null where the file does not say which picture is asked about. Every picture is decoded once. Raises DataError where no file is of
    the benchmark.
    """
    reader = _Reader(suite, cache, suite.suffix if suffix is None else suffix, max_pixels)
    for file, layout in layouts_of(suite, path):
        folder = images if images is not None else (path if path.is_dir() else path.parent)
        for number, row in enumerate((suite.rows or rows_of)(file), start=1):
            source = Source(file=file, number=number, pictures=folder)
            yield from reader.items(row, layout, source)
    yield from reader.waiting()


@dataclass
class _Reader:
    suite: Suite
    cache: Path
    suffix: str
    max_pixels: int
    seen: set[str] = field(default_factory=set)
    pictures: dict[str, list[str]] = field(default_factory=dict)
    """Of each row so far, by its own id."""
    later: list[tuple[Question, Source]] = field(default_factory=list)
    """Rows with the pictures of a row that has not come yet."""
    usable: set[Path] = field(default_factory=set)
    """Picture files that decoded."""

    def items(self, row: Mapping[str, Any] | BadRow, layout: Layout, source: Source) -> Iterator[dict[str, Any] | Problem]:
        """The record, and problems."""
        name = f"{source.file.name}:{source.number}"
        try:
            if isinstance(row, BadRow):
                raise row
            question = layout.question(row, source)
            if isinstance(question.pictures, SameAs) and question.pictures.id not in self.pictures:
                self.later.append((question, source))
                return
            name = question.id
            yield from self._record(question, source)
        except BadRow as bad:
            yield Problem(name, bad.reason, f"{source.file.name}, row {source.number}: {bad.detail}")

    def waiting(self) -> Iterator[dict[str, Any] | Problem]:
        """The rows whose pictures are those of a row that came after them."""
        for question, source in self.later:
            try:
                yield from self._record(question, source)
            except BadRow as bad:
                yield Problem(question.id, bad.reason, f"{source.file.name}, row {source.number}: {bad.detail}")

    def _record(self, question: Question, source: Source) -> Iterator[dict[str, Any] | Problem]:
        pictures = self._stored(question, source)
        # Whatever else is wrong with a row, others may have its pictures.
        self.pictures[question.id] = pictures
        name, count = question.id, 1
        while name in self.seen:
            count += 1
            name = f"{question.id}~{count}"
        self.seen.add(name)
        if count > 1:
            detail = f"{source.file.name}, row {source.number}: another row has the id {question.id!r}"
            yield Problem(name, "duplicate_id", detail, dropped=False)
        places = question.text.count(IMAGE_TOKEN)
        text = question.text if places else f"{IMAGE_TOKEN}\n" * len(pictures) + question.text
        record = prompt_record(
            id=name,
            source_id=question.id,
            format={0: "text", 1: "single"}.get(len(pictures), "sequence"),
            images=pictures,
            prompt=text + self.suffix,
            answer=question.answer,
            target=question.target if len(pictures) > 1 else 0 if pictures else None,
            num_images=len(pictures),
            options=list(question.choices.values()) or None,
        )
        # No benchmark is left out for not saying which of its pictures is asked about.
        guessed = {"target": 0} if pictures and record["target"] is None else {}
        try:
            check_prompt({**record, **guessed}, "the question")
        except DataError as error:
            raise BadRow("not_a_question", str(error)) from error
        own = {"benchmark": self.suite.name, "choices": dict(question.choices), "unit": question.unit or name}
        yield {**record, **own, "groups": {kind: list(names) for kind, names in question.groups.items()}, **question.more}

    def _stored(self, question: Question, source: Source) -> list[str]:
        if isinstance(question.pictures, SameAs):
            if question.pictures.id not in self.pictures:
                raise BadRow("missing", f"its pictures are those of row {question.pictures.id!r}, which is not there or has none")
            return self.pictures[question.pictures.id]
        try:
            return [self._usable(picture, source) for picture in question.pictures]
        except ImageError as error:
            raise BadRow(error.reason, error.detail) from error

    def _usable(self, picture: bytes | str, source: Source) -> str:
        """The file of a picture that decodes and is within the limit. Raises ImageError."""
        if isinstance(picture, str):
            file = locate_image(picture, source.pictures)
            if file not in self.usable:
                self._decode(file)
        else:
            kind = next((suffix for start, suffix in _KINDS if picture.startswith(start)), ".img")
            file = self.cache / f"{content_key(picture)}{kind}"
            if file not in self.usable:
                self._decode(picture)
                if not file.exists():
                    write_atomic(file, picture, durable=False)
        self.usable.add(file)
        return str(file)

    def _decode(self, picture: bytes | Path) -> None:
        with contextlib.closing(read_image(picture, max_pixels=self.max_pixels).image):
            pass


def text_of(row: Mapping[str, Any], column: str) -> str:
    """A cell as text. Raises BadRow where the row has none."""
    value = row.get(column)
    if value is None or not str(value).strip():
        raise BadRow(f"no_{column}", f"column {column!r} is empty")
    return str(value)


def groups_of(row: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, list[str]]:
    """Kind of group -> what the row's cell says; kinds that it says nothing of are left out. columns: kind -> column."""
    return {kind: [str(row[column])] for kind, column in columns.items() if column in row}


def placed(text: str, pattern: str, count: int) -> tuple[str, list[int]]:
    """Numbered places of pictures (`<image 2>`) as `<image>`, and which picture is in each, from 0. Raises BadRow for one there is not."""
    order = [int(number) - 1 for number in re.findall(pattern, text)]
    if wrong := next((number for number in order if not 0 <= number < count), None):
        raise BadRow("no_picture", f"the question asks for picture {wrong + 1}, and has {count}")
    return re.sub(pattern, IMAGE_TOKEN, text), order


def embedded(values: Sequence[Any]) -> list[bytes | str]:
    """Cells of a parquet file that hold pictures (`bytes`, or else `path`), those that are null left out."""
    found: list[bytes | str] = []
    for value in values:
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path")
        if value:
            found.append(value)
    return found
