"""Layouts that instruction and preference data are published in: one table, columns -> record, and which of them a record has."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, get_args

from mmdpo_trainers.config.options import ColumnName
from mmdpo_trainers.data import layout_records as records
from mmdpo_trainers.data.content import UnreadContent, is_empty
from mmdpo_trainers.data.layout_records import LeftOut, Record

_AS_TRL = {"question": "prompt", "answer": "completion"}
_OWN = {"question": ("question", "prompt"), "answer": ("answer", "completion"), "images": ("images", "image")}
"""Where a column is looked for that `columns` does not name; others under their own name."""


@dataclass(frozen=True)
class Layout:
    """A row of the table. Rows of one name are forms of one layout, which a file may mix."""

    name: str
    columns: tuple[str, ...]
    """What a record of it has; `a|b`: one of them."""
    without: tuple[str, ...]
    """What it has not, where another layout's columns begin with these."""
    pairs: bool
    """Whether there are two answers."""
    convert: Callable[[Mapping[str, Any]], Record]
    source: str
    """Where it is described."""
    told: Callable[[Mapping[str, Any]], bool] = lambda record: True
    """What its columns must hold beside, where their names say too little."""

    def fits(self, given: frozenset[str], filled: frozenset[str]) -> bool:
        """Whether a record may be of it that has some columns, and holds something in some of these."""
        has = all(any(name in given for name in each.split("|")) for each in self.columns)
        return has and not any(name in filled for name in self.without)


_TRL = "https://huggingface.co/docs/trl/dataset_formats"
_SWIFT = "https://swift.readthedocs.io/en/latest/Customization/Custom-dataset.html"
_FACTORY = "https://github.com/hiyouga/LLaMA-Factory/blob/main/data/README.md"
_LLAVA = "https://github.com/haotian-liu/LLaVA/blob/main/docs/Finetune_Custom_Data.md"
_HUB = "https://huggingface.co/datasets/"

_ASKED = ("prompt", "question", "conversations", "messages", "instruction", "query")
_PAIR = ("chosen", "rejected", "reject", "rejected_response", "rejected_messages", "rejected_conversations")

LAYOUTS: tuple[Layout, ...] = (
    Layout("TRL", ("prompt", "chosen", "rejected"), ("img_path",), True, records.trl, _TRL),
    Layout("TRL", ("chosen", "rejected"), _ASKED, True, records.trl, _TRL, told=records.of_messages),
    Layout("TRL", ("prompt", "chosen"), ("rejected",), False, records.trl, _TRL),
    Layout("TRL", ("chosen",), ("rejected", *_ASKED), False, records.trl, _TRL, told=records.of_messages),
    Layout("TRL", ("prompt", "completion"), ("chosen",), False, records.trl, _TRL),
    Layout("TRL", ("messages",), (*_PAIR, "rejected_images"), False, records.trl, _TRL),
    Layout("LLaVA", ("conversations",), _PAIR, False, records.trl, _LLAVA),
    Layout(
        "RLHF-V", ("text",), (*_ASKED, *_PAIR), True, records.rlhf_v, _HUB + "openbmb/RLHF-V-Dataset", told=records.is_json_object
    ),
    Layout(
        "RLAIF-V", ("question", "chosen", "rejected", "origin_dataset"), (), True, records.mmpr, _HUB + "openbmb/RLAIF-V-Dataset"
    ),
    Layout("MMPR", ("question", "chosen", "rejected"), ("origin_dataset",), True, records.mmpr, _HUB + "OpenGVLab/MMPR-v1.1"),
    Layout("VLFeedback", ("prompt", "completions"), (), True, records.vlfeedback, _HUB + "MMInstruction/VLFeedback"),
    Layout(
        "Silkie's pairs",
        ("prompt", "img_path", "chosen", "rejected"),
        (),
        True,
        records.silkie,
        "https://github.com/vlf-silkie/VLFeedback/blob/main/run_dpo.py",
    ),
    Layout(
        "POVID",
        ("conversations", "rejected_conversations"),
        (),
        True,
        records.povid,
        "https://github.com/YiyangZhou/POVID/blob/main/llava/train/train_dpo.py",
    ),
    Layout(
        "HA-DPO",
        ("question", "chosen", "reject", "image_id|image"),
        ("rejected",),
        True,
        records.ha_dpo,
        "https://github.com/opendatalab/HA-DPO/blob/main/ha_dpo/models/minigpt4/dpo_dataset.py",
    ),
    Layout("ShareGPT", ("conversations", "chosen", "rejected"), (), True, records.share_gpt_pair, _FACTORY),
    Layout("LLaMA-Factory", ("messages", "chosen", "rejected"), ("prompt",), True, records.messages_pair, _FACTORY),
    Layout("LLaMA-Factory", ("instruction", "chosen", "rejected"), (), True, records.alpaca, _FACTORY),
    Layout("LLaMA-Factory", ("instruction", "output"), _PAIR, False, records.alpaca, _FACTORY),
    Layout(
        "ms-swift", ("messages", "rejected_response|rejected_messages|rejected_images"), _PAIR[:2], True, records.ms_swift, _SWIFT
    ),
    Layout("ms-swift", ("query", "response", "rejected_response"), (), True, records.ms_swift_query, _SWIFT),
    Layout("ms-swift", ("query", "response"), _PAIR, False, records.ms_swift_query, _SWIFT),
    Layout(
        "VQA",
        ("question", "answer|answers|multiple_choice_answer"),
        ("prompt", *_PAIR),
        False,
        records.vqa,
        "https://visualqa.org/download.html",
    ),
    Layout("prompts", ("prompt", "answer"), ("completion", *_PAIR), False, records.asked_and_answered, "docs/your_data.md"),
)
"""All of them. What two rows fit is refused."""

