"""patch_model on LLaVA: exact logits, exact unpatching, PEFT, checkpointing, generate; record_attention against eager maps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny_llava, sample_pictures
from torch import Tensor
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmdpo_kernels import TokenTree, image_segments, patch_model, record_attention, unpatch_model
from mmdpo_kernels.patched import language_tower

PROMPTS = [
    "USER: In <image> what colour ? ASSISTANT:",
    "USER: Image 1 : <image> Image 2 : <image><image> In Image 2 , what shape ? ASSISTANT:",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture
def model(folder: Path) -> Any:
    return AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float64).eval()


def batch(folder: Path, side: str, prompts: list[str] = PROMPTS) -> dict[str, Tensor]:
    processor = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = side
    pictures = sample_pictures(4, seed=3)
    images = [pictures[: prompt.count("<image>")] for prompt in prompts]
    found = processor(images=images, text=list(prompts), padding=True, return_tensors="pt")
    return {name: t.double() if t.is_floating_point() else t for name, t in found.items()}


def snapshot(model: Any) -> dict[str, Any]:
    """Everything patching could leave behind: module attributes, hooks and configurations."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        plain = {k: v for k, v in vars(module).items() if k not in ("_parameters", "_buffers", "_modules")}
        found[name] = {k: copy.deepcopy(v.__dict__) if hasattr(v, "to_dict") else repr(v) for k, v in plain.items()}
    return found


@pytest.mark.smoke
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("backend", ["auto", "reference", "sdpa"])
def test_logits_equal_the_unpatched_model(folder: Path, model: Any, side: str, backend: str) -> None:
    inputs = batch(folder, side)
    assert not bool(inputs["attention_mask"].all())
    real = inputs["attention_mask"].bool()
    want = model(**inputs).logits[real]
    got = patch_model(model, backend=backend)(**inputs).logits[real]
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    unpadded = {name: value[1:] if name != "pixel_values" else value[1:] for name, value in batch(folder, side).items()}
    got = model(**unpadded).logits
    torch.testing.assert_close(got, unpatch_model(model)(**unpadded).logits, rtol=1e-11, atol=1e-11)


def test_unpatching_restores_every_attribute(folder: Path, model: Any) -> None:
    model(**batch(folder, "left"))  # transformers installs hooks of its own in a first forward
    before = snapshot(model)
    assert patch_model(model) is model
    assert snapshot(model) != before
    patch_model(patch_model(model), backend="reference")
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
    segments = torch.zeros_like(batch(folder, "left")["input_ids"])
    with record_attention(model, segments, segments == 0, layers=[1], stop_early=True):
        model(**batch(folder, "left"))
    assert unpatch_model(model) is model
    assert snapshot(model) == before
    assert snapshot(unpatch_model(model)) == before


def test_patched_model_is_copied_and_saved_like_any_other(folder: Path, model: Any, tmp_path: Path) -> None:
    patch_model(model).save_pretrained(tmp_path)
    assert "mmdpo" not in (tmp_path / "config.json").read_text()
    inputs = batch(folder, "left")
    torch.testing.assert_close(copy.deepcopy(model)(**inputs).logits, model(**inputs).logits)


def test_unsupported_models_are_refused() -> None:
    with pytest.raises(ValueError, match="Linear cannot be patched"):
        patch_model(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="has no backend 'flash'"):
        patch_model(torch.nn.Linear(2, 2), backend="flash")


def lora(model: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=r".*language_model.*(q_proj|v_proj|up_proj)", init_lora_weights=False)
    return get_peft_model(model, config).double()


@pytest.mark.parametrize("patch_first", [True, False])
def test_under_peft(folder: Path, model: Any, patch_first: bool) -> None:
    inputs = batch(folder, "right")
    real = inputs["attention_mask"].bool()
    wrapped = lora(patch_model(model)) if patch_first else patch_model(lora(model))
    got = wrapped(**inputs).logits[real]
    with wrapped.disable_adapter():
        base = wrapped(**inputs).logits[real]
    assert not torch.allclose(got, base)
    want = unpatch_model(wrapped)(**inputs).logits[real]
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_under_checkpointing(folder: Path, model: Any, reentrant: bool) -> None:
    inputs = batch(folder, "left")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def grads() -> dict[str, Tensor]:
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    want = grads()
    patch_model(model).train()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    segments = torch.zeros_like(inputs["input_ids"])
    with record_attention(model, segments, segments == 0, layers=[0, 2]) as recorder:
        got = grads()
    assert recorder.counts[2].tolist() == [segments.shape[1]] * 2
    assert got.keys() >= want.keys() - {n for n in want if "vision" in n}
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-9, atol=1e-12, msg=name)


