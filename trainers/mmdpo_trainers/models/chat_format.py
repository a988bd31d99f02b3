"""The model's own chat format: a prompt through its chat template, with its pictures as typed parts, on the run's date."""

from __future__ import annotations

import functools
import json
import logging
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from jinja2 import TemplateError

from mmdpo_trainers.data.records import IMAGE_TOKEN
from mmdpo_trainers.errors import StageError
from mmdpo_trainers.models.families import family_of
from mmdpo_trainers.models.template_date import ASKED, TemplateDate

logger = logging.getLogger(__name__)

Part = dict[str, str]
"""A typed part of a turn's content: `{"type": "text", "text": …}` or `{"type": "image"}`."""


def template_of(processor: Any) -> str | None:
    """The chat template that a processor renders by; None: it has none. StageError where it has several and none of them is "default"."""
    template = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    if isinstance(template, dict):
        if "default" not in template:
            raise StageError(
                f"the chat templates of {type(processor).__name__} are {', '.join(template)}; expected one named default: rename the one "
                "to render prompts by"
            )
        template = template["default"]
    return None if template is None else str(template)


def prints_date(processor: Any) -> bool:
    """Whether the chat template asks for today's date."""
    return ASKED in (template_of(processor) or "")


def render_prompt(processor: Any, prompt: str, date: TemplateDate | None = None) -> str:
    """One user turn and the opening of the answer, through the processor's chat template.

    The turn's content are typed parts, text and pictures in the prompt's order, as the model was trained with them; a picture then
    is the family's placeholder with the family's own image token. A line break behind `<image>` is not doubled where the template
    itself writes one there. A template that does not keep the order (LLaVA-1.5's collects pictures in front of the text) would undo
    the interleaving "Image1:<image>\\nImage2:<image>" that questions refer to: there the prompt goes in as one text, with what
    stands for a picture in place, which is logged once. Without a chat template: `Family.plain_prompt`.

    date: what the template is told; None: this moment, and no arguments.

    Raises StageError where the template changes the prompt or the number of pictures in it.
    """
    family = family_of(processor)
    placeholder, mark = family.placeholder(processor), family.processor_text(processor)
    chat = chat_of(processor, date)
    if chat is None:
        return family.plain_prompt(processor, prompt)
    rendered = chat.typed(prompt)
    if rendered is None:
        rendered = chat.as_text(prompt)
        if rendered is not None and IMAGE_TOKEN in prompt:
            say_one_text(chat.template)
    if rendered is None:
        raise StageError(
            f"the chat template of {type(processor).__name__} does not keep the text of a user turn ({prompt[:60]!r}); "
            "give the model folder a chat_template.jinja that does"
        )
    return rendered.replace(mark, placeholder)


def typed_parts(prompt: str) -> list[Part]:
    """A prompt as the content of a turn, `<image>` standing for a picture."""
    texts = prompt.split(IMAGE_TOKEN)
    parts: list[Part] = []
    for index, text in enumerate(texts):
        if index:
            parts.append({"type": "image"})
        if text or len(texts) == 1:
            parts.append({"type": "text", "text": text})
    return parts


