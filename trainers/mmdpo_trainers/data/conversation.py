"""A conversation as all stages read it: turns whose texts have an `<image>` in a picture's place, pictures numbered in their order.

A plain text is the one turn of a user's. Files and records hold a prompt as that text, or as a list of messages (role, content, and what
else a chat template reads), beside the columns `tools` and `chat_template_kwargs`; `models.chat_format` alone renders them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmdpo_trainers.data.content import IMAGE_TOKEN, ImagePart, UnreadContent, check_fields, is_empty, read_parts

ROLES = ("system", "user", "assistant", "tool")
REASONING = ("reasoning_content", "thinking", "reasoning")
"""Fields in which an assistant's turn may have its thinking. Templates read one of them."""
TEMPLATE_COLUMNS = ("tools", "chat_template_kwargs")
"""Columns that a chat template gets beside the messages."""

_FIELDS = {"assistant": (*REASONING, "tool_calls"), "tool": ("name", "tool_call_id")}
"""Fields of a message, by role, that chat templates read beside role and content."""
_TAKEN = frozenset(
    {
        *("conversation", "conversations", "messages", "tools", "documents", "chat_template", "add_generation_prompt"),
        *("continue_final_message", "tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs", "processor_kwargs", "images", "videos"),
    }
)
"""Arguments of `apply_chat_template` that are no template's own."""

Stored = str | list[dict[str, Any]]
"""A prompt as records and files hold it."""


@dataclass(frozen=True)
class Turn:
    """One message. fields: what the template reads of it beside role and content, as JSON."""

    role: str
    text: str
    fields: str = ""

    @property
    def extras(self) -> dict[str, Any]:
        return dict(json.loads(self.fields)) if self.fields else {}

    def stored(self) -> dict[str, Any]:
        """The message as records hold it."""
        return {"role": self.role, "content": self.text, **self.extras}


@dataclass(frozen=True)
class Conversation:
    """A prompt. A last turn that is the assistant's is one that the answer goes on with.

    tools, arguments: of the template, as JSON; "" where there are none.
    """

    turns: tuple[Turn, ...]
    tools: str = ""
    arguments: str = ""

    @classmethod
    def of_text(cls, text: str) -> Conversation:
        return cls((Turn("user", text),))

    @property
    def plain(self) -> bool:
        """Whether it is the text of one user turn, and nothing else."""
        return self == Conversation.of_text(self.turns[0].text)

    @property
    def continues(self) -> bool:
        """Whether the answer goes on with the last turn."""
        return self.turns[-1].role == "assistant"

    @property
    def text(self) -> str:
        """The texts for readers, by role where there are several."""
        return words(self.stored())

    @property
    def pictures(self) -> int:
        """How many places for pictures there are."""
        return sum(turn.text.count(IMAGE_TOKEN) for turn in self.turns)

    def stored(self) -> Stored:
        """The prompt as records hold it."""
        turns = self.turns
        one = len(turns) == 1 and turns[0] == Turn("user", turns[0].text)
        return turns[0].text if one else self.messages()

    def messages(self) -> list[dict[str, Any]]:
        """The prompt as messages, their contents as texts."""
        return [turn.stored() for turn in self.turns]

    def map(self, change: Callable[[str], str]) -> Conversation:
        """The same with each turn's text changed."""
        return dataclasses.replace(self, turns=tuple(dataclasses.replace(turn, text=change(turn.text)) for turn in self.turns))

    def map_question(self, change: Callable[[str], str]) -> Conversation:
        """The same with the text of the user's last turn changed."""
        places = [place for place, turn in enumerate(self.turns) if turn.role == "user"]
        last = places[-1] if places else len(self.turns) - 1
        turns = [
            dataclasses.replace(turn, text=change(turn.text)) if place == last else turn for place, turn in enumerate(self.turns)
        ]
        return dataclasses.replace(self, turns=tuple(turns))

    def with_pictures_in_front(self, count: int, place: str = IMAGE_TOKEN) -> Conversation:
        """The same with `count` pictures at the beginning of the user's first turn, each as `place`."""
        first = next((place for place, turn in enumerate(self.turns) if turn.role == "user"), 0)
        turns = list(self.turns)
        turns[first] = dataclasses.replace(turns[first], text=place * count + turns[first].text)
        return dataclasses.replace(self, turns=tuple(turns))


