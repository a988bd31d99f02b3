"""Conversations token for token: against the processor's own `apply_chat_template`, and against TRL's DPO data path."""

from __future__ import annotations

import copy
import functools
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from chat_templates import COLLECTING_TURNS, DATED, HEADED, THINKING
from tiny_models import TINY, sample_pictures
from transformers import ProcessorMixin

from mmdpo_trainers.answers.raters.prompts import JudgePrompts
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.sections.rating import RateConfig
from mmdpo_trainers.data.conversation import Conversation, Turn, map_question, words
from mmdpo_trainers.data.pair_records import check_record, record_conversation, record_images, response_text, stored_prompt
from mmdpo_trainers.data.pairs import read_pairs
from mmdpo_trainers.data.records import read_prompts
from mmdpo_trainers.errors import ConfigError, DataError
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.methods.selection import preference_pair
from mmdpo_trainers.models.chat_format import Chat, chat_of
from mmdpo_trainers.models.encode import encode_prompts
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.models.template_date import TemplateDate
from mmdpo_trainers.models.turns_format import answer_text, render_conversation
from mmdpo_trainers.report.examples import question_of
from mmdpo_trainers.stages import generate
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder
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
    return list(their_inputs(loaded, record, whole=whole)["input_ids"][0].tolist())


def their_inputs(loaded: LoadedModel, record: Mapping[str, Any], *, whole: bool) -> Any:
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
    return apply.apply_chat_template(
        loaded.processor,
        messages,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        tools=record.get("tools"),
        **options,
        **record.get("chat_template_kwargs", {}),
    )


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


# What the template prints: texts, as the tiny tokenizers have few words


def text_of(loaded: LoadedModel, record: Mapping[str, Any], answer: Turn | None = None) -> str:
    chat = chat_of(loaded.processor, loaded.date)
    assert isinstance(chat, Chat)
    return render_conversation(chat, record_conversation(record), answer)


def response_of(loaded: LoadedModel, record: Mapping[str, Any], answer: Turn) -> str:
    chat = chat_of(loaded.processor, loaded.date)
    assert isinstance(chat, Chat)
    return answer_text(chat, record_conversation(record), answer)


def thinking(text: str, name: str = "reasoning_content") -> Turn:
    return Turn("assistant", text, json.dumps({name: "it is large ."}))


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_thinking_of_an_answer_is_what_the_template_prints(of: Any, name: str) -> None:
    loaded, record = of("qwen2_5_vl"), SHAPES["one picture"]
    expected = "<think>\nit is large .\n</think>\n\nred"
    assert response_of(loaded, record, thinking("red", name)) == expected
    assert response_of(loaded, record, Turn("assistant", f"{expected}")) == expected
    assert response_of(loaded, record, Turn("assistant", "red")) == "<think>\n\n</think>\n\nred"
    keyed = {**record, "chosen": [say("assistant", "red", **{name: "it is large ."})]}
    in_text = {**record, "chosen": [say("assistant", expected)]}
    assert ours(loaded, keyed) == ours(loaded, in_text)


def test_thinking_and_the_prompt_that_opens_the_answer_agree(of: Any) -> None:
    loaded, record = of("qwen2_5_vl"), SHAPES["template arguments"]
    assert text_of(loaded, record).endswith("assistant\n<think>\n\n</think>\n\n")
    assert response_of(loaded, record, Turn("assistant", "red")) == "red"
    with pytest.raises(DataError, match=r"record c1: chosen: the prompt opens the answer with .*let both think or neither"):
        ours(loaded, {**record, "chosen": [say("assistant", "red", thinking="it is large .")]})


