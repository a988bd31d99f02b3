"""Records that a page shows, through the reader of the setting that they are for."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from tiny_models import sample_pictures

from mmdpo_trainers.answers.raters.file import FileRater
from mmdpo_trainers.config.sections.ranking import RankConfig
from mmdpo_trainers.config.sections.rating import ATTRIBUTES, RateConfig
from mmdpo_trainers.data.pairs import read_pairs
from mmdpo_trainers.data.records import read_prompts
from mmdpo_trainers.data.sources import SourceRecord, TextRecord, read_source, read_texts
from mmdpo_trainers.methods.ranking import rank_answers
from mmdpo_trainers.stages.batches import require

_PICTURES = (".png", ".jpg", ".jpeg")


def records_in(text: str) -> list[dict[str, Any]]:
    """The JSON objects of a text, one behind the other, on one line each or on several."""
    decoder, found, at = json.JSONDecoder(), [], 0
    while text[at:].strip():
        at += len(text[at:]) - len(text[at:].lstrip())
        record, at = decoder.raw_decode(text, at)
        found.append(record)
    return found


def check(reader: str, text: str, folder: Path) -> None:
    """Raise where the reader of a setting does not take these records as they are. Their pictures are made in `folder`."""
    records = records_in(text)
    for name in set(_paths(records)):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        sample_pictures(1)[0].save(path)
    file = folder / f"{reader}.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    assert READERS[reader](file) >= len(records) > 0, f"{reader}: records were dropped"


def _paths(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _paths(each)
    elif isinstance(value, str) and value.endswith(_PICTURES) and " " not in value:
        yield value


def _source(file: Path) -> int:
    return sum(isinstance(each, SourceRecord) for each in read_source(file, cache=file.parent / "cache"))


def _texts(file: Path) -> int:
    return sum(isinstance(each, TextRecord) for each in read_texts(file))


def _responses(file: Path) -> int:
    records = list(read_prompts(file))
    require(records, {"response": str}, file)
    return len(records)


def _rated(file: Path) -> int:
    return len(rank_answers(list(read_prompts(file)), RankConfig(), attributes=ATTRIBUTES, seed=0).pairs)


def _ratings(file: Path) -> int:
    FileRater(RateConfig(source="file", file=str(file)))
    return len(file.read_text().splitlines())


READERS: dict[str, Callable[[Path], int]] = {
    "data.source": _source,
    "augment.text_source": _texts,
    "pairs.source": lambda file: len(read_pairs(file)),
    "online.pairs.source": lambda file: len(read_pairs(file, prompts=True)),
    "generate.input": lambda file: len(list(read_prompts(file))),
    "score.input": _responses,
    "rate.file": _ratings,
    "rank.input": _rated,
}
"""Setting -> how many records of a file it takes."""
