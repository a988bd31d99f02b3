"""Multiple choice in VLMEvalKit's TSV: MMBench, MMStar, AI2D, ScienceQA, MMMU, and BLINK, which is read from the Hub's parquet too.

Columns: `index`, `question`, `A` … `Z`, `answer`, `image` (base64, a list of it, or another row's index) or `image_path`, and where there are
such `hint`, `category`, `l2-category`, `split`, `g_index`. Asked and marked as VLMEvalKit does (vlmeval/dataset/image_mcq.py,
utils/multiple_choice.py); its accuracy per category has all questions of it, whatever their split.
"""

from __future__ import annotations

import string
from dataclasses import replace
from typing import Any

from mmdpo_trainers.suites.choice import (
    ACCURACY,
    CIRCULAR,
    asked,
    base64_pictures,
    letters,
    listed,
    mark_choice,
    mark_circular,
    true_letter,
)
from mmdpo_trainers.suites.reading import embedded, groups_of, placed, text_of
from mmdpo_trainers.suites.suite import BadRow, Layout, Question, Row, SameAs, Source, Suite

_GROUPS = {"split": "split", "category": "category", "l2-category": "l2-category"}
_CITED = "https://github.com/open-compass/VLMEvalKit/blob/e8e78f05/vlmeval/dataset/image_mcq.py"
_ROLLED = 1_000_000
"""Added to the index of a question for each further order of its options."""


def _choices(row: Row) -> dict[str, str]:
    return {letter: str(row[letter]) for letter in string.ascii_uppercase if letter in row}


def _pictures(row: Row) -> list[bytes | str] | SameAs:
    if "image" in row:
        return base64_pictures(str(row["image"]))
    if "image_path" in row:
        return list(listed(str(row["image_path"]).strip()))
    # VLMEvalKit leaves these rows out as well (`skip_noimg`).
    raise BadRow("no_picture", "columns 'image' and 'image_path' are empty")


def _question(row: Row, source: Source, *, rolled: bool = False) -> Question:
    choices, index = _choices(row), text_of(row, "index")
    if not choices:
        raise BadRow("no_options", "columns A, B, … are empty")
    unit = str(row["g_index"]) if "g_index" in row else None
    if unit is None and rolled and index.isdigit():
        unit = str(int(index) % _ROLLED)
    return Question(
        id=index,
        text=asked(row, choices),
        pictures=_pictures(row),
        answer=true_letter(text_of(row, "answer"), choices),
        choices=choices,
        groups=groups_of(row, _GROUPS),
        unit=unit,
        target=_target(row),
        more={"circular": unit is not None},
    )


def _rolled(row: Row, source: Source) -> Question:
    return _question(row, source, rolled=True)


def _target(row: Row) -> int | None:
    return int(row["target"]) if str(row.get("target", "")).isdigit() else None


def _mmmu(row: Row, source: Source) -> Question:
    """Pictures in the places that the question names; an open question becomes one between its answer and any other (`MMMU_preproc`)."""
    choices, truth = _choices(row), text_of(row, "answer")
    text = asked(row, choices)
    scored = choices if "A" in row else {"A": truth, "B": "Other Answers"}
    pictures = _pictures(row)
    if not isinstance(pictures, SameAs):
        text, order = placed(text, r"<image (\d+)>", len(pictures))
        pictures = [pictures[number] for number in order] if order else pictures
    elif "<image 1>" in text:
        raise BadRow("no_picture", "the question has places for pictures, and another row's pictures")
    return Question(
        id=text_of(row, "index"),
        text=text,
        pictures=pictures,
        answer=true_letter(truth, scored) if "A" in row else "A",
        choices=scored,
        groups=groups_of(row, _GROUPS),
        target=_target(row),
    )


def _blink_of_the_hub(row: Row, source: Source) -> Question:
    """`prompt` holds the question with its options, as the paper asks it; of `choices` the answer's letter is one."""
    options = row.get("choices")
    choices = letters([str(each) for each in options] if isinstance(options, list) else [])
    pictures = embedded([row[name] for name in sorted(row) if name.startswith("image_")])
    if not pictures:
        raise BadRow("no_picture", "columns 'image_1', 'image_2', … are empty")
    return Question(
        id=text_of(row, "idx"),
        text=text_of(row, "prompt"),
        pictures=pictures,
        answer=true_letter(text_of(row, "answer"), choices),
        choices=choices,
        groups=groups_of(row, {"category": "sub_task"}),
        target=_target(row),
        more={"circular": False},
    )


TSV = Layout(about="VLMEvalKit's TSV", columns=frozenset({"index", "question", "A", "B", "answer"}), question=_question)
_HUB_BLINK = Layout(
    about="BLINK-Benchmark/BLINK on the Hub, parquet",
    columns=frozenset({"idx", "sub_task", "prompt", "choices", "answer", "image_1"}),
    question=_blink_of_the_hub,
)


def _suite(name: str, title: str, paper: str, **other: Any) -> Suite:
    values: dict[str, Any] = {"layouts": (TSV,), "figures": CIRCULAR, "mark": mark_circular, "cited": _CITED, **other}
    return Suite(name=name, title=title, paper=paper, **values)


SUITES = (
    _suite("mmbench", "MMBench", "arXiv 2307.06281", layouts=(replace(TSV, question=_rolled),)),
    _suite("mmstar", "MMStar", "arXiv 2403.20330"),
    _suite("ai2d", "AI2D", "arXiv 1603.07396"),
    _suite("scienceqa", "ScienceQA", "arXiv 2209.09513"),
    _suite("blink", "BLINK", "arXiv 2404.12390", layouts=(TSV, _HUB_BLINK), mean_of="category"),
    _suite(
        "mmmu",
        "MMMU",
        "arXiv 2311.16502",
        layouts=(replace(TSV, question=_mmmu),),
        figures=ACCURACY,
        mark=mark_choice,
    ),
)