def test_tools_and_their_calls(of: Any) -> None:
    loaded = of("qwen2_5_vl")
    call = {"type": "function", "function": {"name": "colour", "arguments": {"of": "star"}}}
    asked = (
        say("user", "what colour ?"),
        {"role": "assistant", "content": None, "tool_calls": [call]},
        say("tool", "red", name="colour"),
    )
    record = shape(*asked, tools=json.dumps([TOOL]))
    assert text_of(loaded, record) == (
        f"<|im_start|>system\n{json.dumps(TOOL)}\n<|im_end|>\n<|im_start|>user\nwhat colour ?<|im_end|>\n<|im_start|>assistant\n"
        '<call>colour{"of": "star"}</call><|im_end|>\n<|im_start|>tool\nred<|im_end|>\n<|im_start|>assistant\n'
    )
    assert ours(loaded, record) == ours(loaded, {**record, "tools": [TOOL]})
    calling = shape(*asked[:1], tools=[TOOL], chosen={"role": "assistant", "content": None, "tool_calls": [call]})
    made = response_of(loaded, calling, Turn("assistant", "", json.dumps({"tool_calls": [call]})))
    assert made == '<think>\n\n</think>\n\n<call>colour{"of": "star"}</call>'
    with pytest.raises(DataError, match="chosen has tool_calls beside its content, and texts alone are read here"):
        response_text(calling, "chosen")
    with pytest.raises(
        DataError, match=r"record c1: the chat template does not print the tool call 'colour' of turn 2 \(assistant\)"
    ):
        ours(of("idefics3"), {**record, "prompt": [asked[0], {**asked[1], "content": "wait ."}, asked[2]]})


def test_arguments_that_a_template_does_not_read_are_said_once(of: Any, caplog: pytest.LogCaptureFixture) -> None:
    loaded = of("idefics3")
    record = shape(say("user", "is it red ?"), chat_template_kwargs={"said_once": 1}, tools=[TOOL])
    plain = ours(loaded, shape(say("user", "is it red ?")))
    with caplog.at_level(logging.WARNING, "mmdpo_trainers.models.chat_format"):
        assert ours(loaded, record) == ours(loaded, {**record, "id": "another"}) == plain
    assert [line.getMessage().partition(":")[0] for line in caplog.records] == ["the chat template reads no said_once, tools"]
    caplog.clear()
    date = loaded.date.with_arguments({"said_of_the_run": 1})
    for _ in range(2):
        chat_of(loaded.processor, date)
    assert len(caplog.records) == 1 and "said_of_the_run" in caplog.text


def test_arguments_of_a_run_and_of_a_record(folder: Path, of: Any) -> None:
    of("qwen2_5_vl")
    off = load_model(folder / "qwen2_5_vl", device="cpu", date=TemplateDate.now().with_arguments({"enable_thinking": False}))
    off.processor.chat_template = THINKING
    record = shape(say("user", None, "is it red ?"), images=[ONE])
    closed = SHAPES["template arguments"]
    assert ours(off, record) == ours(of("qwen2_5_vl"), closed) != ours(of("qwen2_5_vl"), record)
    assert ours(off, {**record, "chat_template_kwargs": {"enable_thinking": True}}) == ours(of("qwen2_5_vl"), record)
    with pytest.raises(ConfigError, match="chat_template_kwargs holds 'tools', which is no argument of a chat template's own"):
        loaded_date = TemplateDate.now()
        loaded_date.with_arguments({"tools": []})


@pytest.mark.parametrize(
    ("changes", "words_of"),
    [
        ({"prompt": [say("system", "answer")]}, "prompt must be text or a list of messages with one of role user"),
        ({"prompt": [say("user", "what ?"), say("system", "answer")]}, "prompt ends with a system message; put it first"),
        (
            {"prompt": [say("user", "what ?"), say("oracle", "this")]},
            r"prompt\[1\] must be a message of one of the roles system, user",
        ),
        (
            {"prompt": [say("user", "what ?"), say("assistant", "it", thinking="hm")]},
            r"prompt\[1\], with which the answer goes on, has thinking",
        ),
        ({"prompt": [say("user", "what ?", thinking="hm")]}, r"prompt\[0\]\['thinking'\] is not read"),
        (
            {"chosen": [say("assistant", "a", thinking="b", reasoning="c")]},
            r"chosen\[0\] gives its thinking as thinking and as reasoning",
        ),
        ({"chosen": [say("assistant", "a", thinking=["b"])]}, r"chosen\[0\]\['thinking'\] must be text"),
        ({"chosen": [say("assistant", "a"), say("user", "b")]}, "chosen must be text or a list of one assistant message"),
        ({"tools": "colour"}, "column 'tools' is not read: its text is no JSON"),
        ({"tools": {"name": "colour"}}, "column 'tools' must be a list of JSON schemas"),
        (
            {"chat_template_kwargs": {"chat_template": "x"}},
            "holds 'chat_template', which is no argument of a chat template's own",
        ),
        ({"prompt": None, "chosen": "a b", "rejected": "a c"}, "there is no prompt; give it in `prompt`"),
        ({"prompt": None}, "there is no prompt, and chosen and rejected differ from their first message on"),
    ],
)
def test_what_is_no_conversation_is_refused_by_place(changes: dict[str, Any], words_of: str) -> None:
    with pytest.raises(DataError, match=f"record c1: .*{words_of}"):
        check_record({**shape(say("user", "is it red ?")), **changes})