def test_generate_equals_the_unpatched_model(folder: Path, model: Any) -> None:
    inputs = batch(folder, "left")
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    want = model.generate(**inputs, **options)
    for cache in ("dynamic", "static"):
        got = patch_model(model).generate(**inputs, **options, cache_implementation=cache)
        assert torch.equal(got.sequences, want.sequences)
        torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-9, atol=1e-9)


@pytest.mark.smoke
def test_a_packed_tree_equals_its_sequences(folder: Path, model: Any) -> None:
    """Hidden states of every branch equal the unpatched model's on that sequence alone."""
    one = batch(folder, "left", [PROMPTS[1]])
    prompt = one["input_ids"][0].tolist()
    answers = [[7, 8, 9], [7, 11], [12, 13, 14, 15]]
    image = model.config.image_token_id
    identity = [("p", offset) if token == image else None for offset, token in enumerate(prompt)]
    tree = TokenTree.from_sequences(
        [prompt + answer for answer in answers],
        prompt_lengths=[len(prompt)] * 3,
        identities=[identity + [None] * len(answer) for answer in answers],
    )
    assert tree.num_tokens == len(prompt) + 8
    pixels = one["pixel_values"]
    want = [
        model(input_ids=torch.tensor([prompt + answer]), pixel_values=pixels).logits[0, len(prompt) - 1 : -1]
        for answer in answers
    ]
    logits = patch_model(model)(
        input_ids=tree.input_ids[None],
        attention_mask=tree.attention_mask,
        position_ids=tree.position_ids[None],
        pixel_values=pixels,
    ).logits[0]
    for rows, alone in zip(tree.rows, want, strict=True):
        torch.testing.assert_close(logits[rows], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.smoke
@pytest.mark.parametrize("side", ["left", "right"])
def test_recorded_mass_equals_eager_maps(folder: Path, model: Any, side: str) -> None:
    inputs = {name: t.float() if t.is_floating_point() else t for name, t in batch(folder, side).items()}
    model.float()  # transformers' eager softmax turns float64 padding rows into NaN
    segments = image_segments(inputs["input_ids"], model.config.image_token_id, [[16], [16, 16, 16]])
    rows = (inputs["attention_mask"] == 1) & (torch.arange(segments.shape[1]) % 3 == 0)
    model.set_attn_implementation({"text_config": "eager"})
    maps = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation({"text_config": "sdpa"})
    patch_model(model)
    for stop in (False, True):
        with record_attention(model, segments, rows, layers=[0, -2], stop_early=stop) as recorder:
            for _ in range(2):
                out = model(**inputs)
        assert ("logits" in out) is not stop
        assert sorted(recorder.mass) == [0, 1]
        for layer, mass in recorder.mass.items():
            heads = maps[layer].mean(1)
            want = torch.stack(
                [heads.masked_fill(~rows[..., None], 0).mul(segments[:, None] == n).sum((1, 2)) for n in range(3)], 1
            )
            torch.testing.assert_close(mass, want / rows.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)
    assert "forward" not in vars(model)


@pytest.mark.smoke
def test_recorded_mass_in_generate_equals_teacher_forcing(folder: Path, model: Any) -> None:
    """Decode steps count until a row reads its end token; both caches."""
    inputs = batch(folder, "left")
    segments = image_segments(inputs["input_ids"], model.config.image_token_id, [[16], [16, 16, 16]])
    plain = patch_model(model).generate(**inputs, max_new_tokens=6, do_sample=False)[:, segments.shape[1] :]
    # The second row's third token ends rows; each then counts up to and with its first.
    end = int(plain[1, 2])
    lengths = [row.index(end) + 1 if end in row else 6 for row in plain.tolist()]
    assert min(lengths) < max(lengths)
    whole = torch.cat([inputs["input_ids"], plain], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones_like(plain)], 1)
    padded = torch.nn.functional.pad(segments, (0, 6), value=-1)
    rows = torch.zeros_like(padded, dtype=torch.bool)
    for row, length in enumerate(lengths):
        rows[row, segments.shape[1] - 1 : segments.shape[1] - 1 + length] = True
    with record_attention(model, padded, rows, layers=[1]) as forced:
        model(input_ids=whole, attention_mask=mask, pixel_values=inputs["pixel_values"])
    model.generation_config.pad_token_id = 3
    for cache in ("dynamic", "static"):
        with record_attention(model, segments, None, layers=[1], eos_token_ids=[end]) as recorder:
            model.generate(**inputs, max_new_tokens=6, do_sample=False, eos_token_id=end, cache_implementation=cache)
        assert recorder.counts[1].tolist() == lengths
        torch.testing.assert_close(recorder.mass[1], forced.mass[1], rtol=1e-6, atol=1e-8)


