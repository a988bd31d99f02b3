"""Conversations token for token: against the processor's own `apply_chat_template`, and against TRL's DPO data path."""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chat_templates import COLLECTING_TURNS, THINKING
from tiny_models import TINY, sample_pictures
from transformers import ProcessorMixin

from mmdpo_trainers.data.pair_records import record_images, stored_prompt
from mmdpo_trainers.models.encode import encode_prompts
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.training.batches.collator import PreferenceCollator, model_collator

FAMILIES = {"qwen2_5_vl": THINKING, "idefics3": None, "llava_onevision": COLLECTING_TURNS}
ONE, TWO = sample_pictures(2)
TOOL = {"type": "function", "function": {"name": "colour", "description": "the colour", "parameters": {"type": "object"}}}


def say(role: str, *content: Any, **fields: Any) -> dict[str, Any]:
    parts = [{"type": "image"} if each is None else {"type": "text", "text": each} for each in content]
    return {"role": role, "content": content[0] if len(content) == 1 and isinstance(content[0], str) else parts, **fields}


def shape(*prompt: dict[str, Any], images: Any = (), chosen: Any = "red", **more: Any) -> dict[str, Any]:
    sides = {"chosen": [chosen if isinstance(chosen, dict) else say("assistant", chosen)], "rejected": [say("assistant", "blue")]}
    return {"id": "c1", "images": list(images), "prompt": list(prompt), **sides, **more}


ASKED = {"role": "user", "content": [{"type": "text", "text": "which is red ?"}]}
"""In parts: TRL puts all pictures in front of the first user turn that is a string, whichever it is."""
TURNS = (say("user", None, "what is it ?"), say("assistant", "a star"), say("user", None, "and this ?"))
LONG = (*TURNS, say("assistant", "a circle"), ASKED)
SHAPES: dict[str, dict[str, Any]] = {
    "plain text": shape(say("user", "is it red ?")),
    "one picture": shape(say("user", "is it red ?"), images=[ONE]),
    "two pictures": shape(say("user", None, None, "are both red ?"), images=[ONE, TWO]),
    "system turn": shape(say("system", "answer with one word ."), say("user", None, "is it red ?"), images=[ONE]),
    "pictures in the second user turn": shape(
        say("system", "answer with one word ."),
        *(ASKED, say("assistant", "of what ?"), say("user", None, None, "of this .")),
        images=[ONE, TWO],
    ),
    "three turns, pictures in two": shape(*LONG, images=[ONE, TWO]),
    "implicit prompt": {
        "id": "c1",
        "images": [],
        "chosen": [say("user", "is it red ?"), say("assistant", "yes")],
        "rejected": [say("user", "is it red ?"), say("assistant", "no")],
    },
    "turn to go on with": shape(say("user", None, "what is it ?"), say("assistant", "it is"), images=[ONE], chosen=" red"),
    "tools": shape(say("user", "what colour ?"), tools=[TOOL]),
    "template arguments": shape(say("user", None, "is it red ?"), images=[ONE], chat_template_kwargs={"enable_thinking": False}),
    "thinking in text": shape(say("user", None, "is it red ?"), images=[ONE], chosen="<think>\nit is large .\n</think>\n\nred"),
    "image column": {**shape(say("user", None, "is it red ?")), "image": ONE},
    "text between pictures": shape(say("user", "Image A : ", None, " Image B : ", None, " which is red ?"), images=[ONE, TWO]),
}
del SHAPES["image column"]["images"]
TEXT_ONLY = ("plain text", "implicit prompt", "tools")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("conversations")


@pytest.fixture(scope="module")
def of(folder: Path) -> Any:
    @functools.cache
    def load(name: str) -> LoadedModel:
        loaded = load_model(TINY[name](folder / name), device="cpu")
        if FAMILIES[name] is not None:
            loaded.processor.chat_template = FAMILIES[name]
        return loaded

    return load


def collator(loaded: LoadedModel, **options: Any) -> PreferenceCollator:
    return model_collator(loaded.model, loaded.processor, date=loaded.date, **options)


def ours(loaded: LoadedModel, record: Mapping[str, Any], column: str = "chosen") -> tuple[list[int], list[int]]:
    """Ids of prompt and response: of the trainer, whose prompt is that of generation."""
    examples, _ = collator(loaded)._maker.examples([record], "policy")
    sequence = examples[0].sequences[("chosen", "rejected").index(column)]
    asked = {"id": "c1", "images": record_images(record), "prompt": stored_prompt(record)}
    asked |= {name: record[name] for name in ("tools", "chat_template_kwargs") if name in record}
    generated = encode_prompts(loaded, [asked], padding_side="left").inputs["input_ids"][0].tolist()
    assert generated == sequence.prompt.tolist()
    return generated, sequence.response.tolist()


