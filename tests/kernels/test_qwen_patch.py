"""patch_model and record_attention on Qwen2.5-VL: pictures of different sizes, three-axis positions, sliding windows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny_qwen, sample_pictures
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from mmdpo_kernels import TokenTree, image_segments, patch_model, record_attention, unpatch_model
from mmdpo_trainers.models.processors import load_processor

PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
PROMPTS = [
    f"<|im_start|>user\n{PICTURE} what colour ?<|im_end|>\n<|im_start|>assistant\n",
    f"<|im_start|>user\nImage1:{PICTURE}\nImage2:{PICTURE}\nIn Image2, what shape ?<|im_end|>\n<|im_start|>assistant\n",
]
SIZES = [(48, 48), (72, 36), (36, 60)]
COUNTS = [[16], [18, 15]]
"""Image tokens of the pictures of each prompt: 12 x 12 pixels make one."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen(tmp_path_factory.mktemp("qwen"))


def load(folder: Path, dtype: torch.dtype = torch.float64) -> Any:
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()


@pytest.fixture
def model(folder: Path) -> Any:
    return load(folder)


def batch(folder: Path, side: str, *, dtype: torch.dtype = torch.float64, prompts: list[str] = PROMPTS) -> dict[str, Tensor]:
    processor = load_processor(folder, "qwen2_5_vl")
    pictures = [picture.resize(size) for picture, size in zip(sample_pictures(3, seed=3), SIZES, strict=True)]
    if prompts != PROMPTS:
        pictures = pictures[-sum(prompt.count(PICTURE) for prompt in prompts) :]
    found = processor(text=list(prompts), images=pictures, padding=True, padding_side=side, return_tensors="pt")
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in found.items()}


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float64, 1e-11), (torch.float32, 1e-4)])
def test_logits_equal_the_unpatched_model(folder: Path, side: str, dtype: torch.dtype, near: float) -> None:
    model = load(folder, dtype)
    inputs = batch(folder, side, dtype=dtype)
    real = inputs["attention_mask"].bool()
    assert not bool(real.all())
    want = model(**inputs).logits[real]
    got = patch_model(model)(**inputs).logits[real]
    torch.testing.assert_close(got, want, rtol=near, atol=near)
    without = {name: value for name, value in inputs.items() if name != "mm_token_type_ids"}
    assert not torch.allclose(model(**without).logits[real], want, atol=1e-2), "positions on three axes matter"


def test_the_vision_tower_stays_and_unpatching_restores(folder: Path, model: Any) -> None:
    inputs = batch(folder, "left")
    want = model(**inputs).logits
    before = {name: config.to_dict() for name, config in configs(model).items()}
    assert patch_model(model).model.visual.config._attn_implementation == "sdpa"
    assert model.config.text_config._attn_implementation == "mmdpo_tree"
    model(**inputs)
    unpatch_model(model)
    assert {name: config._attn_implementation for name, config in configs(model).items()} == dict.fromkeys(before, "sdpa")
    assert {name: config.to_dict() for name, config in configs(model).items()} == before
    assert torch.equal(model(**inputs).logits, want)


def configs(model: Any) -> dict[str, Any]:
    return {name: module.config for name, module in model.named_modules() if hasattr(module, "config")}


