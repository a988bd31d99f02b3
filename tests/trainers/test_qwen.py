"""Qwen2.5-VL through loading, prompts, generation and attention ratios: every picture has a patch grid of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from prompt_records import make_prompts
from report_run import write_run
from tiny_models import QWEN_CHAT_TEMPLATE, make_tiny_qwen, sample_pictures

from mmdpo_kernels import patch_model
from mmdpo_trainers.answers.attention_ratios import attention_ratios, ratios_of
from mmdpo_trainers.answers.transformers_engine import generate_responses
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.data.compose import box_to_region
from mmdpo_trainers.errors import DataError, StageError
from mmdpo_trainers.models.chat_format import render_prompt
from mmdpo_trainers.models.encode import encode_prompts, load_images
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.report.contents import RunContents
from mmdpo_trainers.report.heatmaps import heat_maps

SIZES = [(48, 48), (72, 36), (24, 60), (60, 60), (36, 24)]
SETTINGS: dict[str, Any] = {"layer": 1, "regions": "box", "drop_first_row": False}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen(tmp_path_factory.mktemp("qwen"))


@pytest.fixture(scope="module")
def patched(folder: Path) -> LoadedModel:
    loaded = load_model(folder)
    patch_model(loaded.model)
    return loaded


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Every format; the pictures of a sequence differ in shape, and no region is known beforehand."""
    made = make_prompts(
        tmp_path_factory.mktemp("prompts"), [("sequence", 3), ("grid", 3), ("pip", 2), ("sequence", 2), ("single", 1)]
    )
    for record in made:
        record |= {"region": None, "patch_grid": None}
        if record["format"] == "sequence":
            pictures = sample_pictures(record["num_images"], seed=5)
            record["images"] = [picture.resize(size) for picture, size in zip(pictures, SIZES, strict=False)]
        elif record["format"] == "grid":
            record["images"] = [Image.open(record["images"][0]).resize((96, 60))]
    return made


@pytest.fixture(scope="module")
def answered(patched: LoadedModel, prompts: list[dict[str, Any]]) -> list[dict[str, Any]]:
    answers = generate_responses(patched, prompts, max_new_tokens=5, record=SETTINGS)
    return [{**prompt, **answer} for prompt, answer in zip(prompts, answers, strict=True)]


def published(folder: Path, copy: Path) -> Path:
    """The folder with its files as older tools wrote them: flat configuration, bounds in pixels, the template in JSON."""
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    rope_scaling = {"type": "mrope", "mrope_section": rope["mrope_section"]}
    text.pop("model_type"), text.pop("layer_types")
    flat = {**text, **config, "rope_theta": rope["rope_theta"], "rope_scaling": rope_scaling}
    flat["vision_config"] |= {"model_type": "qwen2_5_vl", "spatial_patch_size": 6, "tokens_per_second": 2, "in_chans": 3}
    flat["vision_config"].pop("rope_parameters")
    (copy / "config.json").write_text(json.dumps(flat))
    images = json.loads((copy / "preprocessor_config.json").read_text())
    size = images.pop("size")
    images |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
    images |= {"image_processor_type": "Qwen2VLImageProcessorFast", "processor_class": "Qwen2_5_VLProcessor"}
    (copy / "preprocessor_config.json").write_text(json.dumps(images))
    (copy / "chat_template.jinja").unlink()
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": QWEN_CHAT_TEMPLATE}))
    (copy / "video_preprocessor_config.json").write_text(json.dumps({**images, "video_processor_type": "Qwen2VLVideoProcessor"}))
    return copy


