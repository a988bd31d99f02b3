"""Tree-packed mDPO batches against separate sequences through the unpatched model: log-probabilities, losses and gradients, float64."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import make_tiny_llava, make_tiny_qwen, make_tiny_qwen3_5, sample_pictures
from torch import Tensor
from torch.nn.functional import logsigmoid
from training_cases import preference_records
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from wide_kernels import widen_kernels

from mmdpo_kernels import SequenceLogps, patch_model, preference_loss
from mmdpo_trainers.data.corruption import Corruption, corrupt
from mmdpo_trainers.models.chat_format import render_prompt
from mmdpo_trainers.models.families import family_of
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.training import head, model_parts
from mmdpo_trainers.training.batches.collator import PreferenceBatch, PreferenceCollator

FAMILIES = {"llava": make_tiny_llava, "qwen2_5_vl": make_tiny_qwen, "qwen3_5": make_tiny_qwen3_5}
SIZES = [(48, 48), (72, 36), (36, 60), (48, 24), (60, 48), (24, 72)]
BLUR = Corruption(kind="blur", strength=0.5)
"""Draws nothing, so what is to come out is known."""


@pytest.fixture(scope="module", params=list(FAMILIES))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return FAMILIES[request.param](tmp_path_factory.mktemp(request.param) / "model")


@pytest.fixture(autouse=True)
def exact_float64(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers' RMSNorm, Qwen's vision rotary and Gated DeltaNet round to float32 whatever the dtype; here they are exact, on both sides."""
    if folder.parent.name.startswith("qwen3_5"):
        widen_kernels(monkeypatch, "qwen3_5")

    def norm(self: Any, hidden_states: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.variance_epsilon)

    def rotary(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, ...]:
        cos, sin = cos[:, None].to(q), sin[:, None].to(q)
        return tuple(x * cos + modeling_qwen2_5_vl.rotate_half(x) * sin for x in (q, k))

    monkeypatch.setattr(LlamaRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_qwen2_5_vl.Qwen2_5_VLRMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_qwen2_5_vl, "apply_rotary_pos_emb_vision", rotary)


@pytest.fixture
def loaded(folder: Path) -> LoadedModel:
    return load_model(folder, dtype=torch.float64, device="cpu")


def records() -> list[dict[str, Any]]:
    """Sequences with and without a target, single pictures, a text, own corrupted pictures, four questions about the same pictures."""
    pictures = [picture.resize(size) for picture, size in zip(sample_pictures(6), SIZES, strict=True)]
    found = [{**record, "region": None, "patch_grid": None} for record in preference_records(6, pictures)]
    found[2]["target"] = None
    for index, question in enumerate(("is the star red ?", "is there a star ?", "two")):
        again = f"Image 1 : <image>\nImage 2 : <image>\n{question}"
        found.append({**found[0], "id": f"again {index}", "target": 1, "prompt": [{"role": "user", "content": again}]})
    own = [picture.rotate(90) for picture in found[0]["images"]]
    found.append({**found[0], "id": "own", "rejected_images": own})
    return found


def collator(loaded: LoadedModel, **options: Any) -> PreferenceCollator:
    defaults = {"branches": ("chosen", "rejected", "corrupted"), "corruption": BLUR, "family": family_of(loaded.model)}
    tokenizer = loaded.processor.tokenizer
    return PreferenceCollator(
        loaded.processor,
        image_token_id=loaded.image_token_id,
        end_id=tokenizer.eos_token_id,
        pad_id=loaded.pad_id,
        **{**defaults, **options},
    )


def corrupted_pictures(record: dict[str, Any]) -> list[Any]:
    if "rejected_images" in record:
        return record["rejected_images"]
    pictures, target = record["images"], record["target"]
    every = len(pictures) == 1 or target is None
    return [corrupt(p, BLUR, "") if every or place == target else p for place, p in enumerate(pictures)]


def plain_logps(model: Any, loaded: LoadedModel, record: dict[str, Any], branch: str) -> Tensor:
    """Summed log-probability of a response, from the unpatched model's logits of that one sequence, as the processor makes it."""
    pictures = corrupted_pictures(record) if branch == "corrupted" else record["images"]
    text = render_prompt(loaded.processor, record["prompt"][0]["content"])
    inputs = dict(loaded.processor(text=[text], images=pictures or None, return_tensors="pt"))
    tokenizer = loaded.processor.tokenizer
    column = "rejected" if branch == "rejected" else "chosen"
    response = tokenizer(record[column][0]["content"], add_special_tokens=False).input_ids + [tokenizer.eos_token_id]
    start = inputs["input_ids"].shape[1]
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.tensor([response])], 1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == loaded.image_token_id).int()
    if "pixel_values" in inputs:
        inputs["pixel_values"] = inputs["pixel_values"].double()
    logps = model(**inputs).logits[0, start - 1 : -1].log_softmax(-1)
    return logps.gather(1, torch.tensor(response)[:, None]).sum()


