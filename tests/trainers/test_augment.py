"""augment: prompts as MIA-DPO writes them, the same whatever the order, the process or the kill."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from commands import Kill, command
from PIL import Image

from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.sections.data import AugmentConfig
from mmdpo_trainers.data.held_out import hold_out
from mmdpo_trainers.data.image_paths import image_files
from mmdpo_trainers.data.images import open_image
from mmdpo_trainers.data.left_out import left_out_line
from mmdpo_trainers.data.multi_image import PIP_OPENINGS, _draws, check_options
from mmdpo_trainers.data.records import check_prompt, read_prompts
from mmdpo_trainers.errors import ConfigError, DataError, StageError
from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.run.pipeline import run_stage
from mmdpo_trainers.stages import augment
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder
from mmdpo_trainers.stages.prompts import build_evaluation_prompts

COLOURS = [(r, g, b) for r in (0, 120, 240) for g in (0, 120, 240) for b in (0, 120, 240)][:20]


def write_data(folder: Path, pictures: int = 20) -> Path:
    """Pictures of one colour each, which the answer names; so the place of the target can be seen in the pixels."""
    images = folder / "images"
    images.mkdir(parents=True, exist_ok=True)
    records = []
    for index, colour in enumerate(COLOURS[:pictures]):
        Image.new("RGB", (20, 20), colour).save(images / f"{index}.png")
        turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": repr(colour)}]
        records.append({"id": f"r{index}", "image": f"{index}.png", "conversations": turns})
    (folder / "data.json").write_text(json.dumps(records))
    return folder / "data.json"


def context_of(folder: Path, run: str = "run", **sections: Any) -> StageContext:
    values: dict[str, Any] = {
        "model": str(folder),
        "data": {"source": str(folder / "data.json"), "image_folder": str(folder / "images"), **sections.pop("data", {})},
        "augment": {"patch_grid": [6, 6], "cell_size": 40, "margin": 10, **sections.pop("augment", {})},
        "evaluate": {"source": str(folder / "data.json"), "image_folder": str(folder / "images"), **sections.pop("evaluate", {})},
        **sections,
    }
    return StageContext(run=RunFolder(folder / run), config=RunConfig.from_dict(values), stage="augment")


def pixel(source: Any, x: float, y: float) -> tuple[int, ...]:
    image = open_image(source)
    return tuple(np.asarray(image)[int(y * image.height), int(x * image.width)])


def test_prompts_of_each_format(tmp_path: Path) -> None:
    write_data(tmp_path)
    context = context_of(tmp_path, augment={"num_prompts": 60, "formats": {"sequence": 1, "grid": 1, "pip": 1}})
    summary = augment.run(context)
    assert sum(summary["prompts"].values()) == 60 and set(summary["prompts"]) == {"sequence", "grid", "pip"}
    assert summary["problems"] == {} and summary["records"] == 20
    prompts = list(read_prompts(context.prompts))
    assert len({prompt["id"] for prompt in prompts}) == 60
    for prompt in prompts:
        check_prompt(prompt, "test")
        colour, target, count = eval(prompt["answer"]), prompt["target"], prompt["num_images"]
        if prompt["format"] == "sequence":
            lines = "".join(f"Image{k}:<image>\n" for k in range(1, count + 1))
            assert prompt["prompt"] == f"{lines}In Image{target + 1}, which colour?"
            shown = [pixel(path, 0.5, 0.5) for path in prompt["images"]]
            assert shown[target] == colour and len(set(shown)) == count and 2 <= count <= 5
            assert all(Path(path).parent == tmp_path / "images" for path in prompt["images"])
            assert prompt["box"] is prompt["region"] is None
            continue
        x0, y0, x1, y1 = prompt["box"]
        assert pixel(prompt["images"][0], (x0 + x1) / 2, (y0 + y1) / 2) == colour
        row0, col0, row1, col1 = prompt["region"]
        assert prompt["patch_grid"] == [6, 6] and 0 <= row0 < row1 <= 6 and 0 <= col0 < col1 <= 6
        if prompt["format"] == "grid":
            assert prompt["prompt"] == f"<image>\nIn Image{target + 1}, which colour?" and count in (2, 3, 4, 6, 9)
        else:
            opening = re.fullmatch(r"<image>\n(.*) which colour\?", prompt["prompt"])
            assert opening and opening[1] in PIP_OPENINGS and (target, count) == (0, 2)
            assert pixel(prompt["images"][0], 0.01, 0.01) not in (colour, (255, 255, 255))
    singles = list(read_prompts(context.folder / "singles.jsonl"))
    assert {single["source_id"] for single in singles} == {prompt["source_id"] for prompt in prompts}
    assert all(single["prompt"] == "<image>\nWhich colour?" and len(single["images"]) == 1 for single in singles)


def test_no_picture_is_copied_or_written(tmp_path: Path) -> None:
    """Prompts name files of the source, converted ones too, and recipes of them; each reads as it was when it was looked at."""
    write_data(tmp_path)
    Image.new("CMYK", (20, 20), (0, 0, 0, 255)).save(tmp_path / "images" / "0.jpg")
    data = json.loads((tmp_path / "data.json").read_text())
    data[0]["image"] = "0.jpg"
    (tmp_path / "data.json").write_text(json.dumps(data))
    context = context_of(tmp_path, augment={"num_prompts": 40})
    summary = augment.run(context)
    assert summary["handled"] == {"converted CMYK": 1}
    assert sorted(file.name for file in context.folder.iterdir()) == ["problems.jsonl", "prompts.jsonl", "singles.jsonl"]
    shown = {"0.jpg": 0}
    for prompt in read_jsonl(context.prompts):
        for image in prompt["images"]:
            recipe = image if isinstance(image, dict) else {"images": [image], "sha256": [None]}
            for file, mark in zip(map(Path, recipe["images"]), recipe["sha256"], strict=True):
                assert file.parent == tmp_path / "images"
                assert mark in (None, hashlib.sha256(file.read_bytes()).hexdigest()[:16])
                shown["0.jpg"] += file.name == "0.jpg"
    assert shown["0.jpg"] > 0


def test_num_images_follow_their_shares(tmp_path: Path) -> None:
    write_data(tmp_path)
    options = {
        "num_prompts": 80,
        "formats": {"sequence": 0.5, "grid": 0.5},
        "num_images": {"sequence": {3: 1}, "grid": {4: 1, 6: 0}},
    }
    summary = augment.run(context_of(tmp_path, augment=options))
    assert {name: list(counts) for name, counts in summary["num_images"].items()} == {"sequence": ["3"], "grid": ["4"]}
    assert 25 <= summary["prompts"]["grid"] <= 55


def test_a_prompt_depends_on_seed_and_record_only(tmp_path: Path) -> None:
    path = write_data(tmp_path)
    first = augment_lines(context_of(tmp_path, run="a", augment={"num_prompts": 20}))
    path.write_text(json.dumps(json.loads(path.read_text())[::-1]))
    assert augment_lines(context_of(tmp_path, run="b", augment={"num_prompts": 20})) == first
    assert augment_lines(context_of(tmp_path, run="c", augment={"num_prompts": 20}, seed=1)) != first
    more = augment_lines(context_of(tmp_path, run="d", augment={"num_prompts": 50}))
    assert more[:20] == first and len(more) == 50


def augment_lines(context: StageContext) -> list[str]:
    augment.run(context)
    return context.prompts.read_text().splitlines()


def test_companions_are_never_the_target_nor_a_copy_of_it(tmp_path: Path) -> None:
    path = write_data(tmp_path, pictures=3)
    records = json.loads(path.read_text())
    copy = tmp_path / "images" / "copy.png"
    copy.write_bytes((tmp_path / "images" / "0.png").read_bytes())
    records += [{**records[0], "id": "copy", "image": "copy.png"}, {**records[1], "id": "again"}]
    path.write_text(json.dumps(records))
    options = {"num_prompts": 40, "formats": {"sequence": 1}, "num_images": {"sequence": {2: 1, 3: 1}}}
    context = context_of(tmp_path, augment=options)
    augment.run(context)
    for prompt in read_prompts(context.prompts):
        shown = [Path(image).read_bytes() for image in prompt["images"]]
        assert len(set(shown)) == len(shown)


def write_texts(folder: Path, count: int = 8) -> Path:
    """Questions without pictures among some that have one, with a follow-up, and records that cannot be used."""
    talk = [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]
    records: list[dict[str, Any]] = [
        {"id": f"r{k}", "conversations": [{**talk[0], "value": f"Why {k}?"}, talk[1]]} for k in range(count)
    ]
    records += [{"id": "p", "image": "0.png", "conversations": talk}, {"id": "long", "conversations": talk * 2}]
    records += [{"id": "bad", "conversations": [{**talk[0], "value": "<image> Why?"}, talk[1]]}]
    records += [{"id": "none", "conversations": [talk[0], {**talk[1], "value": " "}]}]
    (folder / "texts.json").write_text(json.dumps(records))
    return folder / "texts.json"


def test_prompts_without_pictures_are_mixed_in(tmp_path: Path) -> None:
    """As many as the share says, of a source whose ids are those of the pictures; what cannot be used is counted; no training pictures are."""
    write_data(tmp_path)
    texts = {"text_source": str(write_texts(tmp_path)), "text_share": 0.25}
    context = context_of(tmp_path, augment={"formats": {"single": 1.0}, "num_prompts": 20, **texts})
    summary = run_stage(context)
    assert summary["prompts"] == {"single": 20, "text": 5} and summary["num_images"]["text"] == {"0": 5}
    assert summary["problems"] == {"empty_answer": 1, "no_picture": 1} and summary["lost"]["records"] == 2
    assert summary["lost"]["of"] == 20 + 11
    prompts = [prompt for prompt in read_prompts(context.folder / "prompts.jsonl") if prompt["format"] == "text"]
    assert all((p["images"], p["target"], p["num_images"]) == ([], None, 0) and p["answer"] == "So." for p in prompts)
    assert all(re.fullmatch(r"(r\d|long)/text", p["id"]) and p["prompt"].startswith("Why") for p in prompts)
    problems = {problem["id"] for problem in read_jsonl(context.folder / "problems.jsonl")}
    assert problems == {"bad/text", "none/text"}
    # All of them, once each, where more are asked for; a follow-up is no question of its own.
    more = context_of(tmp_path, "more", augment={"formats": {"single": 1.0}, "num_prompts": 20, **texts, "text_share": 1.0})
    assert run_stage(more)["prompts"]["text"] == 9
    # Evaluation has pictures only, and is the same with and without.
    path = build_evaluation_prompts(dataclasses.replace(context, stage="evaluate", moment="before"))
    assert "text" not in {prompt["format"] for prompt in read_prompts(path)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"text_share": 0.5},
            "augment.text_share: expected a share above 0 exactly where there is an augment.text_source, got 0.5 and None",
        ),
        ({"text_source": "data.json"}, "augment.text_share: expected a share above 0 exactly where"),
        (
            {"text_source": "data.json", "text_share": 0.5},
            r"augment.text_source: data.json has no usable record .* \(all have pictures\)",
        ),
        ({"text_source": "gone.json", "text_share": 0.5}, "data source gone.json does not exist"),
    ],
)
def test_texts_that_there_are_not(tmp_path: Path, options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write_data(tmp_path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ConfigError, DataError), match=message):
        run_stage(context_of(tmp_path, augment={"formats": {"single": 1.0}, **options}))


def test_too_few_pictures_are_reported_and_do_not_hang(tmp_path: Path) -> None:
    write_data(tmp_path, pictures=3)
    options = {"num_prompts": 30, "formats": {"sequence": 1}, "num_images": {"sequence": {2: 1, 5: 1}}}
    context = context_of(tmp_path, augment=options)
    summary = augment.run(context)
    assert summary["num_images"] == {"sequence": {"2": summary["prompts"]["sequence"]}}
    assert summary["problems"]["too_few_pictures"] == 3
    with pytest.raises(DataError, match="no prompt could be made: too few pictures: 3"):
        augment.run(context_of(tmp_path, run="none", augment={**options, "num_images": {"sequence": {5: 1}}}))


def test_a_bad_picture_costs_its_record_only(tmp_path: Path) -> None:
    write_data(tmp_path)
    data = (tmp_path / "images" / "3.png").read_bytes()
    (tmp_path / "images" / "3.png").write_bytes(data[:-30])
    (tmp_path / "images" / "4.png").write_bytes(b"no picture")
    context = context_of(tmp_path, augment={"num_prompts": 50})
    summary = augment.run(context)
    assert sum(summary["prompts"].values()) == 50
    assert summary["problems"] == {"not_a_picture": 1, "truncated": 1}
    problems = {problem["id"]: problem for problem in read_jsonl(context.folder / "problems.jsonl")}
    assert problems["r3"]["reason"] == "truncated" and problems["r3"]["dropped"] and "3.png" in problems["r3"]["detail"]
    assert not {"r3", "r4"} & {prompt["source_id"] for prompt in read_jsonl(context.prompts)}


def test_nothing_usable_is_an_error_with_counts(tmp_path: Path) -> None:
    write_data(tmp_path, pictures=2)
    for file in (tmp_path / "images").iterdir():
        file.unlink()
    with pytest.raises(
        DataError, match=r"no usable record \(missing: 2\); such as .*images/0.png is not a file: set data.image_folder"
    ):
        augment.run(context_of(tmp_path))
    (tmp_path / "data.json").write_text("[]")
    with pytest.raises(DataError, match="it is empty"):
        augment.run(context_of(tmp_path))


def test_most_pictures_gone_is_asked_about(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The message counts by reason, and says a path that was tried and the setting that mends it; allowed, the counts are shown."""
    write_data(tmp_path)
    for index in range(12):
        (tmp_path / "images" / f"{index}.png").unlink()
    context = context_of(tmp_path, augment={"num_prompts": 20, "formats": {"sequence": 1}})
    with pytest.raises(DataError) as error:
        run_stage(context)
    said = str(error.value)
    assert "12 of 20 records cannot be used (missing: 12); such as " in said and f"{tmp_path}/images/0.png is not a file" in said
    assert f"set data.image_folder to the folder that picture paths are relative to (it is {tmp_path}/images)" in said
    assert said.endswith("; or pass --allow-missing (allow_missing: true) to go on with the rest")
    assert not list((tmp_path / "run" / "augment").glob("*.jsonl"))
    allowed = run_stage(context_of(tmp_path, augment={"num_prompts": 20, "formats": {"sequence": 1}}, allow_missing=True))
    assert allowed["lost"] == {"records": 12, "of": 20, "reasons": {"missing": 12}} and sum(allowed["prompts"].values()) == 20
    assert "augment: 12 of 20 records left out (missing: 12)" in capfd.readouterr().err
    run_stage(context_of(tmp_path, augment={"num_prompts": 20, "formats": {"sequence": 1}}, allow_missing=True))
    assert "augment: done before; 12 of 20 records left out (missing: 12)" in capfd.readouterr().err