def explicit(record: Mapping[str, Any]) -> dict[str, Any]:
    if "prompt" in record:
        return dict(record)
    return {**record, "prompt": record["chosen"][:-1], "chosen": record["chosen"][-1:], "rejected": record["rejected"][-1:]}


def theirs(loaded: LoadedModel, record: Mapping[str, Any], *, whole: bool) -> list[int]:
    """The processor's own ids of the prompt, or of prompt and chosen response."""
    from trl.data_utils import prepare_multimodal_messages

    record = explicit(copy.deepcopy(dict(record)))
    messages = prepare_multimodal_messages(record["prompt"], record_images(record))
    continues = messages[-1]["role"] == "assistant"
    if whole and continues:
        # One turn of the assistant's: what the prompt begins the response ends.
        messages[-1]["content"][-1]["text"] += record["chosen"][0]["content"]
    elif whole:
        messages += prepare_multimodal_messages(record["chosen"])
    apply: Any = type(loaded.processor) if hasattr(loaded.processor, "video_processor") else ProcessorMixin
    options = {"add_generation_prompt": not whole and not continues, "continue_final_message": not whole and continues}
    found = apply.apply_chat_template(
        loaded.processor,
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        tools=record.get("tools"),
        **options,
        **record.get("chat_template_kwargs", {}),
    )
    return list(found["input_ids"][0].tolist())


def trls(loaded: LoadedModel, record: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """TRL's ids of prompt and chosen response: of its dataset preparation without pictures, of its collator with them."""
    from datasets import Dataset
    from trl.trainer.dpo_trainer import DataCollatorForVisionPreference, DPOTrainer

    record = copy.deepcopy(dict(record))
    if not record_images(record):
        told = {
            name: json.dumps(value) if name == "tools" else value
            for name, value in record.items()
            if name not in ("id", "images")
        }
        trainer = SimpleNamespace(_tokenizer=loaded.tokenizer)
        args = SimpleNamespace(dataset_num_proc=None, max_length=None)
        made = DPOTrainer._prepare_dataset(trainer, Dataset.from_list([told]), loaded.processor, args, "train")
        return list(made[0]["prompt_ids"]), list(made[0]["chosen_ids"])
    batch = DataCollatorForVisionPreference(processor=loaded.processor)([record])
    ids, seen, answer = (batch[name][0].tolist() for name in ("input_ids", "attention_mask", "completion_mask"))
    pairs = [(id, is_answer) for id, is_seen, is_answer in zip(ids, seen, answer, strict=True) if is_seen]
    return [id for id, is_answer in pairs if not is_answer], [id for id, is_answer in pairs if is_answer]


def only_layout_behind(loaded: LoadedModel, response: list[int], found: list[int]) -> bool:
    """Whether `found` is the response and nothing but line breaks behind its end."""
    more = found[len(response) :]
    return found[: len(response)] == response and not loaded.tokenizer.decode(more).strip()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", SHAPES)
def test_conversations_are_the_templates_own_and_trls(of: Any, name: str, kind: str) -> None:
    loaded, record = of(name), SHAPES[kind]
    prompt, response = ours(loaded, record)
    if (name, kind) == ("llava_onevision", "text between pictures"):
        # The template collects pictures in front of a turn's text; here they stay where the questions mean them.
        texts = [" ".join(loaded.tokenizer.decode(ids).split()) for ids in (prompt, theirs(loaded, record, whole=False))]
        image = "<image>" * prompt.count(loaded.image_token_id)
        assert "Image A" in texts[0].partition("<image>")[0] and "Image A" not in texts[1].partition("<image>")[0]
        assert image not in texts[0] and image in texts[1].replace(" ", "")
        return
    assert prompt == theirs(loaded, record, whole=False)
    if name != "llava_onevision":
        assert only_layout_behind(loaded, [*prompt, *response], theirs(loaded, record, whole=True))
    their_prompt, their_response = trls(loaded, record)
    if kind == "turn to go on with":
        # TRL puts the response into a turn of its own behind the one that the prompt has begun, which its response then closes.
        end = loaded.tokenizer.convert_ids_to_tokens(response[-1])
        assert their_prompt == prompt[: len(their_prompt)]
        assert their_response.count(loaded.tokenizer.convert_tokens_to_ids(end)) == 2 and response.count(response[-1]) == 1
    elif name == "llava_onevision":
        # Its template opens an answer with a line break, and prints one with a space and a line break. With pictures TRL then takes the line
        # break out of the prompt, which generation has; here it stays.
        assert [*their_prompt, *their_response] == [*prompt, *response]
        assert their_prompt == (prompt if kind in TEXT_ONLY else prompt[:-1])
    else:
        assert their_prompt == prompt
        assert only_layout_behind(loaded, response, their_response)