def test_recorder_errors(model: Any) -> None:
    segments = torch.zeros(2, 5, dtype=torch.int32)
    with pytest.raises(ValueError, match="is not patched"), record_attention(model, segments, None, layers=[0]):
        pass
    patch_model(model)
    with pytest.raises(ValueError, match="model's 3 layers, got"), record_attention(model, segments, None, layers=[3]):
        pass
    with (
        pytest.raises(ValueError, match="do not nest"),
        record_attention(model, segments, None, layers=[0]),
        record_attention(model, segments, None, layers=[0]),
    ):
        pass
    with (
        pytest.raises(ValueError, match="batch of 2, the model was called with 1"),
        record_attention(model, segments, segments == 0, layers=[0]),
    ):
        model(input_ids=torch.ones(1, 5, dtype=torch.long))
    assert language_tower(model).config._attn_implementation == "mmdpo_tree"


def test_under_autocast(folder: Path, model: Any) -> None:
    """A float32 model under bfloat16 autocast: as near to float64 as the unpatched model is."""
    inputs = batch(folder, "right")
    real = inputs["attention_mask"].bool()
    truth = model(**inputs).logits[real]
    model.float()
    single = {name: t.float() if t.is_floating_point() else t for name, t in inputs.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = model(**single).logits[real]
        ours = patch_model(model)(**single).logits[real]
    assert ours.dtype == plain.dtype == torch.bfloat16
    assert (ours.double() - truth).abs().mean() < 1.2 * (plain.double() - truth).abs().mean()


def test_models_that_share_a_configuration(folder: Path, model: Any) -> None:
    other = type(model)(model.config).double().eval()
    assert other.config.text_config is model.config.text_config
    patch_model(model)
    patch_model(other)
    unpatch_model(model)
    segments = torch.zeros_like(batch(folder, "left")["input_ids"])
    with record_attention(other, segments, segments == 0, layers=[0]) as recorder:
        other(**batch(folder, "left"))
    assert sorted(recorder.mass) == [0]
    assert unpatch_model(other).config.text_config._attn_implementation == "sdpa"


def test_a_copy_of_a_patched_model_can_be_patched_and_unpatched(model: Any) -> None:
    duplicate = copy.deepcopy(patch_model(model))
    for each in (duplicate, patch_model(copy.deepcopy(model))):
        assert unpatch_model(each).config.text_config._attn_implementation == "sdpa"
    assert language_tower(model).config._attn_implementation == "mmdpo_tree"


def test_patching_again_after_another_implementation_was_set(model: Any) -> None:
    patch_model(model).set_attn_implementation({"text_config": "eager"})
    segments = torch.zeros(2, 5, dtype=torch.int32)
    with pytest.raises(ValueError, match="is not patched"), record_attention(model, segments, None, layers=[0]):
        pass
    assert language_tower(patch_model(model)).config._attn_implementation == "mmdpo_tree"
    assert language_tower(unpatch_model(model)).config._attn_implementation == "eager"


@pytest.mark.parametrize("inference", [torch.inference_mode, torch.no_grad])
def test_without_gradients(folder: Path, model: Any, inference: Any) -> None:
    inputs = batch(folder, "left")
    want = model(**inputs).logits.detach()
    real = inputs["attention_mask"].bool()
    with inference():
        got = patch_model(model)(**inputs).logits
        model.generate(**inputs, max_new_tokens=2, do_sample=False)
    torch.testing.assert_close(got[real], want[real], rtol=1e-11, atol=1e-11)


def test_all_layers_share_one_plan(folder: Path, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmdpo_kernels import tree_mask

    plans = []
    original = tree_mask._plan_batch
    monkeypatch.setattr(tree_mask._rectangles, "_make", lambda tree_end: plans.append(1) or original(tree_end))
    for inference in (torch.enable_grad, torch.no_grad):
        plans.clear()
        with inference():
            patch_model(model)(**batch(folder, "left"))
        assert len(plans) == 1


def test_integer_masks_that_are_no_trees_are_refused(model: Any) -> None:
    ids = torch.ones(2, 5, dtype=torch.long)
    for mask in (torch.ones(2, 1, 5, 5, dtype=torch.int32), torch.ones(2, 1, 1, 5, dtype=torch.long)):
        with pytest.raises(ValueError, match="an integer mask is a token tree, int32 of shape"):
            patch_model(model)(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize("how", ["peft", "no_cache", "embeds"])
def test_ended_rows_stop_counting_however_generate_runs(folder: Path, model: Any, how: str) -> None:
    inputs = batch(folder, "left")
    wrapped = lora(model) if how == "peft" else model
    patch_model(wrapped)
    segments = image_segments(inputs["input_ids"], model.config.image_token_id, [[16], [16, 16, 16]])
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False}
    width = inputs["input_ids"].shape[1]
    if how == "embeds":
        embeds = torch.randn(*inputs["input_ids"].shape, 32, dtype=torch.float64)
        inputs = {"inputs_embeds": embeds, "attention_mask": inputs["attention_mask"]}
        width = 0
    if how == "no_cache":
        options["use_cache"] = False
    plain = wrapped.generate(**inputs, **options)[:, width:].tolist()
    end = plain[1][0]
    lengths = [row.index(end) + 1 if end in row else 5 for row in plain]
    assert lengths[1] == 1 < lengths[0]
    with record_attention(wrapped, segments, None, layers=[1], eos_token_ids=[end]) as recorder:
        wrapped.generate(**inputs, **options, eos_token_id=end, pad_token_id=3)
    assert recorder.counts[1].tolist() == lengths


def test_prefill_of_a_static_cache_leaves_empty_slots_out(folder: Path, model: Any) -> None:
    from transformers import StaticCache

    inputs = batch(folder, "left", [PROMPTS[0]])
    segments = image_segments(inputs["input_ids"], model.config.image_token_id, [[16]])
    patch_model(model)
    masses = []
    for cache in (None, StaticCache(config=model.config.get_text_config(), max_cache_len=90)):
        with record_attention(model, segments, None, layers=[1]) as recorder, torch.no_grad():
            model(**inputs, past_key_values=cache, use_cache=cache is not None)
        masses.append(recorder.mass[1])
    torch.testing.assert_close(masses[0], masses[1])


def test_sliding_windows_are_recorded_as_they_are_attended() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        sliding_window=4,
    )  # fmt: skip
    plain = MistralForCausalLM(config).eval()
    ids = torch.randint(5, 50, (1, 12))
    plain.set_attn_implementation("eager")
    maps = plain(input_ids=ids, output_attentions=True).attentions[1].mean(1)[0]
    plain.set_attn_implementation("sdpa")
    want = plain(input_ids=ids).logits
    tree = TokenTree.from_sequences([ids[0].tolist()], prompt_lengths=[6])
    segments = (torch.arange(12) % 2)[None]
    rows = torch.arange(12)[None] > 7
    with record_attention(patch_model(plain), segments, rows, layers=[1]) as recorder:
        got = plain(
            input_ids=tree.input_ids[None], attention_mask=tree.attention_mask, position_ids=tree.position_ids[None]
        ).logits
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    expected = torch.stack([maps[8:, segments[0] == n].sum(1).mean() for n in (0, 1)])[None]
    torch.testing.assert_close(recorder.mass[1], expected, rtol=1e-5, atol=1e-6)