def test_a_conversation_counts_once_however_many_questions_it_has(tmp_path: Path) -> None:
    path = write_data(tmp_path)
    records = json.loads(path.read_text())
    for record in records[12:]:
        record["conversations"] += [{**record["conversations"][0], "value": "And?"}, record["conversations"][1]] * 4
    path.write_text(json.dumps(records))
    for index in range(12):
        (tmp_path / "images" / f"{index}.png").unlink()
    with pytest.raises(DataError, match="12 of 20 records cannot be used"):
        augment.run(context_of(tmp_path))


def test_damage_is_asked_about_too_and_a_repeated_record_is_no_loss(tmp_path: Path) -> None:
    path = write_data(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) * 3))
    assert augment.run(context_of(tmp_path, run="a"))["problems"] == {"duplicate_record": 40}
    for index in range(12):
        (tmp_path / "images" / f"{index}.png").write_bytes(b"no picture")
    context = context_of(tmp_path, run="b")
    with pytest.raises(DataError, match=r"augment: 12 of 20 records left out .*not a picture: 12.*--allow-missing"):
        augment.run(context)
    context.config.allow_missing = True
    assert augment.run(context)["lost"]["records"] == 12


def test_a_format_that_vanished_is_counted_as_empty(tmp_path: Path) -> None:
    write_data(tmp_path, pictures=3)
    options = {"num_prompts": 12, "formats": {"sequence": 1, "pip": 1}, "num_images": {"sequence": {5: 1}}}
    context = context_of(tmp_path, augment=options, evaluate={"per_format": {"sequence": 2, "single": 2}})
    summary = augment.run(context)
    assert summary["prompts"]["sequence"] == 0 and summary["prompts"]["pip"] > 0
    assert left_out_line(summary).endswith("none of format sequence")
    build_evaluation_prompts(context)
    assert read_json(tmp_path / "run/evaluate/summary.json")["prompts"] == {"sequence": 0, "single": 2}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": {"collage": 1}}, "unknown format 'collage'; expected sequence, grid, pip, single"),
        ({"formats": {"grid": 0}}, "at least one format"),
        ({"formats": {"grid": -1}}, "augment.formats.grid"),
        ({"formats": {"grid": math.inf}}, "augment.formats.grid"),
        ({"num_images": {"grid": {4: math.nan}}}, "augment.num_images.grid"),
        ({"per_record": math.inf}, "augment.per_record"),
        ({"cell_size": 100_000}, "augment.cell_size: a collage of 2 pictures with cell_size=100000"),
        ({"pip_openings": ["In <image>,"]}, "augment.pip_openings: <image> stands for a picture"),
        ({"num_images": {"grid": {5: 1}}}, "num_images.grid: expected 2, 3, 4, 6, 9 pictures"),
        ({"num_images": {"sequence": {1: 1}}}, "num_images.sequence: expected 2 or more"),
        ({"num_images": {"pip": {2: 1}}}, "'pip' has no number of pictures"),
        ({"formats": {"grid": 1}, "num_images": {}}, "num_images.grid: at least one"),
        ({"num_prompts": 0}, "augment.num_prompts"),
        ({"max_fraction": 1.5}, "max_fraction"),
        ({"cell_size": 0}, "cell_size"),
        ({"margin": 2}, "labels need a margin"),
        ({"patch_grid": [0, 4]}, "augment"),
    ],
)
def test_options_are_checked_before_any_work(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        augment.run(context_of(tmp_path, augment=options))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"formats": {"grid": -1.0}}, "augment.formats.grid: expected a number from 0 up, got -1.0"),
        ({"formats": {"grid": math.nan}}, "augment.formats.grid: expected a number from 0 up, got nan"),
        ({"num_images": {"grid": {4: math.inf}}}, "augment.num_images.grid: expected 2, 3, 4, 6, 9 pictures, shares from 0 up"),
        ({"per_record": math.nan}, "augment.per_record: expected a number above 0, got nan"),
        ({"num_prompts": 0}, "augment.num_prompts: expected 1 or more, got 0"),
        ({"patch_grid": (0, 4)}, "patch grid (rows, columns) of positive numbers"),
    ],
)
def test_options_made_in_code_are_checked_too(options: dict[str, Any], message: str) -> None:
    made = AugmentConfig(**options)
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_options(made, made.formats, max_pixels=10**8)


