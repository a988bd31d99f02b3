"""Records of published layouts as records with TRL's columns: what `layouts.LAYOUTS` converts with.

Each takes a record and gives one with `prompt`, `chosen` and `rejected` (or `completion`), and `image` or `images`; columns that the layout does
not name stay as they are. They raise UnreadContent, with place and remedy, for what cannot be read, and LeftOut for a record of which no
pair can be made though nothing is wrong with it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mmdpo_trainers.data.content import UnreadContent, is_empty

Record = dict[str, Any]

_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
"""`from` of ShareGPT's turns -> role."""
_ANSWERS = ("answer", "multiple_choice_answer", "answers")
"""Columns of VQA data with the truth, the first that a record has counts."""
_WITHOUT_IT = "correct it, or leave the record out"


class LeftOut(Exception):
    """A record of which no pair can be made, though nothing is wrong with it. reason: as `lost` counts it."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


def trl(record: Mapping[str, Any]) -> Record:
    """A record that has TRL's columns; turns of ShareGPT's in them become messages, and a message alone a list of it."""
    answers = {name: answer_of(record[name], name) for name in ("chosen", "rejected", "completion") if name in record}
    return {**record, **({"prompt": turns(record["prompt"], "prompt")} if "prompt" in record else {}), **answers}


def _with(record: Mapping[str, Any], taken: Sequence[str], **made: Any) -> Record:
    """The record with other columns in place of those taken."""
    return {**{name: value for name, value in record.items() if name not in taken}, **made}


def mmpr(record: Mapping[str, Any]) -> Record:
    """`question`, `chosen`, `rejected`, and `image`: a picture, a list of them, or none."""
    image = record.get("image")
    pictures = [] if is_empty(image) else image if isinstance(image, list) else [image]
    images = {"images": [*(record.get("images") or ()), *pictures]} if pictures else {}
    return _with(record, ("question", "image"), prompt=record["question"], **images)


def of_messages(record: Mapping[str, Any]) -> bool:
    """Whether `chosen` may begin with the prompt."""
    return not isinstance(record["chosen"], str)


def is_json_object(record: Mapping[str, Any]) -> bool:
    """Whether `text` looks like a JSON object."""
    return str(record["text"]).lstrip().startswith("{")


def rlhf_v(record: Mapping[str, Any]) -> Record:
    """`text`, JSON of `question`, `chosen` and `rejected`."""
    try:
        texts = json.loads(record["text"])
    except json.JSONDecodeError as error:
        raise UnreadContent(f"text is no JSON of a question and two answers ({error}); {_WITHOUT_IT}") from error
    missing = [name for name in ("question", "chosen", "rejected") if not isinstance(texts.get(name), str)]
    if missing:
        raise UnreadContent(f"the JSON in text has no {missing[0]!r}, but {', '.join(texts)}; {_WITHOUT_IT}")
    return _with(record, ("text",), prompt=texts["question"], chosen=texts["chosen"], rejected=texts["rejected"])


def ha_dpo(record: Mapping[str, Any]) -> Record:
    """`question`, `chosen`, `reject`, and the number of a picture of Visual Genome, whose file is called by it.

    As in the released code, records that the model had answered rightly (`correct`) are left out.
    """
    if record.get("correct") is True:
        raise LeftOut("correct", "the model's own answer was right, so there is no rejected one")
    picture = {} if "image" in record else {"image": f"{record['image_id']}.jpg"}
    taken = ("question", "reject", "image_id", "answer")
    return _with(record, taken, prompt=record["question"], rejected=record["reject"], **picture)


def silkie(record: Mapping[str, Any]) -> Record:
    """TRL's columns with the picture's path in `img_path`."""
    return _with(record, ("img_path",), image=record["img_path"])


def vlfeedback(record: Mapping[str, Any]) -> Record:
    """`prompt` with several rated `completions`: the best by the mean of its ratings is chosen, the worst rejected.

    Of completions with the same rating the first counts; those with a rating that is no number are passed over, as in the released code.
    The picture is in `image` or `img_path`, or in the published folder of pictures under the record's id.
    """
    rated = []
    for number, completion in enumerate(_completions(record["completions"])):
        rating = _rating(completion.get("annotations"))
        if rating is not None and isinstance(completion.get("response"), str):
            rated.append((rating, -number, completion["response"]))
    if len(rated) < 2:
        raise LeftOut("unrated", f"{len(rated)} of its completions has a rating in numbers; two are needed")
    best, worst = max(rated), min(rated, key=lambda each: (each[0], -each[1]))
    if best[0] == worst[0]:
        raise LeftOut("tie", f"all {len(rated)} completions are rated {best[0]:g}")
    given = next((record[name] for name in ("image", "images", "img_path") if not is_empty(record.get(name))), None)
    picture = f"merged_images/{record['id']}.jpg" if given is None and "id" in record else given
    taken = ("completions", "models", "images", "img_path")
    return _with(record, taken, chosen=best[2], rejected=worst[2], image=picture)


def _completions(given: Any) -> list[Mapping[str, Any]]:
    """A list of completions, or one of `datasets`, which keeps a list of records as lists by column."""
    if isinstance(given, Mapping) and all(isinstance(each, Sequence) for each in given.values()):
        given = [dict(zip(given, values, strict=True)) for values in zip(*given.values(), strict=False)]
    if not isinstance(given, Sequence) or not all(isinstance(each, Mapping) for each in given):
        raise UnreadContent(f"completions must be a list of answers with annotations, got {str(given)[:120]}; {_WITHOUT_IT}")
    return list(given)


def _rating(annotations: Any) -> float | None:
    """The mean of the ratings of all aspects; None: one of them is no number, or there is none."""
    try:
        given = [float(each["Rating"]) for each in annotations.values()]
        return sum(given) / len(given)
    except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError):
        return None


def povid(record: Mapping[str, Any]) -> Record:
    """`conversations` that end with the better answer, `rejected_conversations` with the worse one."""
    chosen, rejected = (_share_gpt(record[name], name) for name in ("conversations", "rejected_conversations"))
    return _with(record, ("conversations", "rejected_conversations"), chosen=chosen, rejected=rejected)


def share_gpt_pair(record: Mapping[str, Any]) -> Record:
    """`conversations` up to a question, `chosen` and `rejected` as turns of them or as texts; `system` is its first message."""
    prompt = _opened(record, _share_gpt(record["conversations"], "conversations"))
    answers = {name: answer_of(record[name], name) for name in ("chosen", "rejected")}
    return _with(record, ("conversations", "system"), prompt=prompt, **answers)


def messages_pair(record: Mapping[str, Any]) -> Record:
    """`messages` up to a question, `chosen` and `rejected` as messages or as texts."""
    answers = {name: answer_of(record[name], name) for name in ("chosen", "rejected")}
    return _with(record, ("messages", "system"), prompt=_opened(record, _messages(record["messages"], "messages")), **answers)


def ms_swift(record: Mapping[str, Any]) -> Record:
    """`messages` that end with the better answer; `rejected_response`, the worse one, or `rejected_messages`, the conversation with it."""
    messages = _opened(record, _messages(record["messages"], "messages"))
    other, answer = record.get("rejected_messages"), record.get("rejected_response")
    if is_empty(other) and answer is None:
        raise UnreadContent(
            "it has rejected_images, but neither rejected_response nor rejected_messages; give it a worse answer too, and the pictures are "
            "those of the corrupted view"
        )
    if not is_empty(other) and answer is not None:
        raise UnreadContent("it has its worse answer in rejected_response and in rejected_messages; leave one of them")
    taken = ("messages", "system", "rejected_response", "rejected_messages")
    if answer is None:
        return _with(record, taken, chosen=messages, rejected=_opened(record, _messages(other, "rejected_messages")))
    if len(messages) < 2 or messages[-1].get("role") != "assistant":
        raise UnreadContent(f"messages must end with the better answer, of role assistant, got {str(messages[-1])[:120]}")
    return _with(record, taken, prompt=messages[:-1], chosen=messages[-1:], rejected=answer_of(answer, "rejected_response"))


def ms_swift_query(record: Mapping[str, Any]) -> Record:
    """`query` with `response`, and for pairs `rejected_response`; `system`, and turns before in `history`."""
    taken = ("query", "response", "rejected_response", "system", "history")
    rejected = {} if record.get("rejected_response") is None else {"rejected": record["rejected_response"]}
    name = "chosen" if rejected else "completion"
    return _with(record, taken, prompt=_asked(record, record["query"]), **{name: record["response"]}, **rejected)


def alpaca(record: Mapping[str, Any]) -> Record:
    """`instruction`, on the next line `input`; `output`, or `chosen` and `rejected`; `system`, and turns before in `history`."""
    asked = "\n".join(str(record[name]) for name in ("instruction", "input") if not is_empty(record.get(name)))
    answer = {} if record.get("chosen") is not None else {"completion": record.get("output")}
    return _with(record, ("instruction", "input", "output", "system", "history"), prompt=_asked(record, asked), **answer)


def vqa(record: Mapping[str, Any]) -> Record:
    """`question` with its truth in `answer`, `multiple_choice_answer` or `answers`, of which the most frequent counts."""
    name = next(name for name in _ANSWERS if not is_empty(record.get(name)))
    truth = true_answer(record[name], name)
    return _with(record, ("question", *_ANSWERS), prompt=record["question"], completion=truth, answer=truth)


def true_answer(given: Any, column: str) -> Any:
    """An answer, or of a list of annotators' (texts, or VQAv2's `answer` beside `answer_id`) the most frequent, the first of several such."""
    if isinstance(given, str):
        return given
    texts = [each.get("answer") if isinstance(each, Mapping) else each for each in given] if isinstance(given, Sequence) else []
    if not texts or not all(isinstance(text, str) for text in texts):
        raise UnreadContent(f"{column} must be a text, or a list of annotators' texts, got {str(given)[:120]}; {_WITHOUT_IT}")
    return Counter(texts).most_common(1)[0][0]


def asked_and_answered(record: Mapping[str, Any]) -> Record:
    """This project's prompts: `prompt` with `answer`."""
    return {**record, "completion": record["answer"]}