@dataclass(frozen=True)
class Chat:
    """A chat template with what it needs. mark: the text that stands for a picture. arguments: its own in all of the run, as JSON."""

    template: str
    mark: str
    tokenizer: Any = field(compare=False, repr=False)
    date: TemplateDate | None = field(default=None, compare=False)
    arguments: str = ""

    @property
    def source(self) -> str:
        """The template, told the date."""
        return self.template if self.date is None else self.date.told(self.template)

    def render(self, messages: Sequence[dict[str, Any]], *, opens_answer: bool = True, **given: Any) -> str | None:
        """The conversation; None where the template does not take it. given: more of `apply_chat_template`."""
        own = json.loads(self.arguments) if self.arguments else {}
        options = {"add_generation_prompt": opens_answer, "tokenize": False, **own, **given}
        try:
            text = self.tokenizer.apply_chat_template(list(messages), chat_template=self.source, **options)
        except (TemplateError, TypeError, KeyError, ValueError):
            return None
        contents = [message["content"] for message in messages]
        # A template that knows of texts only may print the parts as Python does.
        printed = [repr(part) for content in contents if isinstance(content, list) for part in content]
        return None if any(each in text for each in printed) else str(text)

    def contents(self, prompt: str) -> Iterator[list[Part]]:
        """A turn's text as typed parts, in the forms that the template keeps in order; there may be none."""
        whole = typed_parts(prompt)
        # Blank text between pictures is layout, which the templates that collect pictures write themselves.
        shown = [part for part in whole if part["type"] == "image" or part["text"].strip()]
        for parts in (whole, shown) if shown and shown != whole else (whole,):
            breaks = _line_breaks(self, tuple(part["type"] for part in parts))
            if breaks is None:
                continue
            yield [
                {**part, "text": part["text"].removeprefix("\n")} if its_break else part
                for part, its_break in zip(parts, breaks, strict=True)
            ]

    def typed(self, prompt: str) -> str | None:
        """A prompt as typed parts; None where the template does not keep them in order."""
        for parts in self.contents(prompt):
            rendered = self.render([{"role": "user", "content": parts}])
            if rendered is not None and self._keeps(rendered, prompt):
                return rendered
        return None

    def as_text(self, prompt: str) -> str | None:
        """A prompt as one text that holds the marks of its pictures; None where the template does not keep it."""
        text = prompt.replace(IMAGE_TOKEN, self.mark)
        for content in ([{"type": "text", "text": text}], text):
            rendered = self.render([{"role": "user", "content": content}])
            # Templates may trim a turn.
            if rendered is not None and text.strip() in rendered and self._keeps(rendered, prompt):
                return rendered
        return None

    def _keeps(self, rendered: str, prompt: str) -> bool:
        texts = prompt.split(IMAGE_TOKEN)
        return rendered.count(self.mark) == len(texts) - 1 and all(text.strip() in rendered for text in texts)


def chat_of(processor: Any, date: TemplateDate | None = None) -> Chat | None:
    """A processor's chat template; None: it has none."""
    template, arguments = template_of(processor), "" if date is None else date.arguments
    if template is None:
        return None
    say_ignored(template, tuple(json.loads(arguments)) if arguments else ())
    return Chat(template, family_of(processor).processor_text(processor), processor.tokenizer, date, arguments)


@functools.lru_cache(maxsize=256)
def say_ignored(template: str, names: tuple[str, ...]) -> None:
    """Log, once, which arguments of these names the template does not read."""
    ignored = [name for name in names if not re.search(rf"\b{re.escape(name)}\b", template)]
    if ignored:
        logger.warning(
            "the chat template reads no %s: what is given by that name changes nothing (template: %s…)",
            ", ".join(ignored),
            " ".join(template.split())[:60],
        )


@functools.lru_cache(maxsize=256)
def _line_breaks(chat: Chat, kinds: tuple[str, ...]) -> tuple[bool, ...] | None:
    """By part of a content of these types, whether the template breaks the line between a picture and it; None: it mixes them up."""
    parts = [{"type": kind, "text": f"<<{place}>>"} if kind == "text" else {"type": kind} for place, kind in enumerate(kinds)]
    rendered = chat.render([{"role": "user", "content": parts}])
    if rendered is None or rendered.count(chat.mark) != kinds.count("image"):
        return None
    found: list[bool] = []
    start = 0
    for part in parts:
        written = part.get("text", chat.mark)
        place = rendered.find(written, start)
        if place < 0 or (part["type"] == "text" and rendered.count(written) != 1):
            return None
        behind_image = bool(found) and kinds[len(found) - 1] == "image"
        found.append(behind_image and part["type"] == "text" and rendered[start:place].startswith("\n"))
        start = place + len(written)
    return tuple(found)


@functools.lru_cache(maxsize=64)
def say_one_text(template: str) -> None:
    """Log, once a template, that it mixes pictures and texts up."""
    logger.info(
        "the chat template does not keep pictures in their places between texts; such prompts go in as one text with what stands for a "
        "picture in place (template: %s…)",
        " ".join(re.sub(r"\s+", " ", template).split())[:60],
    )