def test_a_collage_counts_only_where_it_is_made() -> None:
    options = AugmentConfig(cell_size=100_000, formats={"sequence": 1.0})
    check_options(options, options.formats, max_pixels=1000)
    with pytest.raises(ConfigError, match="above data.max_pixels=1000; lower cell_size"):
        check_options(options, {"grid": 3}, max_pixels=1000, setting="evaluate.per_format")


@pytest.mark.parametrize(
    ("per_format", "message"), [({"sequenc": 4}, "unknown format 'sequenc'"), ({"sequence": -1, "single": 4}, "sequence")]
)
def test_evaluation_formats_are_checked(tmp_path: Path, per_format: dict[str, int], message: str) -> None:
    write_data(tmp_path, pictures=3)
    context = context_of(tmp_path, run="run")
    context.config.evaluate.per_format = per_format
    with pytest.raises(ConfigError, match=rf"evaluate\.per_format.*{message}"):
        build_evaluation_prompts(context)


def test_an_oblong_host_may_not_become_an_enormous_square(tmp_path: Path) -> None:
    write_data(tmp_path, pictures=2)
    for index, colour in enumerate(COLOURS[:2]):
        Image.new("RGB", (100, 20), colour).save(tmp_path / "images" / f"{index}.png")
    options = {"num_prompts": 2, "formats": {"pip": 1}}
    with pytest.raises(DataError, match="no prompt could be made: enormous: 2"):
        augment.run(context_of(tmp_path, augment=options, data={"max_pixels": 5000}))
    assert augment.run(context_of(tmp_path, run="larger", augment=options))["prompts"] == {"pip": 2}