def conversation_of(record: Mapping[str, Any]) -> Conversation:
    """The prompt of a record that has it in its stored form. Raises UnreadContent, naming place and remedy."""
    return with_template_columns(Conversation(read_prompt(record["prompt"])[0]), record)


def words(prompt: Stored | Any) -> str:
    """A stored prompt as one text for readers: that of the one user turn, or all turns, each under its role."""
    if isinstance(prompt, str):
        return prompt
    turns, _ = read_turns(prompt, "prompt")
    if len(turns) == 1 and turns[0].role == "user":
        return turns[0].text
    return "\n".join(f"{turn.role}: {' '.join([turn.text, turn.fields]).strip()}" for turn in turns)


def map_question(prompt: Stored, change: Callable[[str], str]) -> Stored:
    """A stored prompt with the text of the user's last turn changed."""
    if isinstance(prompt, str):
        return change(prompt)
    return Conversation(read_turns(prompt, "prompt")[0]).map_question(change).stored()


def read_prompt(prompt: Any) -> tuple[tuple[Turn, ...], list[ImagePart]]:
    """`read_turns` of a prompt: its last turn is the user's, a tool's, or one of the assistant's that the answer goes on with."""
    turns, places = read_turns(prompt, "prompt")
    if not any(turn.role == "user" for turn in turns):
        raise UnreadContent(f"prompt must be text or a list of messages with one of role user, got {str(prompt)[:120]}")
    if turns[-1].role == "system":
        raise UnreadContent("prompt ends with a system message; put it first, and the user's behind it")
    if turns[-1].role == "assistant" and turns[-1].fields:
        raise UnreadContent(
            f"prompt[{len(turns) - 1}], with which the answer goes on, has {', '.join(turns[-1].extras)}; give it as text alone"
        )
    return turns, places


def read_turns(messages: Any, column: str) -> tuple[tuple[Turn, ...], list[ImagePart]]:
    """The turns of a column (a text is one user turn), and all its places for pictures in order. Raises UnreadContent: place and remedy."""
    if isinstance(messages, str):
        return (Turn("user", messages),), []
    if not isinstance(messages, Sequence) or isinstance(messages, bytes) or not len(messages):
        raise UnreadContent(f"{column} must be text or a list of messages, got {str(messages)[:120]}")
    places: list[ImagePart] = []
    turns = []
    for number, message in enumerate(messages):
        turn, found = _turn(message, f"{column}[{number}]")
        turns.append(turn)
        places += found
    return tuple(turns), places


def _turn(message: Any, place: str) -> tuple[Turn, list[ImagePart]]:
    if not isinstance(message, Mapping) or message.get("role") not in ROLES:
        raise UnreadContent(
            f"{place} must be a message of one of the roles {', '.join(ROLES)}, such as {{'role': 'user', 'content': …}}, got "
            f"{str(message)[:120]}"
        )
    role, content = str(message["role"]), message.get("content")
    check_fields(message, place, read=("role", "content", *_FIELDS.get(role, ())))
    fields = {name: _without_nulls(message[name]) for name in _FIELDS.get(role, ()) if not is_empty(message.get(name))}
    _check_thinking(fields, place)
    if "tool_calls" in fields and (content is None or content == []):
        content = ""
    parts = read_parts(content, f"{place}['content']")
    text = "".join(IMAGE_TOKEN if isinstance(part, ImagePart) else part for part in parts)
    kept = json.dumps(fields, ensure_ascii=False) if fields else ""
    return Turn(role, text, kept), [part for part in parts if isinstance(part, ImagePart)]