def plain_loss(policy: Tensor, reference: Tensor) -> Tensor:
    """mDPO from its definition; (n, 3) log-probabilities."""
    chosen, rejected, corrupted = (0.1 * (policy - reference)).unbind(1)
    return -(logsigmoid(chosen - rejected) + logsigmoid(chosen - corrupted) + logsigmoid(chosen)).mean()


def packed_loss(policy: Tensor, reference: Tensor) -> Tensor:
    pairs = [
        SequenceLogps(**dict(zip(("chosen", "rejected", "corrupted"), logps.unbind(1), strict=True)))
        for logps in (policy, reference)
    ]
    return preference_loss(*pairs, loss_type=("sigmoid", "copo", "ancpo")).loss


def logps_of(model: Any, batch: PreferenceBatch) -> Tensor:
    return head.response_logps(model, model_parts.hidden_states(model, batch, model_parts.image_features(model, batch)), batch)


def train_only_language(model: Any, also_pictures: bool) -> None:
    for parameter in model_parts.image_parameters(model):
        parameter.requires_grad_(also_pictures)


def assert_equal_gradients(found: Any, expected: Any) -> None:
    gradients = {name: parameter.grad for name, parameter in expected.named_parameters() if parameter.grad is not None}
    scale = max(float(gradient.norm()) for gradient in gradients.values())
    assert scale > 0
    for name, parameter in found.named_parameters():
        assert (parameter.grad is None) == (name not in gradients), name
        if name in gradients:
            torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-9, atol=1e-9 * scale)


@pytest.mark.parametrize(("packing", "vision"), [(True, False), (True, True), (False, False)])
def test_mdpo_equals_separate_sequences(loaded: LoadedModel, folder: Path, packing: bool, vision: bool) -> None:
    plain = copy.deepcopy(loaded.model)
    other = load_model(FAMILIES[family_of(plain).name](folder.parent / "other", seed=3), dtype=torch.float64, device="cpu").model
    for model in (loaded.model, plain):
        train_only_language(model, vision)
    cases = records()
    expected = torch.stack(
        [torch.stack([plain_logps(plain, loaded, r, b) for b in ("chosen", "rejected", "corrupted")]) for r in cases]
    )
    with torch.no_grad():
        expected_reference = torch.stack(
            [torch.stack([plain_logps(other, loaded, r, b) for b in ("chosen", "rejected", "corrupted")]) for r in cases]
        )
    expected_loss = plain_loss(expected, expected_reference)
    expected_loss.backward()

    patch_model(loaded.model), patch_model(other)
    batch = collator(loaded, tree_packing=packing)(cases)["batch"]
    logps, reference = logps_of(loaded.model, batch), head.batch_logps(other, batch)
    loss = packed_loss(logps, reference)
    loss.backward()

    torch.testing.assert_close(logps, expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(reference, expected_reference, rtol=1e-9, atol=0)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-9, atol=0)
    assert_equal_gradients(loaded.model, plain)
    # A picture that is corrupted must tell: otherwise any corrupted branch would do.
    assert not torch.isclose(logps[0, 0], logps[0, 2])


def test_masked_tokens_equal_the_unpatched_model(loaded: LoadedModel) -> None:
    """Kind "mask": image tokens that nobody sees, in a tree and behind the unpatched model's attention mask."""
    if "linear_attention" in (getattr(loaded.model.config.get_text_config(), "layer_types", None) or ()):
        with pytest.raises(ValueError, match="'mask' hides image tokens.*layers of linear_attention carry every token on"):
            collator(loaded, corruption=Corruption(kind="mask"))
        return
    plain = copy.deepcopy(loaded.model)
    for model in (loaded.model, plain):
        train_only_language(model, False)
    corruption = Corruption(kind="mask", strength=0.5)
    cases = [record for record in records() if "rejected_images" not in record]
    trees, rows = (collator(loaded, corruption=corruption, tree_packing=packing)(cases)["batch"] for packing in (True, False))
    expected = logps_of(plain, rows)
    packed_loss(expected, torch.zeros_like(expected)).backward()
    patch_model(loaded.model)
    for batch in (rows, trees):
        loaded.model.zero_grad(set_to_none=True)
        logps = logps_of(loaded.model, batch)
        packed_loss(logps, torch.zeros_like(logps)).backward()
        torch.testing.assert_close(logps, expected, rtol=1e-9, atol=0)
        assert_equal_gradients(loaded.model, plain)
    assert len(trees.input_ids[0]) < sum(rows.attention_mask.sum(1))
    assert not torch.isclose(expected[0, 0], expected[0, 2])
