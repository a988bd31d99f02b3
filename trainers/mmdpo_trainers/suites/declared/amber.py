"""AMBER (arXiv 2311.07397): 1,004 pictures to describe and 14,216 questions of yes and no; objects, attributes and relations, from annotations.

Read from the folder `data/` of https://github.com/junyangwang0410/AMBER, or the repository's: `query/query_all.json` (or one of its parts,
by name: a list of `id`, `image`, `query`), `annotations.json`, `relation.json`, `safe_words.txt`; pictures in `image/`, or
wherever `evaluate.benchmark_images` says. No judge. What differs from the released code: `suites/objects/amber.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmdpo_trainers.suites.beside import beside, json_value, picture_beside, texts_of
from mmdpo_trainers.suites.found import found_yes_or_no
from mmdpo_trainers.suites.objects.amber import DESCRIPTIONS, Association, described, dimension
from mmdpo_trainers.suites.reading import text_of
from mmdpo_trainers.suites.suite import BadRow, Figure, Layout, Marks, Question, Row, Source, Suite

_QUERIES = ("query/query_all.json", "data/query/query_all.json", "query_all.json")


def _files(path: Path) -> list[Path]:
    return [path if path.is_file() else beside(path, _QUERIES, "AMBER")]


def _beside(path: Path) -> list[Path]:
    folder = _files(path)[0].parent
    return [beside(folder, (f"../{name}", name), "AMBER") for name in ("annotations.json", "relation.json", "safe_words.txt")]


def _common(path: Path) -> dict[str, Any]:
    _, relation, safe = _beside(path)
    return {
        "relation": json_value(relation, dict, "an object of lists of words"),
        "safe": safe.read_text(encoding="utf-8").split(),
    }


@functools.lru_cache(maxsize=4)
def _annotations(queries: Path) -> Mapping[str, Mapping[str, Any]]:
    entries = json_value(_beside(queries)[0], list, "a list of annotations")
    return {str(entry.get("id")): entry for entry in entries if isinstance(entry, dict)}


def _question(row: Row, source: Source) -> Question:
    name = text_of(row, "id")
    entry = _annotations(source.file).get(name)
    if entry is None:
        raise BadRow("no_annotation", f"annotations.json has no entry {name}")
    group, truth = dimension(str(entry.get("type"))), entry.get("truth")
    more: dict[str, Any] = {}
    if group == DESCRIPTIONS:
        more = {"objects": texts_of(entry, "truth"), "imagined": texts_of(entry, "hallu")}
    elif truth not in ("yes", "no"):
        raise BadRow("no_answer", f"expected the truth yes or no, got {str(truth)[:60]!r}")
    return Question(
        id=name,
        text=text_of(row, "query"),
        pictures=[picture_beside(source, [text_of(row, "image")])],
        answer="" if group == DESCRIPTIONS else str(truth),
        groups={"dimension": [group]},
        more=more,
    )


def _mark(record: Mapping[str, Any], response: str) -> tuple[str | None, Marks]:
    if "objects" not in record:
        return _mark_yes_or_no(record["answer"], found_yes_or_no(response))
    association = Association.of(record["common"]["relation"], record["common"]["safe"])
    found = described(response, record["objects"], record["imagined"], association)
    return found.said, {
        "chair": [len(found.wrong), len(found.nouns)],
        "cover": [found.covered, len(record["objects"])],
        "hallucination_rate": float(bool(found.wrong)),
        "cog": [found.cognitive, len(record["imagined"])],
    }


def _mark_yes_or_no(truth: str, said: str | None) -> tuple[str | None, Marks]:
    """To find what is not so is what is asked for: `no` is the positive class."""
    no, true = float(said == "no"), float(truth == "no")
    both = no * true
    return said, {
        "accuracy": float(said == truth),
        "precision": [both, no],
        "recall": [both, true],
        "f1": [2 * both, no + true],
    }


SUITES = (
    Suite(
        name="amber",
        title="AMBER",
        paper="arXiv 2311.07397",
        cited="https://github.com/junyangwang0410/AMBER/blob/master/inference.py",
        layouts=(Layout(about="query_*.json", columns=frozenset({"id", "image", "query"}), question=_question),),
        files=_files,
        beside=_beside,
        common=_common,
        figures={
            "score": Figure(label="AMBER score", sum_of={"chair": -0.5, "f1": 0.5}, plus=0.5),
            "chair": Figure(label="CHAIR", lower_is_better=True),
            "cover": Figure(label="Cover"),
            "hallucination_rate": Figure(label="Hal", lower_is_better=True),
            "cog": Figure(label="Cog", lower_is_better=True),
            "accuracy": Figure(label="Accuracy"),
            "precision": Figure(label="Precision"),
            "recall": Figure(label="Recall"),
            "f1": Figure(label="F1"),
        },
        mark=_mark,
        max_new_tokens=512,
    ),
)