@pytest.mark.parametrize(
    ("template", "record", "words_of"),
    [
        (
            HEADED.replace("<|image|>", "{{ raise_exception('no') if message.role == 'assistant' else '<image>' }}"),
            1,
            "that conversation",
        ),
        (
            HEADED.replace("<|image|>", "{{ '' if message.role == 'assistant' else '<image>' }}"),
            1,
            r"a picture of turn 2 \(assistant\)",
        ),
        (
            DATED.replace("[IMG]", "<image>").replace(
                "{% else %}{{ message", "{% elif message['role'] == 'assistant' %}{{ message"
            ),
            0,
            r"the text of turn 1 \(system\)",
        ),
        (None, 0, "the model folder has no chat template, and only prompts of one user turn go without"),
    ],
)
def test_what_a_template_does_not_print_is_refused_by_name(
    folder: Path, of: Any, template: str | None, record: int, words_of: str
) -> None:
    of("idefics3")
    loaded = load_model(folder / "idefics3", device="cpu")
    loaded.processor.chat_template = loaded.tokenizer.chat_template = template
    given = (
        SHAPES["system turn"],
        shape(say("user", "what ?"), say("assistant", "this .", None), say("user", "which colour ?"), images=[ONE]),
    )[record]
    with pytest.raises(DataError, match=f"record c1: .*{words_of}"):
        ours(loaded, given)


def test_pictures_in_turns_of_the_assistant(of: Any) -> None:
    loaded = of("qwen2_5_vl")
    record = shape(
        say("user", None, "what ?"), say("assistant", "this .", None), say("user", "which colour ?"), images=[ONE, TWO]
    )
    assert text_of(loaded, record).count("<|image_pad|>") == 2
    assert ours(loaded, record)[0] == theirs(
        loaded,
        {**record, "prompt": [*record["prompt"][:2], ASKED | {"content": [{"type": "text", "text": "which colour ?"}]}]},
        whole=False,
    )


def test_the_shared_prefix_covers_all_turns(of: Any) -> None:
    loaded = of("qwen2_5_vl")
    record = SHAPES["three turns, pictures in two"]
    others = [
        {**record, "id": f"c{at}", "prompt": [*TURNS, say("assistant", "a circle"), say("user", text)]}
        for at, text in enumerate(["which is red ?", "is there a star ?"])
    ]
    made = collator(loaded, tree_packing=True)
    prompt, chosen = ours(loaded, record)
    _, rejected = ours(loaded, record, "rejected")
    shared = next(at for at, both in enumerate(zip(chosen, rejected, strict=False)) if both[0] != both[1])
    tokens = made.batch([record]).input_ids.shape[1]
    assert tokens == len(prompt) + len(chosen) + len(rejected) - shared == made.tree_tokens(record)
    assert made.shared_tokens(others) > len(ours(loaded, shape(*TURNS, images=[ONE, TWO]))[0]) - 5
    # One more turn that is asked costs its own tokens, and those of its answers.
    both = made.batch(others).input_ids.shape[1]
    assert both < tokens + len(prompt) // 2


