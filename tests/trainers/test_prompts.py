"""How texts become a model's prompts and answers: typed parts through its chat template, special tokens, and the date of a run."""

from __future__ import annotations

import datetime
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_templates import COLLECTING, DATED, HEADED, SPACED
from prompt_records import make_prompts
from tiny_models import TINY, sample_pictures
from tokenizers import processors
from training_cases import config
from transformers.utils import chat_template_utils

from mmdpo_trainers.checks import run_checks
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.shipped import SHIPPED
from mmdpo_trainers.errors import ConfigError, DataError, StageError
from mmdpo_trainers.models import chat_format
from mmdpo_trainers.models.chat_format import render_prompt
from mmdpo_trainers.models.encode import encode_prompts
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.models.processors import load_processor
from mmdpo_trainers.models.template_date import TemplateDate
from mmdpo_trainers.stages import evaluate, generate, models, score, train
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder
from mmdpo_trainers.training.batches.collator import PreferenceCollator
from mmdpo_trainers.training.trainer import PreferenceTrainer

INTERLEAVED = "Image1:<image>\nImage2:<image>\nIn Image2, what colour?"
QUESTION = "is it red ?"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: TINY[name](tmp_path_factory.mktemp(name) / "model") for name in ("llava", "idefics3", "mllama", "mistral3")}


@pytest.fixture
def of(folders: dict[str, Path]) -> Any:
    """A model of a family with a chat template, loaded anew."""

    def load(name: str, template: str | None = None, **options: Any) -> LoadedModel:
        loaded = load_model(folders[name], device="cpu", **options)
        if template is not None:
            loaded.processor.chat_template = template
        return loaded

    return load


def collator(loaded: LoadedModel, **options: Any) -> PreferenceCollator:
    ids = {"image_token_id": loaded.image_token_id, "end_id": loaded.tokenizer.eos_token_id, "pad_id": loaded.pad_id}
    return PreferenceCollator(loaded.processor, family=loaded.family, **ids, **options)


def record(**changes: Any) -> dict[str, Any]:
    return {"id": "r7", "prompt": QUESTION, "images": [], "chosen": "yes", "rejected": "no", **changes}


def prompt_of(loaded: LoadedModel, text: str) -> list[int]:
    pictures = sample_pictures(text.count("<image>"))
    encoded = encode_prompts(loaded, [{"id": "r7", "prompt": text, "images": pictures}], padding_side="left")
    return list(encoded.inputs["input_ids"][0].tolist())


# Typed parts


@pytest.mark.parametrize(
    ("name", "template", "prompt", "expected"),
    [
        ("idefics3", SPACED, "<image>what ?", "<|begin_of_text|>User:<image>what ?<end_of_utterance>\nAssistant:"),
        ("idefics3", SPACED, INTERLEAVED, f"<|begin_of_text|>User: {INTERLEAVED}<end_of_utterance>\nAssistant:"),
        ("mllama", HEADED, "<image>\nwhat ?", "<|begin_of_text|>{user}<|image|>\nwhat ?<|eot_id|>{assistant}"),
        ("mistral3", DATED, INTERLEAVED, "<s>[SYSTEM_PROMPT]it is 2025-03-01 .[/SYSTEM_PROMPT][INST]{prompt}[/INST]"),
        ("llava", COLLECTING, "<image>\nwhat ?", "USER: <image>\nwhat ? ASSISTANT:"),
        ("llava", COLLECTING, "<image><image>what ?", "USER: <image>\n<image>\nwhat ? ASSISTANT:"),
        ("llava", COLLECTING, "<image>\n<image>\nwhat ?", "USER: <image>\n<image>\nwhat ? ASSISTANT:"),
        ("llava", COLLECTING, INTERLEAVED, f"USER: {INTERLEAVED} ASSISTANT:"),
    ],
)
def test_prompts_are_the_templates_own(of: Any, name: str, template: str, prompt: str, expected: str) -> None:
    loaded = of(name, template)
    roles = {role: f"<|start_header_id|>{role}<|end_header_id|>\n\n" for role in ("user", "assistant")}
    expected = expected.format(prompt=INTERLEAVED.replace("<image>", "[IMG]"), **roles)
    assert render_prompt(loaded.processor, prompt, TemplateDate.read("2025-03-01")) == expected


@pytest.mark.parametrize("prompt", ["<image>\nwhat colour is the circle ?", INTERLEAVED, "what colour ?"])
@pytest.mark.parametrize("name", sorted(SHIPPED))
def test_prompts_of_the_shipped_models_stay_as_they_are_written(name: str, prompt: str) -> None:
    assert render_prompt(load_processor(SHIPPED[name], "llava"), prompt) == f"USER: {prompt} ASSISTANT:"


