"""Conversations through a chat template: several turns, tools, thinking, turns that are gone on with, and what of it is the answer.

What the template prints is the prompt, in every stage. A template that leaves out what a turn holds is not used with it: the record is
refused. Thinking in turns before the last question is the exception, which templates leave out by design.
"""

from __future__ import annotations

import functools
import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from mmdpo_trainers.data.content import IMAGE_TOKEN
from mmdpo_trainers.data.conversation import REASONING, Conversation, Turn
from mmdpo_trainers.errors import StageError
from mmdpo_trainers.models.chat_format import Chat, say_ignored, say_one_text

_PROBE = "<<text>>"
_THOUGHT = re.compile(r".*</think>", re.DOTALL)


def render_conversation(chat: Chat, conversation: Conversation, answer: Turn | None = None) -> str:
    """The prompt with the opening of its answer, or with `answer` and what closes it; a picture is the family's mark.

    Contents are typed parts, as the model was trained with; texts where the template takes only these. A last turn that is the
    assistant's is left open, and an answer goes on with it. Raises StageError saying what the template does not print.
    """
    turns = conversation.turns
    if answer is not None:
        last = turns[-1]
        turns = (*turns[:-1], Turn("assistant", last.text + answer.text)) if conversation.continues else (*turns, answer)
    given: dict[str, Any] = json.loads(conversation.arguments) if conversation.arguments else {}
    if conversation.tools:
        given["tools"] = json.loads(conversation.tools)
    say_ignored(chat.template, tuple(given))
    if answer is None and conversation.continues:
        given["continue_final_message"] = True
    opens = answer is None and not conversation.continues
    wrong = None
    for as_text, messages in _layouts(chat, turns):
        rendered = chat.render(messages, opens_answer=opens, **given)
        if rendered is None:
            continue
        missing = _missing(chat, turns, rendered)
        if missing is None:
            if as_text and any(IMAGE_TOKEN in turn.text for turn in turns):
                say_one_text(chat.template)
            return rendered
        # Of parts, which come first: what texts lack besides is no matter of the record's.
        wrong = wrong or missing
    roles = ", ".join(turn.role for turn in turns)
    raise StageError(
        f"the chat template does not print {wrong or 'that conversation'} (turns: {roles}); leave it out, or give the model folder a "
        "chat_template.jinja that prints it"
    )


def _layouts(chat: Chat, turns: Sequence[Turn]) -> Iterator[tuple[bool, list[dict[str, Any]]]]:
    """Messages to try in turn, and whether pictures are marks in their texts: parts, texts where no picture is, and marks in texts."""

    def typed(turn: Turn) -> Any:
        return next(chat.contents(turn.text), None)

    def typed_if_pictured(turn: Turn) -> Any:
        return typed(turn) if IMAGE_TOKEN in turn.text else turn.text

    def part(turn: Turn) -> Any:
        return [{"type": "text", "text": marked(turn)}]

    def marked(turn: Turn) -> Any:
        return turn.text.replace(IMAGE_TOKEN, chat.mark)

    makers: tuple[Callable[[Turn], Any], ...] = (typed, typed_if_pictured, part, marked)
    if any(IMAGE_TOKEN in turn.text for turn in turns if turn.role != "user"):
        # A mark in a text would slip by a template that has pictures in turns of the user's alone.
        makers = makers[:2]
    for maker in makers:
        # A call of tools alone has no content to put into parts.
        contents = [maker(turn) if turn.text or not turn.fields else "" for turn in turns]
        if all(content is not None for content in contents):
            yield (
                maker in (part, marked),
                [{"role": turn.role, "content": content, **_extras(turn)} for turn, content in zip(turns, contents, strict=True)],
            )


def _extras(turn: Turn) -> dict[str, Any]:
    """A turn's fields, its thinking under all names that templates read, as transformers gives it from 5.24 on."""
    fields = turn.extras
    thought = next((fields[name] for name in REASONING if name in fields), None)
    return fields if thought is None else {**fields, **dict.fromkeys(REASONING, thought)}


def _missing(chat: Chat, turns: Sequence[Turn], rendered: str) -> str | None:
    """What of the turns is not in the text, or not in their order; None: nothing."""
    start = 0
    for number, turn in enumerate(turns):
        where, begin = f"turn {number + 1} ({turn.role})", start
        text = _THOUGHT.sub("", turn.text) if turn.role == "assistant" else turn.text
        for index, piece in enumerate(text.split(IMAGE_TOKEN)):
            for shown, what in ((chat.mark, f"a picture of {where}"), (piece.strip(), f"the text of {where}")):
                if shown is chat.mark and not index:
                    continue
                # A system turn may stand elsewhere.
                place = rendered.find(shown, 0 if turn.role == "system" else start)
                if place < 0:
                    return what
                start = start if turn.role == "system" else place + len(shown)
        if not thinks(chat) and any(name in turn.extras for name in REASONING):
            return f"the thinking of {where}"
        for call in turn.extras.get("tool_calls", ()):
            name = str((call.get("function") or call).get("name")) if isinstance(call, dict) else str(call)
            if rendered.find(name, begin) < 0:
                return f"the tool call {name!r} of {where}"
    places = sum(turn.text.count(IMAGE_TOKEN) for turn in turns)
    if rendered.count(chat.mark) != places:
        return f"{places} pictures as {places}: it has {rendered.count(chat.mark)}"
    return None


def answer_text(chat: Chat, conversation: Conversation, answer: Turn) -> str:
    """What of an answer is the response: its own text, or where the template prints more (thinking, tool calls), what it prints.

    That is what is behind the opened prompt in the whole conversation, as in TRL, up to what closes the turn. Raises StageError, saying
    what is not printed.
    """
    if not answer.fields and not thinks(chat):
        return answer.text
    if answer.fields and conversation.continues:
        raise StageError(
            "an answer that goes on with the prompt's last turn is text alone; leave its thinking and tool calls out"
        )
    prompt, whole = render_conversation(chat, conversation), render_conversation(chat, conversation, answer)
    start = len(os.path.commonprefix([prompt, whole]))
    body = whole[start:].removesuffix(closing(chat))
    if not answer.fields and body.strip() == answer.text.strip():
        return answer.text
    if start < len(prompt):
        raise StageError(
            f"the prompt opens the answer with {prompt[start:][:60]!r}, where the chat template prints {body[:60]!r} for this one; let both "
            "think or neither (chat_template_kwargs)"
        )
    thought = next((answer.extras[name] for name in REASONING if name in answer.extras), "")
    if thought.strip() not in body:
        raise StageError("the chat template does not print the thinking of an answer; write it into the content, or leave it out")
    return body


def thinks(chat: Chat) -> bool:
    """Whether the chat template knows thinking, and so may print an answer of text alone with more around it."""
    return re.search(r"think|reasoning", chat.template) is not None


@functools.lru_cache(maxsize=64)
def closing(chat: Chat) -> str:
    """What the chat template writes behind an answer; "": nothing, or it takes none."""
    for content in ([{"type": "text", "text": _PROBE}], _PROBE):
        rendered = chat.render([{"role": role, "content": content} for role in ("user", "assistant")], opens_answer=False)
        if rendered is not None and rendered.count(_PROBE) == 2:
            return rendered.rpartition(_PROBE)[2]
    return ""