def turns(given: Any, column: str) -> Any:
    """A prompt of any form: a text, messages, or ShareGPT's turns as messages."""
    return _share_gpt(given, column) if _is_share_gpt(given) else given


def _asked(record: Mapping[str, Any], question: str) -> Any:
    """A question, behind the record's turns before and its system prompt where it has such."""
    before = []
    for number, pair in enumerate(record.get("history") or ()):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise UnreadContent(f"history[{number}] must be a question and its answer, got {str(pair)[:120]}; {_WITHOUT_IT}")
        before += [{"role": role, "content": text} for role, text in zip(("user", "assistant"), pair, strict=True)]
    messages = _opened(record, [*before, {"role": "user", "content": question}])
    return question if len(messages) == 1 else messages


def _opened(record: Mapping[str, Any], messages: list[Record]) -> list[Record]:
    """Messages with the record's `system` in front."""
    system = record.get("system")
    if is_empty(system):
        return messages
    if messages and messages[0].get("role") == "system":
        raise UnreadContent("it has a system prompt in system and one in its conversation; leave one of them")
    return [{"role": "system", "content": system}, *messages]


def answer_of(given: Any, column: str) -> Any:
    """An answer as a text or a list of messages."""
    return turns([given] if isinstance(given, Mapping) else given, column)


def _is_share_gpt(given: Any) -> bool:
    return isinstance(given, list | tuple) and len(given) > 0 and isinstance(given[0], Mapping) and "from" in given[0]


def _messages(given: Any, column: str) -> list[Record]:
    if (
        not isinstance(given, Sequence)
        or isinstance(given, str)
        or not all(isinstance(each, Mapping) for each in given)
        or not given
    ):
        raise UnreadContent(f"{column} must be a list of messages with role and content, got {str(given)[:120]}; {_WITHOUT_IT}")
    return [dict(each) for each in given]


def _share_gpt(given: Any, column: str) -> list[Record]:
    """Turns of `from` and `value` as messages."""
    messages = []
    for number, turn in enumerate(_messages(given, column)):
        role = _ROLES.get(str(turn.get("from")))
        if role is None or "value" not in turn:
            raise UnreadContent(
                f"{column}[{number}] must have `from`, one of {', '.join(_ROLES)}, and `value`, got {str(turn)[:120]}; {_WITHOUT_IT}"
            )
        more = {name: value for name, value in turn.items() if name not in ("from", "value")}
        messages.append({"role": role, "content": turn["value"], **more})
    return messages
