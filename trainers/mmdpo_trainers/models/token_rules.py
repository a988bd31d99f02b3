"""The one rule by which texts become tokens, in every stage: what opens a prompt, what ends an answer, what neither may hold."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Collection, Iterator
from typing import Any

import numpy as np

from mmdpo_trainers.data.conversation import Conversation, Turn
from mmdpo_trainers.data.records import IMAGE_TOKEN
from mmdpo_trainers.errors import DataError, StageError
from mmdpo_trainers.models.chat_format import Chat, chat_of, prints_date, render_prompt, template_of
from mmdpo_trainers.models.families import family_of
from mmdpo_trainers.models.template_date import TemplateDate
from mmdpo_trainers.models.turns_format import answer_text, closing, render_conversation, thinks

_PROBE = "<<text>>"
_KEPT_TOKENS = 2**25
"""Most token ids that an encoder keeps: 128 MiB."""


def end_tokens(generation_config: Any) -> list[int]:
    """Tokens that end an answer, as the model itself says."""
    end = generation_config.eos_token_id
    return [end] if isinstance(end, int) else list(end or [])


def response_end(processor: Any, generation_config: Any) -> int | None:
    """The token that a response of preference data ends with: of those that end an answer the one that the chat template closes a turn
    with, else the tokenizer's own end, else the model's first; None: there is none.
    """
    tokenizer, chat = processor.tokenizer, chat_of(processor)
    own = tokenizer.eos_token_id
    ends = list(dict.fromkeys([*([] if own is None else [own]), *end_tokens(generation_config)]))
    closes = "" if chat is None else closing(chat).lstrip()
    return next((end for end in ends if closes.startswith(tokenizer.convert_ids_to_tokens(end))), next(iter(ends), None))


class TextEncoder:
    """Prompts and answers of one model as token ids.

    A prompt, of one turn or several, is rendered by the chat template. In front of it is what the tokenizer puts in front of a text (most
    often the beginning-of-sequence token), unless the template writes the beginning itself; nothing is put behind it, whatever the
    tokenizer does, as the answer goes there. An answer is its text's own tokens, without a beginning and without an end: who needs its end
    adds one end token, and a text that already ends with one means the same. Thinking and tool calls of an answer are what the template
    prints for them. Texts that hold other tokens of the chat format, and prompts that are already in it, are refused.

    Args:
        processor: the model's.
        image_token_id: of the token that stands for an image feature.
        end_ids: tokens that end an answer.
        date: what the chat template is told; None: this moment, each time, and no arguments.
    """

    def __init__(
        self, processor: Any, *, image_token_id: int, end_ids: Collection[int], date: TemplateDate | None = None
    ) -> None:
        self.processor, self.date = processor, date
        self.image_token_id, self.end_ids = image_token_id, frozenset(end_ids)
        self._kept = _KeptTokens()

    def prompt(self, name: str, prompt: str | Conversation, pictures: int) -> list[int]:
        """Ids of a prompt, `<image>` as one image token. pictures: how many it is about.

        Raises DataError, naming the record, for a text that cannot stand in a turn, or has more or fewer image tokens, or what the chat
        template does not print.
        """
        conversation = Conversation.of_text(prompt) if isinstance(prompt, str) else prompt

        def made() -> list[int]:
            self.check_conversation(name, conversation)
            return self.tokens(self.rendered(name, conversation))

        ids = self._kept_ids(str(conversation), made)
        found = ids.count(self.image_token_id)
        if found != pictures:
            raise DataError(
                f"record {name}: the prompt has {found} image tokens for {pictures} pictures; write {IMAGE_TOKEN} "
                "for a picture, and take the model's own image token out of the text"
            )
        return ids

    def tokens(self, rendered: str) -> list[int]:
        """Ids of a rendered prompt."""
        plain = self._plain(rendered)
        return [*self._opening(rendered, plain), *plain]

    def opening(self, rendered: str) -> str:
        """The text of what the tokenizer puts in front of a rendered prompt."""
        return "".join(self.processor.tokenizer.convert_ids_to_tokens(self._opening(rendered, self._plain(rendered))))

    def _kept_ids(self, key: str, made: Callable[[], list[int]]) -> list[int]:
        # A date that is this moment's makes another prompt each time.
        passing = self.date is None and prints_date(self.processor)
        return made() if passing else self._kept.ids(f"{template_of(self.processor)}\0{self.date!r}\0{key}", made)

    def rendered(self, name: str, conversation: Conversation) -> str:
        """A prompt through the chat template, with the family's placeholder for each picture; what `opening` says stands not in it.

        Raises DataError, naming the record, for what the chat template does not print.
        """
        if conversation.plain:
            return render_prompt(self.processor, conversation.turns[0].text, self.date)
        with self._named(name):
            text = render_conversation(self._chat(name), conversation)
        family = family_of(self.processor)
        return text.replace(family.processor_text(self.processor), family.placeholder(self.processor))

    @staticmethod
    @contextlib.contextmanager
    def _named(name: str) -> Iterator[None]:
        """What the chat template does not print as a DataError that names the record."""
        try:
            yield
        except StageError as error:
            raise DataError(f"record {name}: {error}") from error

    def _chat(self, name: str) -> Chat:
        chat = chat_of(self.processor, self.date)
        if chat is None:
            raise DataError(
                f"record {name}: the model folder has no chat template, and only prompts of one user turn go without; give it a "
                "chat_template.jinja"
            )
        return chat

    def check_conversation(self, name: str, conversation: Conversation) -> None:
        """DataError, naming the record, for a prompt that holds tokens of the chat format or is already in it, or goes into none."""
        for turn in conversation.turns:
            if turn.role == "user":
                self.check_prompt(name, turn.text)
            else:
                self._refuse_markers(name, f"the prompt's {turn.role} turn", turn.text + turn.fields)
        if not conversation.plain:
            self.rendered(name, conversation)

    def response(self, name: str, column: str, conversation: Conversation, turn: Turn) -> list[int]:
        """Ids of an answer to a prompt, without its end: of its text, or of what the chat template prints for its thinking and tool calls.

        Raises DataError, naming the record, as `answer_text`, and for what is not printed.
        """
        text = self.answer_text(name, column, turn.text)
        chat = chat_of(self.processor, self.date)
        if chat is None or (not turn.fields and not thinks(chat)):
            if turn.fields:
                self._chat(name)
            return self.answer(name, column, text)
        self._refuse_markers(name, column, turn.fields)

        def made() -> list[int]:
            with self._named(f"{name}: {column}"):
                ids = self._plain(answer_text(chat, conversation, dataclasses.replace(turn, text=text)))
            self.check_answer_ids(name, column, ids)
            return ids

        return self._kept_ids(f"{conversation}\0{turn}", made)

    def check_prompt(self, name: str, text: str) -> None:
        """DataError, naming the record, for the text of a user's turn that holds tokens of the chat format or is already in it."""
        self._refuse_markers(name, "the prompt", text)
        shown = text.strip()
        for marker, found in zip(self._turn, (shown.startswith, shown.endswith), strict=True):
            if marker and found(marker):
                raise DataError(
                    f"record {name}: the prompt already has {marker!r}, which the chat template puts around it; give the text of the "
                    "user's turn alone"
                )

    def answer_text(self, name: str, what: str, text: str) -> str:
        """An answer without the end token that it may have at its end. what: the answer's column or place, for messages.

        Raises DataError, naming the record, where there is another token of the chat format, or a picture, in it.
        """
        bare = text.rstrip()
        end = next((end for end in self._ends if bare.endswith(end)), None)
        if end is not None:
            text = bare.removesuffix(end)
        if IMAGE_TOKEN in text or self._image_token in text:
            raise DataError(f"record {name}: {what} holds the image token; only prompts have pictures")
        self._refuse_markers(name, what, text)
        return text

    def answer(self, name: str, what: str, text: str) -> list[int]:
        """Ids of `answer_text`."""

        def made() -> list[int]:
            ids = self._plain(self.answer_text(name, what, text))
            self.check_answer_ids(name, what, ids)
            return ids

        return self._kept.ids(text, made)

    def check_answer_ids(self, name: str, what: str, ids: Collection[int]) -> None:
        """DataError, naming the record, for an answer of given ids with a picture in it."""
        if self.image_token_id in ids:
            raise DataError(f"record {name}: {what} holds the image token; only prompts have pictures")

    def _plain(self, text: str) -> list[int]:
        return list(self.processor.tokenizer(text, add_special_tokens=False).input_ids)

    def _opening(self, rendered: str, plain: list[int]) -> list[int]:
        bos = self.processor.tokenizer.bos_token
        if bos and rendered.startswith(bos):
            return []
        full = list(self.processor.tokenizer(rendered).input_ids)
        start = next((at for at in range(len(full) - len(plain) + 1) if full[at : at + len(plain)] == plain), None)
        if start is None:
            raise StageError(
                f"{type(self.processor.tokenizer).__name__}: its special tokens change the tokens of the text they are put around "
                f"({rendered[:60]!r}), so that prompt and answer cannot be put together; use a tokenizer.json whose post-processor adds "
                "tokens in front only"
            )
        return full[:start]

    def _refuse_markers(self, name: str, what: str, text: str) -> None:
        found = self._markers.search(text)
        if found is not None:
            raise DataError(
                f"record {name}: {what} holds {found[0]!r}, a token of the model's chat format, which its chat template writes around "
                "texts; give the text alone"
            )

    @functools.cached_property
    def _image_token(self) -> str:
        return str(self.processor.tokenizer.convert_ids_to_tokens(self.image_token_id))

    @functools.cached_property
    def _special(self) -> dict[str, int]:
        """Special tokens by text. Words that the vocabulary lacks are no marks."""
        tokenizer = self.processor.tokenizer
        named = dict(zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True))
        added = {token.content: id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        return {text: id for text, id in {**named, **added}.items() if text and text != tokenizer.unk_token}

    @functools.cached_property
    def _ends(self) -> list[str]:
        return [text for text, id in self._special.items() if id in self.end_ids]

    @functools.cached_property
    def _markers(self) -> re.Pattern[str]:
        """Special tokens that begin and end sequences, turns and pictures."""
        tokenizer, family = self.processor.tokenizer, family_of(self.processor)
        written = [self._around, family.placeholder(self.processor), family.processor_text(self.processor)]
        written += [tokenizer.bos_token or "", tokenizer.eos_token or "", tokenizer.pad_token or "", *self._ends]
        # `<image>` of a prompt, and pictures that are too many or too few, have messages of their own.
        kept = [
            text for text in self._special if text not in (self._image_token, IMAGE_TOKEN) and any(text in w for w in written)
        ]
        return re.compile("|".join(map(re.escape, sorted(kept, key=len, reverse=True))) or "(?!)")

    @functools.cached_property
    def _around(self) -> str:
        """What the chat template writes around the texts of a user's and an assistant's turn."""
        chat = chat_of(self.processor, self.date)
        if chat is None:
            return ""
        turns = (("user", "assistant"), ("user",))
        contents: tuple[Any, ...] = ([{"type": "text", "text": _PROBE}], _PROBE)
        for content in contents:
            found = [
                chat.render([{"role": role, "content": content} for role in roles], opens_answer=len(roles) == 1)
                for roles in turns
            ]
            if any(found):
                return "".join(text for text in found if text)
        return ""

    @functools.cached_property
    def _turn(self) -> tuple[str, str]:
        """What of the chat template's text, special tokens aside, a prompt that is already in it begins and ends with; "": nothing."""
        rendered = render_prompt(self.processor, _PROBE, self.date)
        before, _, behind = rendered.partition(_PROBE)
        pattern = "|".join(map(re.escape, self._special)) or "(?!)"
        lines = [re.split(rf"{pattern}|\n", side)[-1].strip() for side in (before.rstrip(), behind.rstrip())]
        # A role's name alone is a word as any other.
        return tuple(line if re.search(r"\w", line) and re.search(r"[^\w\s]", line) else "" for line in lines)  # type: ignore[return-value]


class _KeptTokens:
    """Token ids by text, until there are too many of them: texts that come later are made into tokens again."""

    def __init__(self) -> None:
        self._ids: dict[bytes, np.ndarray] = {}
        self._room = _KEPT_TOKENS

    def ids(self, text: str, made: Callable[[], list[int]]) -> list[int]:
        """Those that `made` gives for a text."""
        key = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        known = self._ids.get(key)
        if known is not None:
            return known.tolist()  # type: ignore[no-any-return]
        ids = made()
        if len(ids) <= self._room:
            self._ids[key] = np.array(ids, dtype=np.int32)
            self._room -= len(ids)
        return ids
