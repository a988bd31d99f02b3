"""Model families: how one is found, image tokens by size, expanded text, and which parameters are vision and projector."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from tiny_models import TINY, make_tiny_llava, make_tiny_qwen
from transformers import AutoConfig

from mmdpo_trainers.models.families import FAMILIES, View, expand_ids, family_of, inside
from mmdpo_trainers.models.families.images import heat_map
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.models.processors import load_processor
from mmdpo_trainers.training.model_parts import image_parameters, projector_parameters, vision_parameters

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
    with pytest.raises(
        ValueError, match="family 'gpt2' has no declaration and does not follow the conventions: transformers has no class"
    ):
        family_of(SimpleNamespace(model_type="gpt2"))
    with pytest.raises(ValueError, match="expected a model, its configuration or its processor, got int"):
        family_of(3)


def test_tokens_of_a_size_are_those_of_its_pixels(loaded: LoadedModel) -> None:
    family, processor = loaded.family, loaded.processor
    pictures = [Image.new("RGB", size) for size in SIZES]
    encoded = family.encode_images(processor, pictures)
    assert encoded.tokens == [family.image_tokens(processor, size) for size in SIZES]
    assert encoded.tokens == [rows * columns for rows, columns in encoded.patch_grids]
    features = loaded.model.model.get_image_features(**encoded.inputs, return_dict=True).pooler_output
    assert [len(feature) for feature in features] == encoded.tokens


def test_class_token_and_uncropped_pictures_count(tmp_path: Path) -> None:
    processor = load_model(make_tiny_llava(tmp_path / "model"), device="cpu").processor
    family = family_of(processor)
    assert family.image_tokens(processor, (100, 40)) == 16
    processor.vision_feature_select_strategy = "full"
    assert (
        family.image_tokens(processor, (100, 40)) == family.encode_images(processor, [Image.new("RGB", (9, 9))]).tokens[0] == 17
    )
    processor.image_processor.do_center_crop = False
    assert family.image_tokens(processor, (96, 48)) == 4 * 8 + 1


def test_ids_are_expanded_as_the_processor_does(loaded: LoadedModel) -> None:
    family, processor = loaded.family, loaded.processor
    pictures = [Image.new("RGB", size) for size in SIZES[:2]]
    text = "one {0} two {0} three".format(family.placeholder(processor))
    blocks = family.encode_images(processor, pictures).blocks
    expected = processor(text=[text], images=pictures, return_tensors="pt")["input_ids"][0].tolist()
    ids = processor.tokenizer(text).input_ids
    assert expand_ids(ids, loaded.image_token_id, blocks) == expected
    with pytest.raises(ValueError, match="expected 1 image tokens, one a picture, got 2"):
        expand_ids(ids, loaded.image_token_id, blocks[:1])


def test_vision_and_projector_share_no_parameter(loaded: LoadedModel) -> None:
    names = {id(parameter): name for name, parameter in loaded.model.named_parameters()}
    vision, projector = ({names[id(p)] for p in found(loaded.model)} for found in (vision_parameters, projector_parameters))
    assert vision and projector and not vision & projector
    assert {names[id(p)] for p in image_parameters(loaded.model)} == vision | projector
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


def test_a_heat_map_puts_each_token_where_it_lies() -> None:
    one = View(2, 3)
    values = torch.arange(6.0)
    assert torch.equal(heat_map([one], values), values.view(2, 3))
    # A glance of one token, then two tiles side by side, the second with a mark at the end of each row.
    views = [View(1, 1), View(2, 2, (0, 0, 0.5, 1)), View(2, 2, (0.5, 0, 1, 1), row_ends=1)]
    found = heat_map(views, torch.tensor([8.0, 1, 2, 3, 4, 5, 6, 70, 7, 8, 70]))
    assert torch.equal(found, torch.tensor([[2.0, 3, 6, 7], [4, 5, 8, 9]]))
    # A square around a picture twice as wide as high: its first and last rows show nothing of it.
    around = View(4, 4, (0, -0.5, 1, 1.5))
    assert torch.equal(heat_map([around], torch.arange(16.0)), torch.arange(4.0, 12).view(2, 4))
    assert inside([around], (0, 0, 0.5, 1)).view(4, 4).sum(1).tolist() == [0, 2, 2, 0]
    assert inside(views, (0.5, 0, 1, 0.5)).tolist() == 5 * [False] + [True, True, False] + 3 * [False]
    assert heat_map([View(2, 2, marks=1)], torch.arange(5.0)).tolist() == [[0, 1], [2, 3]]
    assert heat_map([View(1, 1, (-27.0, 0, 28, 1)), View(3, 0, row_ends=1)], torch.ones(4)).shape == (1, 1)


def test_a_box_counts_the_tokens_whose_centres_it_holds() -> None:
    """A tile that it only grazes has none; where no token has its centre in it, the nearest ones count."""
    tiles = [View(4, 4, (x, y, x + 0.5, y + 0.5)) for y in (0, 0.5) for x in (0, 0.5)]
    for edge in (0.5, 0.502):
        assert inside(tiles, (0, 0, edge, edge)).view(4, 16).sum(1).tolist() == [16, 0, 0, 0]
    assert inside([View(2, 2, marks=1)], (0.4, 0, 0.45, 0.1)).tolist() == [True, False, False, False, False]
    assert inside([View(2, 2, row_ends=1)], (0.6, 0.9, 0.7, 1)).tolist() == [False, False, False, False, True, False]
    assert inside([View(4, 0, row_ends=1), View(1, 1)], (0, 0, 0.1, 0.1)).tolist() == 4 * [False] + [True]
    with pytest.raises(ValueError, match="box: expected 0 <= x0 < x1"):
        inside(tiles, (0.5, 0, 0.5, 1))


@pytest.mark.parametrize("family", list(TINY))
def test_tokens_of_any_size_are_known_without_its_pixels(family: str, tmp_path: Path) -> None:
    processor = load_processor(TINY[family](tmp_path / family), str(AutoConfig.from_pretrained(tmp_path / family).model_type))
    its_family = family_of(processor)
    sizes = [(48, 48), (72, 36), (31, 97), (500, 30), (30, 500)]
    for alone in (True, False) if its_family.several_differ else (True,):
        encoded = its_family.encode_images(processor, [Image.new("RGB", size) for size in sizes], [alone] * len(sizes))
        assert [len(block) for block in encoded.blocks] == [its_family.image_tokens(processor, size, alone) for size in sizes]
        for views, tokens in zip(encoded.views, encoded.tokens, strict=True):
            assert its_family.cross_attention or sum(view.tokens for view in views) == tokens
            assert its_family.cross_attention or heat_map(views, torch.ones(tokens)).numel()
