"""Files of scored answers, which may hold millions: looked at and written as pairs part by part, on several cores."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import tempfile
from array import array
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from mmdpo_trainers.answers.raters import Rating
from mmdpo_trainers.data.records import read_prompts, relative_images
from mmdpo_trainers.errors import MmdpoError, StageError
from mmdpo_trainers.files.atomic import replacing
from mmdpo_trainers.files.json_lines import Part, line_parts, read_jsonl
from mmdpo_trainers.methods.selected import Facts, Failing, Selection, bits_of, rules_of
from mmdpo_trainers.methods.selection import SelectionRules, preference_pair
from mmdpo_trainers.processes.spread import spread
from mmdpo_trainers.stages.batches import no_records, require

Record = dict[str, Any]

ATTENTION, CONTROL = "attention", "control"
"""Sets of rules: MIA-DPO's but the one about attention, and those of a control arm that goes by rules."""
_PART_BYTES = 4 * 2**20


class Ratings:
    """What a judge made of answers, by record: the rating, and which answer it saw."""

    def __init__(self, path: Path, attribute: str | None) -> None:
        self.path = path
        self._seen: dict[str, tuple[bytes, float | None]] = {}
        for line in read_jsonl(path):
            rating = Rating(line["ratings"][0]).value(attribute) if len(line["ratings"]) == 1 else None
            self._seen[line["id"]] = _mark(line["responses"]), rating

    def of(self, record: Record) -> float | None:
        """The rating of a record's answer. StageError where the judge saw another one."""
        mark, rating = self._seen.get(record["id"], (b"", None))
        if mark != _mark([record["response"]]):
            seen = next((line.get("responses") for line in read_jsonl(self.path) if line["id"] == record["id"]), None)
            raise StageError(
                f"{self.path}: expected a rating of the answer to record {record['id']!r}, {record['response'][:60]!r}, got one of "
                f"{seen!r}; give rate the answers that were scored: leave rate.input out, then --restart rate"
            )
        return rating


def _mark(responses: Any) -> bytes:
    return hashlib.sha256(json.dumps(responses).encode()).digest()[:8]


class ScoreFile:
    """A file of scored answers, for a `SelectConfig`. ratings: of a judge, which records are given as `rating`."""

    def __init__(self, path: Path, options: Any, ratings: Ratings | None) -> None:
        self.path, self.options, self.ratings = path, options, ratings
        self.truths: dict[str, list[str]] = {}
        """By format, where wrong answers are drawn from them."""
        self.parts = line_parts(path, _PART_BYTES) if path.is_file() else [(0, 0)]
        self.counts: list[int] = []
        """Records of each part."""
        # A judge's ratings are in memory, which processes would have once each.
        self._processes = None if ratings is None else 1

    def records(self, part: Part | None = None) -> Iterator[Record]:
        """The records of the file, or of a part of it. Raises DataError or StageError naming one that cannot be used."""
        for record in read_prompts(self.path, part):
            self._check(record)
            yield record if self.ratings is None else {**record, "rating": self.ratings.of(record)}

    def spread(self, work: Callable[[Any], Any], pieces: Sequence[Any]) -> Iterator[Any]:
        """`work` on pieces, one a part, side by side."""
        return spread(work, pieces, processes=self._processes)

    def facts(self) -> Facts:
        """Look at all records once. Raises what `records` raises, and StageError where there are none."""
        facts, ids = Facts(), set[str]()
        same: dict[str, str] = {}
        try:
            for its, found, truths in self.spread(self._look, self.parts):
                if not ids.isdisjoint(its):
                    break
                ids.update(its)
                self.counts.append(len(its))
                facts.extend(found)
                for format, each in truths:
                    self.truths.setdefault(format, []).append(same.setdefault(each, each))
        except MmdpoError:
            # It is said by its place in the whole file.
            for _ in self.records():
                pass
            raise
        if len(self.counts) < len(self.parts):
            # An id that occurs twice.
            for _ in self.records():
                pass
        if not len(facts):
            raise no_records(self.path, "scored answers")
        return facts

    def _look(self, part: Part) -> tuple[list[str], Facts, list[tuple[str, str]]]:
        options, ids, truths = self.options, list[str](), list[tuple[str, str]]()
        failing: dict[str, Failing] = {ATTENTION: SelectionRules.from_options(options, attention=False).failing}
        if options.rule in ("perplexity", "judge"):
            judged = options.rule == "judge"
            failing[CONTROL] = SelectionRules.from_options(options, attention=False, judged=judged).failing

        def seen() -> Iterator[Record]:
            for record in self.records(part):
                ids.append(record["id"])
                if options.rule == "random_wrong" and (truth := str(record.get("answer") or "").strip()):
                    truths.append((record["format"], truth))
                yield record

        return ids, Facts.of(seen(), failing), truths

    def failing(self, rules: Failing) -> array[int]:
        """Of all records the rules of a set that they fail, as bits."""

        def look(part: Part) -> array[int]:
            return array("H", [bits_of(rules(record)) for record in self.records(part)])

        found = array("H")
        for each in self.spread(look, self.parts):
            found.extend(each)
        return found

    def _check(self, record: Record) -> None:
        require([record], {"response": str, "ratio": (float, int, type(None))}, self.path)
        if "ratio" not in record:
            raise StageError(
                f"{self.path}, record {record['id']!r}: no `ratio`; run score first, or give a file that score wrote"
            )
        if self.options.min_perplexity is not None and not isinstance(record.get("perplexity"), float | int):
            raise StageError(
                f"{self.path}, record {record['id']!r}: no `perplexity`; add it, or set select.min_perplexity to null to leave the rule out"
            )