@pytest.mark.parametrize("config", [{"image_processor": {"do_center_crop": True}}, {"do_center_crop": True}])
def test_oblong_pictures_are_refused_where_the_model_crops_them(tmp_path: Path, config: dict[str, Any]) -> None:
    write_data(tmp_path)
    (tmp_path / "processor_config.json").write_text(json.dumps(config))
    with pytest.raises(StageError, match="set augment.square to true"):
        augment.run(context_of(tmp_path, augment={"square": False, "formats": {"pip": 1}}))
    augment.run(context_of(tmp_path, run="square", augment={"formats": {"pip": 1}}))
    augment.run(context_of(tmp_path, run="sequence", augment={"square": False, "formats": {"sequence": 1}}))


def test_patch_grid_comes_from_the_model(tmp_path: Path) -> None:
    write_data(tmp_path)
    context = context_of(tmp_path, augment={"patch_grid": None, "num_prompts": 5, "formats": {"pip": 1}})
    with pytest.raises(StageError, match="set augment.patch_grid"):
        augment.run(context)
    (tmp_path / "config.json").write_text('{"vision_config": {"image_size": 336, "patch_size": 14}}')
    assert tmp_path / "config.json" in augment.inputs(context)
    augment.run(context)
    assert {tuple(prompt["patch_grid"]) for prompt in read_jsonl(context.prompts)} == {(24, 24)}
    (tmp_path / "config.json").write_text('{"model_type": "qwen2_5_vl", "vision_config": {"patch_size": 14}}')
    own = context_of(tmp_path, run="own", augment={"patch_grid": None, "num_prompts": 5, "formats": {"pip": 1}})
    augment.run(own)
    assert all(p["box"] and p["region"] is None and p["patch_grid"] is None for p in read_jsonl(own.prompts))


