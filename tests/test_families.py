"""Model families: how one is found, image tokens by size, expanded text, and which parameters are vision and projector."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny_models import make_tiny_llava, make_tiny_qwen

from mmdpo_trainers.families import FAMILIES, family_of
from mmdpo_trainers.loading import LoadedModel, load_model
from mmdpo_trainers.training.model_parts import picture_parameters, projector_parameters, vision_parameters

SIZES = [(48, 48), (72, 36), (31, 97), (200, 40)]


@pytest.fixture(scope="module", params=["llava", "qwen2_5_vl"])
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    make = {"llava": make_tiny_llava, "qwen2_5_vl": make_tiny_qwen}[request.param]
    folder: Path = make(tmp_path_factory.mktemp("model") / "model")
    return load_model(folder, device="cpu")


def test_a_family_is_found_from_anything_of_the_model(loaded: LoadedModel) -> None:
    model = loaded.model
    family = FAMILIES[model.config.model_type]
    assert type(family_of(model)) is type(family_of(model.config)) is type(family_of(loaded.processor)) is family
    assert isinstance(model, family_of(model).model_class)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    assert type(family_of(adapted)) is family
    adapted.unload()
    with pytest.raises(ValueError, match="expected a family among llava, qwen2_5_vl, got gpt2"):
        family_of(SimpleNamespace(model_type="gpt2"))


def test_tokens_of_a_size_are_those_of_its_pixels(loaded: LoadedModel) -> None:
    family, processor = loaded.family, loaded.processor
    pictures = [Image.new("RGB", size) for size in SIZES]
    encoded = family.encode_pictures(processor, pictures)
    assert encoded.tokens == [family.picture_tokens(processor, size) for size in SIZES]
    assert encoded.tokens == [rows * columns for rows, columns in encoded.patch_grids]
    features = loaded.model.model.get_image_features(**encoded.inputs, return_dict=True).pooler_output
    assert [len(feature) for feature in features] == encoded.tokens


def test_class_token_and_uncropped_pictures_count(tmp_path: Path) -> None:
    processor = load_model(make_tiny_llava(tmp_path / "model"), device="cpu").processor
    family = family_of(processor)
    assert family.picture_tokens(processor, (100, 40)) == 16
    processor.vision_feature_select_strategy = "full"
    assert (
        family.picture_tokens(processor, (100, 40))
        == family.encode_pictures(processor, [Image.new("RGB", (9, 9))]).tokens[0]
        == 17
    )
    processor.image_processor.do_center_crop = False
    assert family.picture_tokens(processor, (96, 48)) == 4 * 8 + 1


def test_text_is_expanded_as_the_processor_does(loaded: LoadedModel) -> None:
    family, processor = loaded.family, loaded.processor
    pictures = [Image.new("RGB", size) for size in SIZES[:2]]
    text = "one {0} two {0} three".format(family.placeholder(processor))
    tokens = family.encode_pictures(processor, pictures).tokens
    expected = processor(text=[text], images=pictures, return_tensors="pt")["input_ids"][0].tolist()
    assert processor.tokenizer(family.expand(processor, text, tokens)).input_ids == expected
    with pytest.raises(ValueError, match="expected 1 image tokens .* one a picture, got 2"):
        family.expand(processor, text, tokens[:1])


def test_vision_and_projector_share_no_parameter(loaded: LoadedModel) -> None:
    names = {id(parameter): name for name, parameter in loaded.model.named_parameters()}
    vision, projector = ({names[id(p)] for p in found(loaded.model)} for found in (vision_parameters, projector_parameters))
    assert vision and projector and not vision & projector
    assert {names[id(p)] for p in picture_parameters(loaded.model)} == vision | projector
    assert vision | projector == {name for name in names.values() if not name.startswith(("model.language_model", "lm_head"))}
    part = {"llava": "multi_modal_projector", "qwen2_5_vl": "visual.merger"}[loaded.family.name]
    assert all(f".{part}." in name for name in projector)


def test_positions_are_the_models_own(loaded: LoadedModel) -> None:
    """Padded rows, with pictures and without, and none where the model counts by itself."""
    family, processor = loaded.family, loaded.processor
    text = f"{family.placeholder(processor)} one {family.placeholder(processor)}"
    pictures = [Image.new("RGB", size) for size in SIZES[:2]]
    inputs = processor(text=[text, "two three"], images=pictures, padding=True, return_tensors="pt")
    grids = inputs.get("image_grid_thw")
    found = family.position_ids(inputs["input_ids"], grids, inputs["attention_mask"])
    if family.name == "llava":
        assert found is None
        return
    mask = inputs["attention_mask"]
    expected, _ = loaded.model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=grids, attention_mask=mask
    )
    assert torch.equal(found, expected)
    text_only = family.position_ids(inputs["input_ids"][1:], None, mask[1:])
    assert torch.equal(text_only[:, mask[1:].bool()], expected[:, 1][:, mask[1].bool()])
    with pytest.raises(ValueError, match=r"make it with family_of\(model\)"):
        family_of(processor).position_ids(inputs["input_ids"], grids)