class PairWriter:
    """Writes a selection's pairs and what was dropped, in the records' order, those that were not drawn last."""

    def __init__(
        self, scores: ScoreFile, selection: Selection, rejected: Callable[[Record], str], folder: Path, root: Path
    ) -> None:
        self.scores, self.rejected, self.folder, self.root = scores, rejected, folder, root
        self.failed = selection.failed
        self._not_drawn = bits_of(["not_drawn"])

    def write(self, *, pairs: bool = True) -> None:
        """`dropped.jsonl`, and `pairs.jsonl` where pairs are to be written."""
        for unfinished in self.folder.glob(".*.jsonl.*.tmp"):
            # Of an attempt that was killed; the run's lock keeps others away.
            unfinished.unlink()
        pieces = list(zip(self.scores.parts, accumulate([0, *self.scores.counts]), strict=False))
        with contextlib.ExitStack() as stack:
            kept = stack.enter_context(replacing(self.folder / "pairs.jsonl")) if pairs else None
            dropped = stack.enter_context(replacing(self.folder / "dropped.jsonl"))
            last = stack.enter_context(tempfile.TemporaryFile(dir=self.folder))
            for lines in self.scores.spread(self._lines, pieces):
                for file, each in zip((kept, dropped, last), lines, strict=True):
                    if file is not None:
                        file.write(each)
            last.seek(0)
            shutil.copyfileobj(last, dropped)

    def _lines(self, piece: tuple[Part, int]) -> list[bytes]:
        """Of a part, and the place of its first record: lines of pairs, of what was dropped, and of what was not drawn."""
        part, start = piece
        found: list[list[str]] = [[], [], []]
        for place, record in enumerate(self.scores.records(part), start=start):
            failed = int(self.failed[place])
            if not failed:
                line, side = preference_pair({**record, "rejected": self.rejected(record)}), 0
            else:
                side = 2 if failed & self._not_drawn else 1
                rules = rules_of(failed)
                line = {**record, "rule": rules[0], "rules": rules}
            line["images"] = relative_images(record["images"], self.folder, self.root)
            found[side].append(json.dumps(line, ensure_ascii=False) + "\n")
        return ["".join(each).encode() for each in found]