def test_evaluation_prompts_use_other_pictures_and_are_made_once(tmp_path: Path) -> None:
    write_data(tmp_path)
    per_format = {"sequence": 4, "grid": 3, "pip": 2, "single": 5}
    sections = {
        "data": {"holdout": 0.5},
        "evaluate": {"source": None, "image_folder": None, "per_format": per_format},
        "augment": {
            "num_images": {"sequence": {2: 1, 3: 1}, "grid": {2: 1, 4: 1}},
            "num_prompts": 40,
            "formats": {"sequence": 1},
        },
    }
    context = context_of(tmp_path, **sections)
    augment.run(context)
    evaluation = StageContext(run=context.run, config=context.config, stage="evaluate", moment="before")
    path = build_evaluation_prompts(evaluation)
    prompts = list(read_prompts(path))
    counts = {name: sum(prompt["format"] == name for prompt in prompts) for name in per_format}
    assert counts == per_format
    seen, asked = (
        {file for prompt in each for image in prompt["images"] for file in image_files(image)}
        for each in (read_prompts(context.prompts), prompts)
    )
    assert seen and asked and not seen & asked
    before = path.stat().st_mtime_ns
    again = StageContext(run=context.run, config=context.config, stage="evaluate", moment="after", arm=None)
    assert build_evaluation_prompts(again).stat().st_mtime_ns == before
    own = context_of(tmp_path, evaluate={"input": str(tmp_path / "mine.jsonl")})
    assert build_evaluation_prompts(own) == tmp_path / "mine.jsonl"