def test_forms_of_files(tmp_path: Path) -> None:
    import datasets

    for name, picture in (("a.png", ONE), ("b.png", TWO)):
        picture.save(tmp_path / name)
    implicit = {
        "chosen": [say("user", None, "is it red ?"), say("assistant", "yes")],
        "rejected": [say("user", None, "is it red ?"), say("assistant", "no", reasoning_content="hm")],
        "image": "a.png",
    }
    inside = [{"role": "user", "content": [{"type": "image", "image": "b.png"}, {"type": "text", "text": "and this ?"}]}]
    several = {**shape(say("system", "answer"), *inside), "images": [], "id": "two", "tools": [TOOL]}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (implicit, several)))
    first, second = read_pairs(tmp_path / "pairs.jsonl")
    assert first["images"] == [str(tmp_path / "a.png")] and "image" not in first
    assert (first["prompt"], first["chosen"]) == (implicit["chosen"][:1], implicit["chosen"][1:])
    assert second["images"] == [str(tmp_path / "b.png")] and second["tools"] == [TOOL]
    assert stored_prompt(second) == [say("system", "answer"), say("user", "<image>and this ?")]
    row = {**implicit, "image": {"bytes": (tmp_path / "a.png").read_bytes(), "path": None}}
    row["rejected"] = [*row["rejected"][:1], say("assistant", "no")]
    data = (
        datasets.Dataset.from_list(
            [row],
            features=datasets.Features(
                {
                    **{
                        name: datasets.List({"role": datasets.Value("string"), "content": datasets.Json()})
                        for name in ("chosen", "rejected")
                    },
                    "image": datasets.Image(),
                }
            ),
        )
        if hasattr(datasets, "Json")
        else None
    )
    if data is not None:
        data.save_to_disk(str(tmp_path / "saved"))
        assert record_conversation(read_pairs(tmp_path / "saved")[0]).text == "<image>is it red ?"
    asked = {"id": "p", "images": ["a.png"], "prompt": [say("system", "answer"), say("user", None, "is it red ?")]}
    (tmp_path / "prompts.jsonl").write_text(json.dumps({**asked, "chat_template_kwargs": {"enable_thinking": False}}) + "\n")
    (found,) = read_prompts(tmp_path / "prompts.jsonl")
    assert found["prompt"] == [say("system", "answer"), say("user", "<image>is it red ?")]
    assert words(found["prompt"]) == "system: answer\nuser: <image>is it red ?"
    assert map_question(found["prompt"], "{} (loud)".format)[1]["content"] == "<image>is it red ? (loud)"
    assert map_question("is it red ?", str.upper) == "IS IT RED ?" and Conversation.of_text("a").plain


def test_stages_answer_what_the_processor_asks(folder: Path, of: Any, tmp_path: Path) -> None:
    loaded = of("qwen2_5_vl")
    model = shutil.copytree(folder / "qwen2_5_vl", tmp_path / "model")
    (model / "chat_template.jinja").write_text(THINKING)
    record = {**SHAPES["three turns, pictures in two"], "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}}
    for name, picture in (("a.png", ONE), ("b.png", TWO)):
        picture.save(tmp_path / name)
    asked = {name: record[name] for name in ("id", "prompt", "tools")} | {
        "images": ["a.png", "b.png"],
        "target": 0,
        "answer": "red",
    }
    (tmp_path / "prompts.jsonl").write_text(json.dumps(asked) + "\n")
    options = {"input": str(tmp_path / "prompts.jsonl"), "max_new_tokens": 3}
    values = {"name": "run", "run_dir": str(tmp_path / "run"), "model": str(model), "device": "cpu"}
    values |= {"generate": options, "chat_template_kwargs": record["chat_template_kwargs"]}
    context = StageContext(run=RunFolder(tmp_path / "run"), config=RunConfig.from_dict(values), stage="generate")
    generate.run(context)
    (answered,) = read_jsonl(context.folder / "responses.jsonl")
    inputs = their_inputs(loaded, record, whole=False)
    expected = loaded.model.generate(**inputs, max_new_tokens=3, do_sample=False, suppress_tokens=[loaded.image_token_id])
    expected = expected[0, inputs["input_ids"].shape[1] :].tolist()
    assert answered["response_ids"] == [id for id in expected if id not in loaded.end_ids]
    assert answered["tools"] == [TOOL] and answered["prompt"][2] == say("user", "<image>and this ?")
    pair = preference_pair({**answered, "rejected": "blue", "images": [ONE, TWO]})
    assert ours(loaded, {**pair, "chat_template_kwargs": record["chat_template_kwargs"]}) == ours(loaded, record)
    judged = JudgePrompts(RateConfig()).rating(answered, "red")
    assert judged.index("assistant: a circle") < judged.index("user: which is red ?") and judged.count("<image>") == 2
    assert question_of(pair["prompt"]).splitlines()[-1] == "user: which is red ?"
