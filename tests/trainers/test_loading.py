"""Loading from local folders, chat formats, and prompts with answers as model inputs."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_models import make_tiny_llava, sample_pictures

from mmdpo_trainers.errors import DataError, StageError
from mmdpo_trainers.models.chat_format import render_prompt
from mmdpo_trainers.models.encode import encode_prompts
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def loaded(model_path: Path) -> LoadedModel:
    return load_model(model_path)


def record(prompt: str, pictures: int, id: str = "a") -> dict[str, Any]:
    return {"id": id, "prompt": prompt, "images": sample_pictures(pictures)}


def test_loads_without_touching_the_network(model_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    loaded = load_model(model_path)
    assert not loaded.model.training and loaded.dtype == torch.float32
    assert loaded.num_layers == 3
    assert loaded.end_ids == {loaded.tokenizer.eos_token_id}


def test_dtype_is_the_checkpoints_or_the_asked_one(tmp_path: Path) -> None:
    path = make_tiny_llava(tmp_path, dtype=torch.bfloat16)
    assert load_model(path).dtype == torch.bfloat16
    assert load_model(path, dtype="float32").dtype == torch.float32
    with pytest.raises(StageError, match="dtype 'int8': expected auto"):
        load_model(path, dtype="int8")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: shutil.rmtree(p), r"no such folder.*--local-dir"),
        (lambda p: (p / "config.json").unlink(), "no config.json"),
        (lambda p: (p / "config.json").write_text("{"), "config.json cannot be read"),
        (lambda p: (p / "model.safetensors").unlink(), "no weights"),
        (lambda p: (p / "model.safetensors").write_bytes((p / "model.safetensors").read_bytes()[:5000]), "cannot be loaded"),
        (lambda p: (p / "tokenizer.json").unlink(), "processor cannot be loaded"),
        (lambda p: edit_config(p, model_type="gpt2"), "family 'gpt2' has no declaration .*; families with a declaration: llava"),
        (lambda p: edit_config(p, model_type="no_such"), "(?s)no_such.*; families with a declaration: llava"),
        (lambda p: (p / "tokenizer_config.json").unlink(), "neither a padding nor an end token"),
        (lambda p: edit_config(p, image_token_index=None), "image_token_index must be the id of the image token, got None"),
        (lambda p: edit_config(p, text_config={"num_hidden_layers": 4}), "weights are missing"),
    ],
)
def test_what_is_missing_is_named(model_path: Path, tmp_path: Path, damage: Any, message: str) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model_path, broken)
    damage(broken)
    with pytest.raises(StageError, match=message):
        load_model(broken)


@pytest.mark.parametrize("device", ["foo", *([] if torch.cuda.is_available() else ["cuda", "cuda:1"])])
def test_a_device_this_machine_lacks_is_named(model_path: Path, device: str) -> None:
    with pytest.raises(StageError, match=f"device '{device}': "):
        load_model(model_path, device=device)


def edit_config(path: Path, **changes: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    for key, value in changes.items():
        config[key] = {**config[key], **value} if isinstance(value, dict) else value
    (path / "config.json").write_text(json.dumps(config))


def test_an_adapter_is_merged_and_equals_peft(model_path: Path, tmp_path: Path) -> None:
    base = load_model(model_path)
    adapted = get_peft_model(base.model, LoraConfig(r=4, target_modules=r".*language_model.*\.(q|v)_proj"))
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    adapted.save_pretrained(tmp_path / "adapter")
    prompts = [record("<image>\nwhat colour ?", 1)]
    merged = load_model(model_path, adapter=tmp_path / "adapter")
    with torch.no_grad():
        expected = adapted(**encode_prompts(base, prompts, padding_side="right").inputs).logits
        found = merged.model(**encode_prompts(merged, prompts, padding_side="right").inputs).logits
        plain = load_model(model_path).model(**encode_prompts(base, prompts, padding_side="right").inputs).logits
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found, plain, atol=1e-2)
    with pytest.raises(StageError, match="no adapter_config.json"):
        load_model(model_path, adapter=model_path)
    with pytest.raises(StageError, match="it is a PEFT adapter"):
        load_model(tmp_path / "adapter")


def test_pictures_keep_their_places_in_the_prompt(loaded: LoadedModel) -> None:
    prompt = "Image1:<image>\nImage2:<image>\nIn Image2, what colour?"
    assert render_prompt(loaded.processor, prompt) == f"USER: {prompt} ASSISTANT:"


class LlavaProcessor(SimpleNamespace):
    """A processor of the family, which goes by its class."""


def test_the_image_token_is_the_processors_own() -> None:
    processor = LlavaProcessor(image_token="<|pic|>", chat_template=None, tokenizer=SimpleNamespace(chat_template=None))
    assert render_prompt(processor, "A:<image> B:<image>") == "USER: A:<|pic|> B:<|pic|> ASSISTANT:"


def test_a_template_that_takes_text_only_or_loses_it(loaded: LoadedModel) -> None:
    text_only = LlavaProcessor(
        image_token="<image>",
        chat_template="{% for m in messages %}{{ '[' + m['content'] + ']' }}{% endfor %}",
        tokenizer=loaded.tokenizer,
        apply_chat_template=loaded.processor.tokenizer.apply_chat_template,
    )
    assert render_prompt(text_only, "<image> hi") == "[<image> hi]"
    text_only.chat_template = "nothing"
    with pytest.raises(StageError, match="does not keep the text"):
        render_prompt(text_only, "<image> hi")


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompt_and_answer_are_tokenised_apart_and_padded(loaded: LoadedModel, side: str) -> None:
    records = [record("<image> what colour ?", 1), record("Image1:<image> Image2:<image> what shape is it ?", 2, "b")]
    alone = [encode_prompts(loaded, [one], padding_side=side).inputs["input_ids"][0].tolist() for one in records]
    answers = ["red circle", [7, 8, 9]]
    encoded = encode_prompts(loaded, records, padding_side=side, answers=answers)
    ids, mask = encoded.inputs["input_ids"], encoded.inputs["attention_mask"]
    expected = [loaded.tokenizer("red circle", add_special_tokens=False).input_ids, [7, 8, 9]]
    for row in range(2):
        start, stop = encoded.response_spans[row]
        assert ids[row, start:stop].tolist() == expected[row]
        assert ids[row][mask[row].bool()].tolist() == alone[row] + expected[row]
    assert mask[1].all() and not mask[0, 0 if side == "left" else -1]
    assert encoded.tokens_per_image == [[16], [16, 16]]
    assert encoded.inputs["pixel_values"].shape == (3, 3, 48, 48)


def test_the_begin_token_is_not_doubled(model_path: Path) -> None:
    loaded = load_model(model_path)
    loaded.processor.chat_template = "<s>" + loaded.processor.chat_template
    ids = encode_prompts(loaded, [record("<image> what ?", 1)], padding_side="left").inputs["input_ids"][0]
    assert (ids == loaded.tokenizer.bos_token_id).sum() == 1


def test_placeholders_must_match_the_pictures(loaded: LoadedModel) -> None:
    with pytest.raises(DataError, match="record odd: the prompt has 1 <image> placeholders for 2 pictures"):
        encode_prompts(loaded, [record("<image> what ?", 2, "odd")], padding_side="left")
    with pytest.raises(DataError, match="record odd: the answer holds the image token"):
        encode_prompts(loaded, [record("<image> what ?", 1, "odd")], padding_side="left", answers=["an <image>"])


def test_a_picture_that_cannot_be_read_names_its_record(loaded: LoadedModel, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="record lost: missing"):
        encode_prompts(loaded, [{"id": "lost", "prompt": "<image>", "images": [str(tmp_path / "no.png")]}], padding_side="left")


def test_weights_are_whole_where_training_shards_them(model_path: Path) -> None:
    """Settings with ZeRO-3, alive in this process as after a training in it, have transformers read shards."""
    pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, is_deepspeed_zero3_enabled, unset_hf_deepspeed_config

    expected = load_model(model_path).model.state_dict()
    settings = HfDeepSpeedConfig({"zero_optimization": {"stage": 3}, "train_micro_batch_size_per_gpu": 1})
    try:
        assert is_deepspeed_zero3_enabled()
        model = load_model(model_path).model
        assert is_deepspeed_zero3_enabled(), "for what reads its own shards"
    finally:
        unset_hf_deepspeed_config()
        del settings
    assert not any(hasattr(parameter, "ds_id") for parameter in model.parameters())
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