def test_hold_out_takes_the_share_whatever_the_order(tmp_path: Path) -> None:
    pictures = [str(tmp_path / f"{index}.png") for index in range(10)]
    for picture in pictures:
        Path(picture).write_text(f"picture {picture}")
    held = hold_out(pictures, 0.2, tmp_path)
    assert len(held) == 2 and held < set(pictures) and hold_out(pictures[::-1], 0.2, tmp_path) == held
    assert len(hold_out(pictures, 0.01, tmp_path)) == 1 and hold_out(pictures, 0, tmp_path) == set()
    with pytest.raises(ConfigError, match="data.holdout"):
        hold_out(pictures, 1.5, tmp_path)


def test_copies_of_a_picture_are_held_out_together(tmp_path: Path) -> None:
    pictures = [str(tmp_path / f"{name}{index}.png") for index in range(10) for name in "ab"]
    for picture in pictures:
        Path(picture).write_text(f"picture {picture[-5]}")
    held = hold_out(pictures, 0.3, tmp_path)
    assert len(held) == 6 and len({picture[-5] for picture in held}) == 3
    assert hold_out(pictures[::-1], 0.3, tmp_path) == held


def test_draws_are_a_permutation() -> None:
    import random

    counts = {order: 0 for order in itertools.permutations(range(3))}
    for seed in range(600):
        counts[tuple(_draws(3, random.Random(seed)))] += 1
    assert min(counts.values()) > 60