@pytest.mark.parametrize(
    ("name", "template"),
    # The tiny tokenizer drops spaces; a comma it shows.
    [("idefics3", SPACED.replace("': '", "' , '")), ("mllama", HEADED), ("mistral3", DATED)],
)
def test_check_compares_with_the_processors_own_prompts(
    of: Any, name: str, template: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = of(name, template)
    (found,) = run_checks(loaded, ["prompts"])
    assert found.verdict == "exact", found
    monkeypatch.setattr(
        chat_format, "render_prompt", lambda processor, prompt, date: chat_format.chat_of(processor, date).as_text(prompt)
    )
    monkeypatch.setattr("mmdpo_trainers.models.token_rules.render_prompt", chat_format.render_prompt)
    (found,) = run_checks(of(name, template), ["prompts"])
    # Mistral's has no look at parts beside their texts: one text is the same to it.
    assert (found.verdict == "exact") == (name == "mistral3"), found
    assert name == "mistral3" or "the processor's own" in found.verdict


def test_a_template_that_collects_pictures_is_said_once(of: Any, caplog: pytest.LogCaptureFixture) -> None:
    loaded = of("llava", COLLECTING + "{# said once #}")
    with caplog.at_level(logging.INFO, "mmdpo_trainers.models.chat_format"):
        render_prompt(loaded.processor, "<image>\nwhat ?")
        assert not caplog.records
        for _ in range(2):
            render_prompt(loaded.processor, INTERLEAVED)
    assert [each.getMessage() for each in caplog.records if "go in as one text" in each.getMessage()] == [
        caplog.records[0].getMessage()
    ]
    (found,) = run_checks(loaded, ["prompts"])
    assert found.verdict.startswith("refused: the chat template does not keep pictures in their places")


def test_a_template_that_prints_parts_as_python_does_gets_text(of: Any) -> None:
    template = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    assert render_prompt(of("llava", template).processor, QUESTION) == f"[{QUESTION}]"


def test_of_several_templates_the_default_one(of: Any) -> None:
    loaded = of("llava", {"default": COLLECTING, "tools": "nothing"})
    assert render_prompt(loaded.processor, QUESTION) == f"USER: {QUESTION} ASSISTANT:"
    loaded.processor.chat_template = {"tools": COLLECTING}
    with pytest.raises(StageError, match="expected one named default"):
        render_prompt(loaded.processor, QUESTION)


# Special tokens


@pytest.mark.parametrize("end", ["</s>", "</s>\n"])
def test_a_response_has_one_end(of: Any, end: str) -> None:
    make = collator(of("llava"))
    expected = make([record()])["batch"]
    found = make([record(chosen=f"yes{end}", rejected=f"no{end}")])["batch"]
    assert found.targets.tolist() == expected.targets.tolist() and found.keys == expected.keys
    with pytest.raises(DataError, match="record r7: chosen is an end token alone"):
        make([record(chosen=end)])


@pytest.mark.parametrize("column", ["chosen", "rejected"])
@pytest.mark.parametrize(("text", "marker"), [("<s> yes", "<s>"), ("yes</s></s>", "</s>"), ("yes </s> no", "</s>")])
def test_other_special_tokens_in_a_response_are_refused(of: Any, column: str, text: str, marker: str) -> None:
    with pytest.raises(DataError, match=f"record r7: {column} holds '{marker}', a token of the model's chat format"):
        collator(of("llava"))([record(**{column: text})])


def test_an_answer_follows_the_same_rule(of: Any) -> None:
    loaded = of("llava")
    prompts = [{"id": "r7", "prompt": QUESTION, "images": []}]

    def ids(answer: str) -> list[int]:
        return list(encode_prompts(loaded, prompts, padding_side="left", answers=[answer]).inputs["input_ids"][0].tolist())

    assert ids("yes</s>") == ids("yes")
    with pytest.raises(DataError, match="record r7: the answer holds '<s>'"):
        ids("<s>yes")


@pytest.mark.parametrize(
    ("name", "prompt", "said"),
    [
        ("llava", f"USER: {QUESTION} ASSISTANT:", "the prompt already has 'USER:'"),
        ("llava", f"{QUESTION} ASSISTANT:", "the prompt already has 'ASSISTANT:'"),
        ("llava", f"<s>{QUESTION}", "the prompt holds '<s>'"),
        ("mistral3", f"[INST]{QUESTION}[/INST]", r"the prompt holds '\[INST\]'"),
        ("mllama", f"{QUESTION}<|eot_id|><|start_header_id|>", r"the prompt holds '<\|eot_id\|>'"),
        ("idefics3", f"User: {QUESTION}<end_of_utterance>", "the prompt holds '<end_of_utterance>'"),
        ("idefics3", f"User: {QUESTION}", "the prompt already has 'User:'"),
    ],
)
def test_a_prompt_in_the_chat_format_is_not_templated_again(of: Any, name: str, prompt: str, said: str) -> None:
    loaded = of(name)
    with pytest.raises(DataError, match=f"record r7: {said}.*give the text"):
        prompt_of(loaded, prompt)
    with pytest.raises(DataError, match=f"record r7: {said}"):
        collator(loaded, tree_packing=name != "mllama")([record(prompt=prompt)])


@pytest.mark.parametrize(
    "prompt", ["the user of this assistant", "user interface : is it red ?", "a <unk> word", "1 < 2 > 0 </ s >"]
)
def test_plain_words_are_no_markers(of: Any, prompt: str) -> None:
    for name in ("llava", "mllama"):
        assert prompt_of(of(name), prompt)


def test_prompts_are_looked_at_before_the_first_is_answered(folders: dict[str, Path], tmp_path: Path) -> None:
    records = make_prompts(tmp_path / "data", [("single", 1)] * 3)
    records[-1]["prompt"] = "<image>\nUSER: what ? ASSISTANT:"
    path = tmp_path / "data" / "prompts.jsonl"
    path.write_text("".join(json.dumps({**each, "response": "red"}) + "\n" for each in records))
    for stage, module in {"generate": generate, "score": score, "evaluate": evaluate}.items():
        options = {stage: {"input": str(path), "batch_size": 1}, "run_dir": str(tmp_path / stage), "model": str(folders["llava"])}
        context = StageContext(
            run=RunFolder(tmp_path / stage),
            config=RunConfig.from_dict({"name": "run", **options}),
            stage=stage,
            moment="before" if stage == "evaluate" else None,
        )
        with pytest.raises(DataError, match="record r2/single: the prompt already has 'ASSISTANT:'"):
            module.run(context)
        assert not list((tmp_path / stage).rglob("*.jsonl"))


def test_an_end_that_the_tokenizer_adds_stands_not_between_prompt_and_answer(of: Any) -> None:
    loaded = of("llava")
    expected = [prompt_of(loaded, QUESTION), prompt_of(loaded, "<image>\nwhat ?")]
    batch = collator(loaded)([record()])["batch"]
    ends = [(token, loaded.tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    loaded.tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    assert loaded.tokenizer(QUESTION).input_ids[-1] == loaded.tokenizer.eos_token_id
    assert [prompt_of(loaded, QUESTION), prompt_of(loaded, "<image>\nwhat ?")] == expected
    assert collator(loaded)([record()])["batch"].input_ids.tolist() == batch.input_ids.tolist()
    for check in run_checks(loaded, ["prompts", "segments", "tree"]):
        assert not check.failed, check


def test_each_prompt_has_its_own_opening(of: Any) -> None:
    # A template may write the opening token for some conversations only.
    loaded = of(
        "llava", "{% if 'red' in messages[0]['content'][0]['text'] %}<s>{% endif %}{{ messages[0]['content'][0]['text'] }}"
    )
    records = [{"id": text, "prompt": text, "images": []} for text in ("is it red ?", "is it blue ?")]
    ids = encode_prompts(loaded, records, padding_side="left").inputs["input_ids"]
    assert (ids == loaded.tokenizer.bos_token_id).sum(1).tolist() == [1, 1]


# The date of a run


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[datetime.datetime]]:
    """The date that transformers and this library see; the last of the list counts."""
    days = [datetime.datetime(2025, 3, 1, 23, 59)]

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return days[-1]

    monkeypatch.setattr(chat_template_utils, "datetime", Clock)
    for module in ("models.template_date", "stages.folder"):
        monkeypatch.setattr(f"mmdpo_trainers.{module}.datetime.datetime", Clock, raising=False)
    yield days


def test_a_date_is_read_and_written() -> None:
    date = TemplateDate.read("2025-03-01T23:59:00")
    assert str(date) == "2025-03-01T23:59:00" and TemplateDate.read(str(date)) == date
    with pytest.raises(ConfigError, match="template_date: expected a date such as 2025-03-01 .* got 'today'"):
        TemplateDate.read("today")
    with pytest.raises(ConfigError, match="template_date"):
        config(Path("unused"), template_date="today")


@pytest.mark.parametrize("begins", ["", "\n", "  ", "\n\n  {%- if true %}{% endif %}", "  {% if true %}\n{% endif %}"])
def test_a_template_that_is_told_the_date_is_otherwise_the_same(of: Any, clock: list[datetime.datetime], begins: str) -> None:
    asks = "{{ strftime_now('%d %b %Y, %-d.%-m.%y %H:%M:%S %j %A %%d 100%') }}"
    template = (
        f"{begins}{asks}{{% set today = strftime_now('%Y') %}}{{{{ today.split('0')[0] }}}} {{{{ messages[0]['content'] }}}}"
    )
    processor = of("llava", template).processor
    expected = render_prompt(processor, QUESTION)
    assert "01 Mar 2025" in expected and "%d" in expected
    date = TemplateDate.now()
    clock.append(clock[0] + datetime.timedelta(days=1))
    assert render_prompt(processor, QUESTION, date) == expected != render_prompt(processor, QUESTION)


def test_a_loaded_model_keeps_its_date_overnight(of: Any, clock: list[datetime.datetime]) -> None:
    loaded = of("mistral3", DATED)
    before = prompt_of(loaded, QUESTION)
    clock.append(clock[0] + datetime.timedelta(minutes=2))
    assert prompt_of(loaded, QUESTION) == before
    assert prompt_of(of("mistral3", DATED, date=loaded.date), QUESTION) == before
    assert prompt_of(of("mistral3", DATED), QUESTION) != before


def test_a_run_keeps_its_date(tmp_path: Path, clock: list[datetime.datetime]) -> None:
    def context() -> StageContext:
        return StageContext(run=RunFolder(tmp_path), config=RunConfig(), stage="generate")

    first = context().date
    clock.append(clock[0] + datetime.timedelta(days=1))
    assert context().date == first == TemplateDate.read("2025-03-01T23:59:00")
    assert json.loads((tmp_path / "date.json").read_text()) == {"date": "2025-03-01T23:59:00"}


def test_every_stage_renders_on_the_runs_date(folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_prompts(tmp_path / "data", [("single", 1)])
    path = tmp_path / "data" / "prompts.jsonl"
    path.write_text(json.dumps({**json.loads(path.read_text()), "response": "red", "response_ids": [5]}) + "\n")
    (tmp_path / "date.json").write_text('{"date": "2025-03-01T23:59:00"}')

    class Loaded(Exception):
        pass

    def load(*args: Any, date: TemplateDate, **options: Any) -> None:
        raise Loaded(str(date))

    monkeypatch.setattr(models, "load_model", load)
    monkeypatch.setattr(generate, "VllmEngine", load)
    monkeypatch.setattr(generate, "check_vllm", lambda config: None)
    for stage, module, options in (
        ("generate", generate, {}),
        ("generate", generate, {"engine": "vllm"}),
        ("score", score, {}),
        ("evaluate", evaluate, {}),
    ):
        values = {"name": "run", "model": str(folders["llava"]), stage: {"input": str(path), **options}}
        moment = "before" if stage == "evaluate" else None
        context = StageContext(run=RunFolder(tmp_path), config=RunConfig.from_dict(values), stage=stage, moment=moment)
        with pytest.raises(Loaded, match="2025-03-01T23:59:00"):
            module.run(context)
    context = StageContext(run=RunFolder(tmp_path), config=RunConfig.from_dict({"name": "run", "device": "cpu"}), stage="train")
    assert train.preference_config(context, [0], evaluate=False).template_date == "2025-03-01T23:59:00"


@pytest.mark.parametrize("given", [None, "2025-02-02"])
def test_training_goes_on_overnight(of: Any, tmp_path: Path, clock: list[datetime.datetime], given: str | None) -> None:
    """Reference log-probabilities are kept by the prompt: with tomorrow's date the trainer would look for records that nobody ran."""
    records = [record(id=f"r{index}", prompt=text) for index, text in enumerate((QUESTION, "what colour ?"))]
    options = {
        "precompute_ref_log_probs": True,
        "max_steps": 2,
        "save_strategy": "steps",
        "save_steps": 1,
        "template_date": given,
    }

    def trainer() -> PreferenceTrainer:
        loaded = of("mistral3", DATED)
        args = config(tmp_path / "out", per_device_train_batch_size=2, **options)
        return PreferenceTrainer(loaded.model, args, processing_class=loaded.processor, train_dataset=records)

    first = trainer()
    first.precompute_reference()
    keys = [first.data_collator.key(each) for each in records]
    clock.append(clock[0] + datetime.timedelta(days=1))
    first.train()
    again = trainer()
    assert [again.data_collator.key(each) for each in records] == keys
    assert [each.computed for each in again.precompute_reference()] == [0]
    assert (tmp_path / "out" / "template_date.json").exists() == (given is None)