def _check_thinking(fields: Mapping[str, Any], place: str) -> None:
    given = [name for name in REASONING if name in fields]
    if len(given) > 1:
        raise UnreadContent(f"{place} gives its thinking as {' and as '.join(given)}; leave one of them")
    if given and not isinstance(fields[given[0]], str):
        raise UnreadContent(f"{place}[{given[0]!r}] must be text, got {str(fields[given[0]])[:80]!r}")


def with_template_columns(conversation: Conversation, record: Mapping[str, Any]) -> Conversation:
    """The conversation with the record's `tools` and `chat_template_kwargs`. Raises UnreadContent for what is none."""
    tools = _decoded(record.get("tools"), "tools", list)
    arguments = _decoded(record.get("chat_template_kwargs"), "chat_template_kwargs", dict)
    # A table of a file has every record's arguments; those that are null were not given.
    arguments = {name: value for name, value in arguments.items() if value is not None}
    check_arguments(arguments, "column 'chat_template_kwargs'")
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise UnreadContent(f"column 'tools' must be a list of JSON schemas of functions, got {str(tools)[:120]}")
    return dataclasses.replace(
        conversation,
        tools=json.dumps(_without_nulls(tools), ensure_ascii=False) if tools else "",
        arguments=json.dumps(arguments, ensure_ascii=False, sort_keys=True) if arguments else "",
    )


def check_arguments(arguments: Mapping[str, Any], place: str) -> None:
    """UnreadContent for an argument that is not a template's own."""
    taken = sorted(_TAKEN & set(arguments))
    if taken:
        raise UnreadContent(
            f"{place} holds {taken[0]!r}, which is no argument of a chat template's own; it may hold what the model's template reads, such "
            "as enable_thinking"
        )


def _decoded(value: Any, column: str, kind: type) -> Any:
    if is_empty(value):
        return kind()
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise UnreadContent(f"column {column!r} is not read: its text is no JSON ({error}), got {value[:80]!r}") from error
    if not isinstance(value, kind):
        expected = "a list of JSON schemas" if kind is list else "a mapping of a chat template's arguments"
        raise UnreadContent(f"column {column!r} must be {expected}, or JSON of that, got {str(value)[:120]!r}")
    return value


def _without_nulls(value: Any) -> Any:
    """Without the keys that a table gave records that have them not."""
    if isinstance(value, Mapping):
        return {name: _without_nulls(each) for name, each in value.items() if each is not None}
    if isinstance(value, list | tuple):
        return [_without_nulls(each) for each in value]
    return value


def _is_conversation(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0


def extract_prompt(record: Mapping[str, Any], columns: Sequence[str] = ()) -> dict[str, Any]:
    """A record whose prompt is the beginning that `chosen` and `rejected` share, with that in `prompt`, as TRL's `extract_prompt`.

    columns: further responses, which may begin with the same messages. Any other record as it is. Raises UnreadContent where nothing is
    shared, or the columns are texts.
    """
    chosen, rejected = record.get("chosen"), record.get("rejected")
    if record.get("prompt") is not None or chosen is None or rejected is None:
        return dict(record)
    if not (_is_conversation(chosen) and _is_conversation(rejected)):
        raise UnreadContent("there is no prompt; give it in `prompt`, or give chosen and rejected as messages that begin alike")
    least = min(len(chosen), len(rejected))
    shared = next((at for at in range(least) if chosen[at] != rejected[at]), least - 1)
    if not shared:
        raise UnreadContent(
            "there is no prompt, and chosen and rejected differ from their first message on; give the prompt in `prompt`, or both as "
            "conversations that begin alike"
        )
    prompt = list(chosen[:shared])
    found = {**record, "prompt": prompt, "chosen": list(chosen[shared:]), "rejected": list(rejected[shared:])}
    for column in columns:
        value = record.get(column)
        if isinstance(value, Sequence) and not isinstance(value, str) and list(value[:shared]) == prompt:
            found[column] = list(value[shared:])
    return found