_TOLD_BY = frozenset(name for layout in LAYOUTS for each in (*layout.columns, *layout.without) for name in each.split("|"))


class UnknownLayout(Exception):
    """A record that no row of the table fits."""


class LayoutReader:
    """Reads the records of one file, all of one layout, as records with TRL's columns."""

    def __init__(self, columns: Mapping[Any, str] | None = None, *, pairs: bool) -> None:
        """columns: `ColumnName` -> what the file calls it; None: its columns tell its layout. pairs: two answers are needed."""
        self._columns, self._pairs = dict(columns or {}), pairs
        self.layout: str | None = None
        """Name of the layout of the records so far."""
        self.left_out: Counter[str] = Counter()
        """Records that LeftOut was raised for, by reason."""

    def read(self, record: Mapping[str, Any]) -> Record:
        """The record with TRL's columns. Raises UnknownLayout, LeftOut, or UnreadContent with the remedy."""
        if self._columns:
            self.layout = self.layout or "columns"
            return self._renamed(record)
        found = {layout.name: layout for layout in fitting(record, pairs=self._pairs)}
        if not found:
            raise UnknownLayout
        if len(found) > 1:
            names = " and ".join(f"{name} ({', '.join(layout.columns)})" for name, layout in found.items())
            raise UnreadContent(f"its columns are those of {names}; {_advice(record)}")
        (layout,) = found.values()
        self.layout = self.layout or layout.name
        if layout.name != self.layout:
            raise UnreadContent(
                f"its columns are those of {layout.name}, and of records before it those of {self.layout}; give each layout a file of its own"
            )
        try:
            return layout.convert(record)
        except LeftOut as left:
            self.left_out[left.reason] += 1
            raise

    def _renamed(self, record: Mapping[str, Any]) -> Record:
        lacking = [column for column in self._columns.values() if column not in record]
        if lacking:
            names = ", ".join(str(name) for name in record)
            raise UnreadContent(f"it has no column {lacking[0]!r}, which `columns` names; its columns are {names}")
        # What layouts are told by would else be read beside what was named.
        found = {name: value for name, value in record.items() if name not in _TOLD_BY and name not in self._columns.values()}
        for name in get_args(ColumnName):
            own = next((each for each in _OWN.get(name, (name,)) if record.get(each) is not None), None)
            column = self._columns.get(name, own)
            if column is None or record[column] is None:
                continue
            value = record[column]
            if name == "answer":
                value = records.true_answer(value, column)
                found["answer"] = value
            elif name == "question":
                value = records.turns(value, column)
            elif name in ("chosen", "rejected"):
                value = records.answer_of(value, column)
            elif name in ("images", "rejected_images") and not isinstance(value, list):
                value = [] if is_empty(value) else [value]
            found[_AS_TRL.get(name, name)] = value
        found.pop("image", None)
        return found


def fitting(record: Mapping[str, Any], *, pairs: bool) -> Iterator[Layout]:
    """The rows that a record fits. pairs: of those with two answers."""
    given = frozenset(name for name in record if name in _TOLD_BY and record[name] is not None)
    found = _fitting(given, frozenset(name for name in given if not is_empty(record[name])))
    return (layout for layout in found if (layout.pairs or not pairs) and layout.told(record))


@functools.lru_cache(maxsize=256)
def _fitting(given: frozenset[str], filled: frozenset[str]) -> tuple[Layout, ...]:
    """By the columns, which records of a file share."""
    return tuple(layout for layout in LAYOUTS if layout.fits(given, filled))


def _advice(record: Mapping[str, Any]) -> str:
    columns = [name for name in record if name in _TOLD_BY]
    return (
        "say what they are with `columns` (--columns '{question: …, chosen: …, rejected: …}'), one each of "
        f"{', '.join(map(str, columns))}"
    )
