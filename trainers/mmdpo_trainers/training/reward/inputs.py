"""What a reward model reads: a record's prompt with facts written into it, and whether it sees the pictures."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mmdpo_trainers.data.conversation import Conversation
from mmdpo_trainers.data.pair_records import record_conversation, record_name
from mmdpo_trainers.errors import DataError, RunFolderError, StageError
from mmdpo_trainers.files.atomic import read_json, write_atomic

FACTS = ("answer", "caption", "options")
"""Columns of a record that can be written into the prompt: the truth, a description of the pictures, the answers to choose from."""

TEMPLATE = """\
{{ prompt }}
{%- if caption %}

Caption: {{ caption }}
{%- endif %}
{%- if options %}

Options: {{ options | join(", ") }}
{%- endif %}
{%- if answer %}

Correct answer: {{ answer }}
{%- endif %}"""
"""The prompt with the facts that a record has, a line each."""

FILE = "reward_model.json"
"""File beside a reward model's adapter and head: its `RewardInputs`."""


@dataclass(frozen=True, kw_only=True)
class RewardInputs:
    """What a reward model was trained to read, and has to be given when it rates."""

    facts: tuple[str, ...] = ()
    """Of `FACTS`."""
    template: str = TEMPLATE
    """A jinja2 template of `prompt` (with `<image>` in a picture's place) and of the facts."""
    no_image: bool = False
    """Whether pictures are left out of the prompts."""

    def __post_init__(self) -> None:
        unknown = [name for name in self.facts if name not in FACTS]
        if unknown or len(set(self.facts)) != len(self.facts):
            raise ValueError(f"facts: expected some of {', '.join(FACTS)}, each once, got {list(self.facts)}")
        try:
            shown = _compiled(self.template).render(prompt="the prompt", **{name: f"the {name}" for name in FACTS})
        except jinja2.TemplateError as error:
            raise ValueError(f"facts_template: expected a jinja2 template of prompt, {', '.join(FACTS)}; {error}") from error
        if "the prompt" not in shown:
            raise ValueError("facts_template: expected a template that holds {{ prompt }}, got one that leaves it out")

    def prompt_of(self, record: Mapping[str, Any]) -> Conversation:
        """The record's prompt, its last question with the facts that it has.

        DataError naming a fact that is no text, or for options no list of texts.
        """
        found = record_conversation(record)
        if not self.facts:
            return found
        known = {name: self._fact(record, name) for name in self.facts}
        try:
            return found.map_question(lambda text: _compiled(self.template).render(prompt=text, **known))
        except jinja2.TemplateError as error:
            raise DataError(f"record {record_name(record)}: facts_template: {error}; mend the template") from error

    def known(self, records: Sequence[Mapping[str, Any]]) -> dict[str, int]:
        """How many of the records have each fact."""
        return {name: sum(self._fact(record, name) is not None for record in records) for name in self.facts}

    def _fact(self, record: Mapping[str, Any], name: str) -> Any:
        value = record.get(name)
        if value is None or value == "" or value == []:
            return None
        listed = isinstance(value, Sequence) and not isinstance(value, str)
        texts = list(value) if listed else [value]
        if not all(isinstance(text, str) for text in texts) or (name == "options" and not listed):
            expected = "a list of texts" if name == "options" else "a text, or a list of them"
            raise DataError(f"record {record_name(record)}: {name}: expected {expected}, got {str(value)[:80]!r}; mend it")
        return texts if name == "options" else " ".join(texts)

    @classmethod
    def of(cls, args: Mapping[str, Any]) -> RewardInputs:
        """Those of a training's arguments: `facts`, `facts_template`, `no_image`. Raises ValueError naming one that cannot be used."""
        facts = args.get("facts") or ()
        if isinstance(facts, str):
            raise ValueError(f"facts: expected a list, got the text {facts!r}")
        template = args.get("facts_template") or TEMPLATE
        return cls(facts=tuple(facts), template=template, no_image=bool(args.get("no_image", False)))

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write them beside a model."""
        write_atomic(Path(folder) / FILE, asdict(self))

    @classmethod
    def read(cls, folder: str | os.PathLike[str]) -> RewardInputs:
        """Those beside a model. StageError where the folder holds no reward model."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise StageError(
                f"{folder} is no reward model: there is no {FILE}; give the folder train/final of a run that trained one"
            )
        try:
            found = read_json(path)
            return cls(facts=tuple(found["facts"]), template=found["template"], no_image=found["no_image"])
        except (RunFolderError, KeyError, TypeError, ValueError, json.JSONDecodeError) as error:
            raise StageError(f"{path} cannot be read ({error}); restore it from the training that wrote it") from error


@functools.lru_cache(maxsize=8)
def _compiled(text: str) -> jinja2.Template:
    # Templates come with models, which may be somebody else's.
    environment = ImmutableSandboxedEnvironment(undefined=jinja2.Undefined, keep_trailing_newline=False)
    return environment.from_string(text)