def test_published_folders_load(folder: Path, tmp_path: Path, prompts: list[dict[str, Any]]) -> None:
    ours, theirs = load_model(folder), load_model(published(folder, tmp_path / "published"))
    assert (theirs.num_layers, theirs.family.name) == (3, "qwen2_5_vl")
    assert theirs.end_ids == set(theirs.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    found = [loaded.model(**encode_prompts(loaded, prompts, padding_side="left").inputs).logits for loaded in (ours, theirs)]
    torch.testing.assert_close(found[0], found[1])


def test_a_saved_processor_is_read_again(patched: LoadedModel, tmp_path: Path, prompts: list[dict[str, Any]]) -> None:
    patched.processor.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "processor_config.json").read_text())["processor_class"] == "Qwen2_5_VLProcessor"
    again = load_model(patched.path, processor=tmp_path)
    expected = encode_prompts(patched, prompts, padding_side="left").inputs
    torch.testing.assert_close(encode_prompts(again, prompts, padding_side="left").inputs, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"patch": 4}, "a picture of 64 x 64 pixels, pixel_values (256, 96), does not go"), ({}, "id of <|image_pad|>")],
)
def test_a_processor_of_another_model_is_refused(folder: Path, tmp_path: Path, options: dict[str, int], message: str) -> None:
    other = make_tiny_qwen(tmp_path / "other", **options)
    if not options:
        config = json.loads((other / "config.json").read_text())
        (other / "config.json").write_text(json.dumps({**config, "image_token_id": 9}))
        folder, other = other, folder
    with pytest.raises(StageError) as raised:
        load_model(folder, processor=other)
    assert "do not belong together" in str(raised.value) and message in str(raised.value)


@pytest.mark.parametrize("side", ["left", "right"])
def test_prompts_are_those_of_the_processor(patched: LoadedModel, prompts: list[dict[str, Any]], side: str) -> None:
    encoded = encode_prompts(patched, prompts, padding_side=side)
    texts = [render_prompt(patched.processor, record["prompt"]) for record in prompts]
    assert texts[0].startswith("<|im_start|>system") and texts[0].endswith("<|im_start|>assistant\n")
    assert "Image2:<|vision_start|><|image_pad|><|vision_end|>\n" in texts[0]
    pictures = [picture for record in prompts for picture in load_images(record)]
    expected = patched.processor(text=texts, images=pictures, padding=True, padding_side=side, return_tensors="pt")
    assert encoded.inputs.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(encoded.inputs[name], value, check_dtype=name != "mm_token_type_ids")
    assert encoded.patch_grids[0] == [(4, 4), (3, 6), (5, 2)] and encoded.tokens_per_image[0] == [16, 18, 10]


def test_rows_without_pictures_and_answers_in_a_batch(patched: LoadedModel, prompts: list[dict[str, Any]]) -> None:
    records = [{"id": "text", "prompt": "what colour is it ?", "images": []}, prompts[3]]
    together = encode_prompts(patched, records, padding_side="right", answers=["red circle", [30, 31]])
    logits = patched.model(**together.inputs).logits
    for row, record in enumerate(records):
        alone = encode_prompts(patched, [record], padding_side="right", answers=[["red circle", [30, 31]][row]])
        assert ("image_grid_thw" in alone.inputs) == bool(record["images"])
        start, stop = alone.response_spans[0]
        assert together.response_spans[row] == (start, stop)
        found = patched.model(**alone.inputs).logits[0, start - 1 : stop]
        torch.testing.assert_close(logits[row, start - 1 : stop], found, rtol=1e-4, atol=1e-4)


def test_the_models_own_image_token_in_a_prompt_names_the_record(patched: LoadedModel, prompts: list[dict[str, Any]]) -> None:
    with pytest.raises(DataError, match=r"record r4/single: .*take the model's own image token out"):
        encode_prompts(patched, [{**prompts[4], "prompt": "<image> and <|image_pad|>"}], padding_side="left")


def test_answers_do_not_depend_on_the_batch(
    patched: LoadedModel, answered: list[dict[str, Any]], prompts: list[dict[str, Any]]
) -> None:
    for whole, prompt in zip(answered, prompts, strict=True):
        [alone] = generate_responses(patched, [prompt], max_new_tokens=5)
        assert alone["response_ids"] == whole["response_ids"], prompt["id"]
        assert alone["perplexity"] == pytest.approx(whole["perplexity"], rel=1e-4)
        assert patched.image_token_id not in whole["response_ids"]