def test_kill_and_resume_gives_the_files_of_an_undisturbed_run(tmp_path: Path) -> None:
    write_data(tmp_path)
    Image.fromarray(np.full((20, 20), 30000, np.uint16)).save(tmp_path / "images" / "5.png")
    (tmp_path / "images" / "6.png").write_bytes(b"broken")
    settings = ["--data", tmp_path / "data.json", "--image-folder", tmp_path / "images", "--num-prompts", 500, "--holdout", 0]
    settings += ["--cell-size", 100, "--patch-grid", "[6, 6]"]

    def augment(run: str, kill: Kill | None = None) -> int:
        return command("augment", "--run", tmp_path / run, *settings, kill=kill)

    assert augment("whole") == 0
    whole = files_of(tmp_path / "whole")
    prompts = tmp_path / "killed" / "augment" / "prompts.jsonl"
    for lines in (1, 130, 320):
        assert augment("killed", Kill(prompts.parent, prompts.name, lines)) == -signal.SIGKILL
        assert not (prompts.parent / "summary.json").exists()
        with prompts.open("ab") as file:
            file.write(b'{"id": "torn')
    assert augment("killed") == 0
    assert files_of(tmp_path / "killed") == whole
    first, second = (read_json(tmp_path / run / "augment" / "summary.json") for run in ("whole", "killed"))
    assert {**first, "seconds": 0} == {**second, "seconds": 0}
    assert first["problems"] == {"not_a_picture": 1} and first["handled"] == {"converted 16-bit": 1}


def files_of(run: Path) -> dict[str, bytes]:
    skipped = ("state.json", "summary.json")
    folder = run / "augment"
    files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name not in skipped}
    return {name: data for name, data in files.items() if not name.endswith(".tmp")}
