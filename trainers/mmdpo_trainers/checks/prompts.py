"""Prompts against those that the processor itself makes of typed parts: what the model was trained with."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from transformers import ProcessorMixin

from mmdpo_trainers.checks.baseline import processor_inputs
from mmdpo_trainers.checks.inputs import prompt_records
from mmdpo_trainers.checks.result import CheckFailure, CheckResult
from mmdpo_trainers.models.chat_format import Chat, Part, chat_of, typed_parts
from mmdpo_trainers.models.encode import encode_prompts
from mmdpo_trainers.models.loaded import LoadedModel


def check_prompts(loaded: LoadedModel) -> CheckResult:
    """Token ids of prompts, against the processor's `apply_chat_template` on pictures and texts as parts, tokenised by itself.

    Where the template mixes such parts up, that it does, for prompts with text between pictures.
    """
    chat = chat_of(loaded.processor, loaded.date)
    if chat is None and loaded.family.own_prompts:
        return _as_the_processor(loaded)
    if chat is None:
        reason = "the model folder has no chat template, so prompts are 'USER: … ASSISTANT:', whatever the model was trained with"
        return CheckResult(name="prompts", figure=0.0, limit=0.0, verdict=f"refused: {reason}")
    mixed, tokens, same = [], 0, 0
    for record in prompt_records():
        ours = encode_prompts(loaded, [record], padding_side="right").inputs["input_ids"][0].tolist()
        if chat.typed(record["prompt"]) is None:
            mixed.append(record["id"])
            continue
        theirs = [_without_end(loaded, found, len(ours)) for found in _theirs(loaded, chat, record)]
        if ours not in theirs:
            first = next((at for at, both in enumerate(zip(ours, theirs[0], strict=False)) if both[0] != both[1]), None)
            first = min(len(ours), len(theirs[0])) if first is None else first
            raise CheckFailure(
                f"prompt {record['id']!r} is {len(ours)} tokens, the processor's own {len(theirs[0])}, and they differ from token {first} on: "
                f"{loaded.tokenizer.decode(ours[first : first + 8])!r}, and {loaded.tokenizer.decode(theirs[0][first : first + 8])!r}"
            )
        same, tokens = same + 1, tokens + len(ours)
    verdict = "exact"
    if mixed:
        verdict = (
            "refused: the chat template does not keep pictures in their places between texts; a prompt that has them there goes in as one "
            f"text ({', '.join(mixed)})"
        )
    return CheckResult(name="prompts", figure=0.0, limit=0.0, verdict=verdict, detail=f"{tokens} tokens of {same} prompts")


def _as_the_processor(loaded: LoadedModel) -> CheckResult:
    """Prompts of a family without a chat template against what its processor makes of their texts and pictures."""
    tokens, records = 0, prompt_records()
    for record in records:
        ours = encode_prompts(loaded, [record], padding_side="right").inputs["input_ids"][0].tolist()
        theirs = processor_inputs(loaded, record["prompt"], record["images"])["input_ids"][0].tolist()
        if ours != theirs:
            raise CheckFailure(f"prompt {record['id']!r} is {ours}, the processor's own {theirs}")
        tokens += len(ours)
    detail = f"{tokens} tokens of {len(records)} prompts, which need no chat template"
    return CheckResult(name="prompts", figure=0.0, limit=0.0, verdict="exact", detail=detail)


def _theirs(loaded: LoadedModel, chat: Chat, record: Mapping[str, Any]) -> Iterator[list[int]]:
    """The processor's ids of the record's parts, and of these without a line break or a blank text behind a picture."""
    parts = typed_parts(record["prompt"])
    plain: list[Part] = []
    for place, part in enumerate(parts):
        if place and parts[place - 1]["type"] == "image" and part["type"] == "text":
            part = {**part, "text": part["text"].removeprefix("\n")}
        if part["type"] == "image" or part["text"].strip():
            plain.append(part)
    # SmolVLM's own asks for a video processor, which is left out where there is no torchvision.
    apply: Any = type(loaded.processor) if hasattr(loaded.processor, "video_processor") else ProcessorMixin
    for content in (parts, plain):
        pictures = iter(record["images"])
        shown = [{**part, "image": next(pictures)} if part["type"] == "image" else part for part in content]
        encoded = apply.apply_chat_template(
            loaded.processor,
            [{"role": "user", "content": shown}],
            chat_template=chat.source,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
        )
        yield encoded["input_ids"][0].tolist()


def _without_end(loaded: LoadedModel, ids: list[int], length: int) -> list[int]:
    """Without the end token that a tokenizer puts behind every text, and so between prompt and answer."""
    return ids[:length] if len(ids) == length + 1 and ids[-1] in {*loaded.end_ids, loaded.tokenizer.eos_token_id} else ids