def test_ratios_equal_eager_maps_on_each_pictures_own_grid(
    folder: Path, patched: LoadedModel, answered: list[dict[str, Any]]
) -> None:
    eager = load_model(folder)
    eager.model.set_attn_implementation({"text_config": "eager"})
    found = attention_ratios(patched, answered, **SETTINGS)
    unequal = 0
    for record, ratios in zip(answered, found, strict=True):
        encoded = encode_prompts(eager, [record], padding_side="right", answers=[record["response_ids"]])
        with torch.no_grad():
            maps = eager.model(**encoded.inputs, output_attentions=True).attentions[1][0].mean(0)
        start, stop = encoded.response_spans[0]
        keys = maps[start - 1 : stop if record["ended"] else stop - 1].mean(0)
        on_pictures = keys[encoded.inputs["input_ids"][0] == eager.image_token_id]
        pictures = on_pictures.split(encoded.tokens_per_image[0])
        if record["format"] in ("grid", "pip"):
            grid = encoded.patch_grids[0][0]
            assert grid[0] != grid[1] or record["format"] == "pip"
            row0, column0, row1, column1 = box_to_region(record["box"], grid)
            mass = mean = (pictures[0].reshape(grid)[row0:row1, column0:column1].sum() / on_pictures.sum()).item()
        else:
            mass = (pictures[record["target"]].sum() / on_pictures.sum()).item()
            means = torch.stack([picture.mean() for picture in pictures])
            mean = (means[record["target"]] / means.sum()).item()
            unequal += abs(mass - mean) > 1e-3
        assert (ratios["ratio_mass"], ratios["ratio_mean"]) == pytest.approx((mass, mean), abs=1e-5), record["id"]
        recorded = record["recorded"]
        assert recorded["attention"] == pytest.approx(ratios["attention"], abs=1e-6)
        again = ratios_of(record, recorded["attention"], recorded["tokens"], "mean")
        assert again["ratio"] == pytest.approx(mean, abs=1e-5)
    assert unequal == 2, "shares of pictures of different sizes depend on the statistic"


def test_what_has_no_place_on_a_picture_is_refused(patched: LoadedModel, answered: list[dict[str, Any]]) -> None:
    grid = answered[1]
    with pytest.raises(StageError, match=r"score.regions: official_code .* set it to box"):
        attention_ratios(patched, [grid], **{**SETTINGS, "regions": "official_code"})
    with pytest.raises(DataError, match=r"record r1/grid: a grid needs `box`, or `region` on its picture's \d+x\d+ patches"):
        attention_ratios(patched, [{**grid, "box": None}], **SETTINGS)
    two = {**grid, "images": grid["images"] * 2, "prompt": "<image><image> what ?"}
    with pytest.raises(DataError, match="record r1/grid: a grid is one picture with a region in it, got 2 pictures"):
        attention_ratios(patched, [two], **SETTINGS)


def test_heat_maps_have_the_grid_of_their_picture(patched: LoadedModel, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", arms=False)
    for name, size in (("red", (72, 36)), ("blue-grid", (96, 48))):
        file = run / "augment" / "images" / f"{name}.png"
        Image.open(file).resize(size).save(file)
    options: dict[str, Any] = {"count": 9, "batch_size": 4, "score": RunConfig().score, "cache": tmp_path / "maps.json"}
    heat = heat_maps(RunContents.read(run), load=lambda moment: patched, **options)
    assert heat is not None and not heat.centre_crop
    shapes = set()
    for example in heat.examples:
        record = {**example.record, "images": [str(run / "evaluate" / "before" / image) for image in example.record["images"]]}
        for moment, maps in example.maps.items():
            answer = example.answers[moment]["response"]
            encoded = encode_prompts(patched, [record], padding_side="right", answers=[answer])
            assert [heat.shape for heat in maps] == encoded.patch_grids[0]
            assert sum(float(heat.sum()) for heat in maps) == pytest.approx(1, abs=1e-4)
            [ratios] = attention_ratios(patched, [{**record, "response": answer, "response_ids": None, "ended": True}], layer=1)
            assert example.ratios[moment] == pytest.approx(ratios["ratio_mass"], abs=1e-5)
            shapes |= set(encoded.patch_grids[0])
    assert shapes >= {(4, 4), (3, 6)}
