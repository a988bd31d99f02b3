"""What went wrong, or nearly, with single families: each case here once gave a wrong number without an error."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import TINY, sample_pictures
from transformers import AutoConfig

from mmdpo_kernels import TokenTree, patch_model
from mmdpo_trainers.answers.attention_ratios import attention_ratios
from mmdpo_trainers.answers.transformers_engine import generate_responses
from mmdpo_trainers.models.encode import encode_prompts
from mmdpo_trainers.models.families import Conventional, EncodedImages, family_of
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.training.batches.collator import PreferenceCollator


def record(name: str, pictures: int, seed: int = 0) -> dict[str, Any]:
    prompt = " ".join(["<image>"] * pictures) + " what colour is the circle ?"
    return {"id": name, "prompt": prompt, "images": sample_pictures(pictures, seed=seed), "format": "sequence", "target": 0}


@pytest.mark.parametrize("family", ["gemma3", "mllama"])
def test_a_tree_of_one_sequence_is_refused_too(family: str, tmp_path: Path) -> None:
    """It looks like padding, but transformers passes it on as it is, without what the family's own mask says."""
    loaded = load_model(TINY[family](tmp_path), device="cpu")
    patch_model(loaded.model)
    encoded = encode_prompts(
        loaded, [record("one", 1), record("two", 1, seed=1)], padding_side="right", answers=["red", "red red"]
    )
    loaded.model(**encoded.inputs)
    tree = TokenTree.from_sequences([encoded.inputs["input_ids"][1].numpy()], prompt_lengths=[4])
    inputs = {name: value[1:] for name, value in encoded.inputs.items()}
    with pytest.raises(ValueError, match="a packed token tree is not exact with this model"):
        loaded.model(**{**inputs, "attention_mask": tree.attention_mask})


def test_answers_and_scores_do_not_depend_on_neighbours(tmp_path: Path) -> None:
    """Mllama's tokens before the first picture see all keys there are, those that pad other rows included."""
    loaded = load_model(TINY["mllama"](tmp_path), device="cpu", dtype="float64")
    patch_model(loaded.model)
    records = [record("none", 0), record("one", 1), record("three", 3, seed=2), record("another", 1, seed=3)]
    settings = {"layer": None, "regions": "box", "drop_first_row": False}

    def answers(of: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return generate_responses(loaded, of, max_new_tokens=4, record=settings)

    together, alone = answers(records), [answers([each])[0] for each in records]
    for found, expected in zip(together, alone, strict=True):
        assert found["response_ids"] == expected["response_ids"]
        assert found["perplexity"] == pytest.approx(expected["perplexity"], rel=1e-9)
        assert ("recorded" in found) == ("recorded" in expected) == (found is not together[0])
        if "recorded" in found:
            assert found["recorded"]["attention"] == pytest.approx(expected["recorded"]["attention"], rel=1e-6)
    scored = [{**each, **answer} for each, answer in zip(records, together, strict=True)]
    without, *ratios = attention_ratios(loaded, scored)
    assert without["ratio"] is None and without["attention"] == []
    for found, one in zip(ratios, scored[1:], strict=True):
        assert found["attention"] == pytest.approx(one["recorded"]["attention"], rel=1e-5)
        assert found["attention"] == pytest.approx(attention_ratios(loaded, [one])[0]["attention"], rel=1e-9)


@pytest.mark.parametrize(
    ("family", "setting", "value"),
    [
        ("llava", "vision_feature_select_strategy", "full"),
        ("llava", "num_additional_image_tokens", 0),
        ("internvl", "image_seq_length", 4),
    ],
)
def test_a_cached_reference_knows_how_many_tokens_a_picture_had(family: str, setting: str, value: Any, tmp_path: Path) -> None:
    loaded = load_model(TINY[family](tmp_path), device="cpu")

    def key() -> str:
        ids = {"image_token_id": loaded.image_token_id, "end_id": 2}
        return PreferenceCollator(loaded.processor, family=loaded.family, **ids).key(
            {**record("a", 1), "chosen": "red", "rejected": "blue"}
        )

    before = key()
    assert key() == before
    setattr(loaded.processor, setting, value)
    assert key() != before


def test_tiles_are_not_the_centre_of_a_picture(tmp_path: Path) -> None:
    """LLaVA-NeXT's processor crops tiles of the very size it crops to; a heat map lies on the whole picture."""
    cropping = {name: load_model(TINY[name](tmp_path / name), device="cpu") for name in ("llava", "llava_next")}
    assert {name: each.family.crops_centre(each.processor) for name, each in cropping.items()} == {
        "llava": True,
        "llava_next": False,
    }
    assert cropping["llava_next"].processor.image_processor.do_center_crop


def test_features_for_several_layers_need_a_declaration(tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(TINY["mistral3"](tmp_path))
    family, one = Conventional(config), torch.zeros(1, 4)
    pictures = EncodedImages(inputs={}, tokens=[1], blocks=[[3]], views=[()])
    assert family.split(SimpleNamespace(pooler_output=[one]), pictures)[0].shape == (1, 4)
    with pytest.raises(ValueError, match="features for several layers, which needs a declaration such as Qwen3VL's"):
        family.split(SimpleNamespace(pooler_output=[one], deepstack_features=[one]), pictures)
    with pytest.raises(ValueError, match="gives no features of pictures by themselves"):
        family_of(config).split(SimpleNamespace(pooler_output=None), pictures)