def test_generate_equals_the_unpatched_model(folder: Path, model: Any) -> None:
    inputs = batch(folder, "left")
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    want = model.generate(**inputs, **options)
    got = patch_model(model).generate(**inputs, **options)
    assert torch.equal(got.sequences, want.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(want.logits), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("side", ["left", "right"])
def test_recorded_mass_equals_eager_maps(folder: Path, side: str) -> None:
    model = load(folder, torch.float32)  # transformers' eager softmax turns float64 padding rows into NaN
    inputs = batch(folder, side, dtype=torch.float32)
    segments = image_segments(inputs["input_ids"], model.config.image_token_id, COUNTS)
    rows = (inputs["attention_mask"] == 1) & (torch.arange(segments.shape[1]) % 3 == 0)
    model.set_attn_implementation({"text_config": "eager"})
    maps = model(**inputs, output_attentions=True).attentions
    model.set_attn_implementation({"text_config": "sdpa"})
    patch_model(model)
    for stop in (False, True):
        with record_attention(model, segments, rows, layers=[0, 1], stop_early=stop) as recorder:
            model(**inputs)
        for layer, mass in recorder.mass.items():
            heads = maps[layer].mean(1).masked_fill(~rows[..., None], 0)
            want = torch.stack([heads.mul(segments[:, None] == n).sum((1, 2)) for n in range(2)], 1)
            torch.testing.assert_close(mass, want / rows.sum(1, keepdim=True), rtol=1e-5, atol=1e-6)


def test_recorded_mass_in_generate_equals_teacher_forcing(folder: Path, model: Any) -> None:
    inputs = batch(folder, "left")
    segments = image_segments(inputs["input_ids"], model.config.image_token_id, COUNTS)
    width = segments.shape[1]
    patch_model(model)
    options: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    with record_attention(model, segments, None, layers=[1], eos_token_ids=[]) as recorder:
        whole = model.generate(**inputs, **options)
    padded = torch.nn.functional.pad(segments, (0, 5), value=-1)
    rows = (torch.arange(width + 5) >= width - 1) & (torch.arange(width + 5) < width + 4)
    forced = {
        **inputs,
        "input_ids": whole,
        "attention_mask": torch.nn.functional.pad(inputs["attention_mask"], (0, 5), value=1),
        "mm_token_type_ids": torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 5)),
    }
    with record_attention(model, padded, rows.expand(2, -1), layers=[1]) as teacher:
        model(**forced)
    torch.testing.assert_close(recorder.mass[1], teacher.mass[1], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("window", [None, 6])
def test_a_packed_tree_equals_its_sequences(folder: Path, model: Any, tmp_path: Path, window: int | None) -> None:
    """Every branch's logits are the unpatched model's on that sequence alone, with windows that count ancestors too."""
    if window is not None:
        model = load(make_tiny_qwen(tmp_path, sliding_window=window))
        assert model.config.text_config.layer_types == ["full_attention", "sliding_attention", "sliding_attention"]
    one = batch(folder, "left", prompts=[PROMPTS[1]])
    prompt = one["input_ids"][0].tolist()
    pictures = {name: one[name] for name in ("pixel_values", "image_grid_thw")}
    sequences = [prompt + answer for answer in ([27, 28, 29], [27, 31], [32, 33, 34, 35])]
    image = model.config.image_token_id
    identity = [("p", offset) if token == image else None for offset, token in enumerate(prompt)]
    tree = TokenTree.from_sequences(
        sequences,
        prompt_lengths=[len(prompt)] * 3,
        identities=[identity + [None] * (len(sequence) - len(prompt)) for sequence in sequences],
    )
    positions = torch.empty(3, 1, tree.num_tokens, dtype=torch.long)
    want = []
    for path, sequence in zip(tree.paths, sequences, strict=True):
        ids = torch.tensor([sequence])
        kinds = (ids == image).int()
        positions[:, 0, path] = model.model.get_rope_index(ids, kinds, one["image_grid_thw"])[0][:, 0]
        want.append(model(input_ids=ids, mm_token_type_ids=kinds, **pictures).logits[0, len(prompt) - 1 : -1])
    logits = patch_model(model)(
        input_ids=tree.input_ids[None], attention_mask=tree.attention_mask, position_ids=positions, **pictures
    ).logits[0]
    for rows, alone in zip(tree.rows, want, strict=True):
        torch.testing.assert_close(logits[rows], alone, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("side", ["left", "right"])
def test_sliding_windows(tmp_path: Path, side: str) -> None:
    model = load(make_tiny_qwen(tmp_path, sliding_window=7))
    inputs = batch(tmp_path, side)
    real = inputs["attention_mask"].bool()
    want = model(**inputs).logits[real]
    whole = copy.deepcopy(model)
    whole.config.text_config.layer_types = ["full_attention"] * 3
    for layer in whole.model.language_model.layers:
        layer.self_attn.sliding_window = None
    whole.model.language_model.has_sliding_layers = False
    assert not torch.allclose(whole(**inputs).logits[real], want, atol=1e-3), "the window reaches less far than the prompts"
    got = patch_model(model)(**inputs).logits[real]
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-11)
    new = unpatch_model(model).generate(**batch(tmp_path, "left"), max_new_tokens=4, do_sample=False)
    assert torch.equal(patch_model(model).generate(**batch(tmp_path, "left"), max_new_tokens=4, do_sample=False), new)


def test_gradients_under_checkpointing(folder: Path, model: Any) -> None:
    inputs = batch(folder, "left")
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)

    def grads() -> dict[str, Tensor]:
        model.zero_grad()
        model(**inputs, labels=labels).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    want = grads()
    patch_model(model).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    got = grads()
    assert got.keys() == want.keys()
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-8, atol=1e-10, msg=name)
