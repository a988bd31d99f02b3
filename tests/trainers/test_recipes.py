"""Pictures made of others, as recipes: the same pixels as drawing them at once, in every reader, and what is refused by name."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from PIL import Image
from tiny_models import make_tiny_llava, sample_pictures

from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.data import images
from mmdpo_trainers.data.compose import grid_collage, pic_in_pic
from mmdpo_trainers.data.dataset_checks import missing_pictures
from mmdpo_trainers.data.image_paths import image_files, placed, render
from mmdpo_trainers.data.images import ImageError, image_digest, image_size, open_image
from mmdpo_trainers.data.looks import learn_digests
from mmdpo_trainers.data.pairs import read_pairs
from mmdpo_trainers.data.records import check_prompt, read_prompts
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.files.spool import Spool
from mmdpo_trainers.models.encode import load_images
from mmdpo_trainers.models.processors import load_processor
from mmdpo_trainers.processes.spread import spread
from mmdpo_trainers.stages import pairs, scored, select
from mmdpo_trainers.stages.ahead import Ahead
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder
from mmdpo_trainers.training.batches.collator import PreferenceCollator

GRID = {"cell_size": 40, "margin": 10, "label": True, "square": False}
PIP = {"max_fraction": 0.6, "square": True}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three photos, one on its side and one in CMYK, and a file with pairs about recipes of them."""
    photos = tmp_path / "data" / "photos"
    photos.mkdir(parents=True)
    for number, picture in enumerate(sample_pictures(3, seed=5)):
        turned = Image.Exif()
        turned[0x112] = 6 if number == 1 else 1
        picture.resize((60, 40 + number)).convert("CMYK" if number == 2 else "RGB").save(photos / f"{number}.jpg", exif=turned)
    lines = [
        {"id": f"r{number}", "images": [recipe], "prompt": "<image>\nWhat is it?", "chosen": "A cat.", "rejected": "A dog."}
        for number, recipe in enumerate((grid_of(photos), pip_of(photos)))
    ]
    (tmp_path / "data" / "pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "data"


def grid_of(photos: Path, **changes: Any) -> dict[str, Any]:
    files = [photos / f"{number}.jpg" for number in range(3)]
    return {
        "recipe": "grid",
        "images": [f"photos/{file.name}" for file in files],
        "sha256": [*map(mark, files)],
        **GRID,
        **changes,
    }


def pip_of(photos: Path) -> dict[str, Any]:
    return {"recipe": "pip", "images": ["photos/1.jpg", "photos/2.jpg"], **PIP}


def mark(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16]


def drawn(folder: Path, recipe: dict[str, Any]) -> Image.Image:
    """What the recipe makes, drawn at once."""
    pictures = [open_image(folder / path) for path in recipe["images"]]
    return grid_collage(pictures, **GRID)[0] if recipe["recipe"] == "grid" else pic_in_pic(*pictures, **PIP)[0]


@pytest.mark.parametrize("make", [grid_of, pip_of])
def test_a_recipe_is_the_picture_drawn_at_once(folder: Path, make: Callable[[Path], dict[str, Any]]) -> None:
    recipe = make(folder / "photos")
    expected, found = drawn(folder, recipe), render(recipe, folder=folder)
    assert found.tobytes() == expected.tobytes() and found.mode == "RGB"
    assert image_size(placed(recipe, folder)) == found.size == expected.size
    assert image_files(placed(recipe, folder)) == [str(folder / path) for path in recipe["images"]]


def test_its_key_is_its_own_wherever_the_files_are_and_needs_none_of_them(folder: Path) -> None:
    photos, elsewhere = folder / "photos", folder.parent / "moved"
    recipe = grid_of(photos)
    key = image_digest(placed(recipe, folder))
    shutil.copytree(folder, elsewhere)
    turned = {name: recipe[name][::-1] for name in ("images", "sha256")}
    others = [grid_of(photos, margin=11), grid_of(photos, label=False), {**recipe, **turned}]
    assert len({key, *(image_digest(placed(each, folder)) for each in (*others, pip_of(photos)))}) == 5
    without = {name: value for name, value in recipe.items() if name != "sha256"}
    assert image_digest(placed(without, folder)) == image_digest(placed(without, elsewhere))
    shutil.rmtree(photos)
    assert image_digest(placed(recipe, elsewhere)) == image_digest(placed(recipe, folder)) == key


def test_a_file_that_was_changed_is_refused_by_name(folder: Path) -> None:
    recipe = grid_of(folder / "photos")
    render(recipe, folder=folder)
    time.sleep(0.01)
    Image.new("RGB", (60, 40)).save(folder / "photos" / "0.jpg")
    with pytest.raises(
        ImageError, match=r"changed: .*0.jpg is not the picture that a grid was to be made of .* --restart augment"
    ):
        render(recipe, folder=folder)
    with pytest.raises(DataError, match=r"record r0: changed: "):
        load_images({"id": "r0", "images": [placed(recipe, folder)]})
    (folder / "photos" / "0.jpg").unlink()
    with pytest.raises(DataError, match=r"record r0: missing: .*0.jpg is not a file; restore the file"):
        load_images({"id": "r0", "images": [placed(recipe, folder)]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": "stack"}, "recipe: expected grid or pip, got 'stack'"),
        ({"images": []}, "recipe grid: images must be paths"),
        ({"images": "a.jpg"}, "images must be a list, got 'a.jpg'"),
        ({"images": ["a.jpg"] * 5, "sha256": None}, "a grid collage holds 2, 3, 4, 6, 9 pictures, got 5"),
        ({"sha256": ["0"]}, "recipe grid: sha256 must be 16 hexadecimal digits for each of its 3 images"),
        ({"margin": None}, "recipe grid: margin must be int, got None"),
        ({"cell_size": True}, "recipe grid: cell_size must be int, got True"),
        ({"colour": "red"}, "recipe grid: unknown 'colour'; expected images, sha256, cell_size, margin, label, square"),
        ({"recipe": "pip", "cell_size": None, "margin": None, "label": None}, "recipe pip: images must be two"),
    ],
)
def test_a_recipe_that_is_none_is_refused_by_name(folder: Path, changes: dict[str, Any], message: str) -> None:
    recipe = {**grid_of(folder / "photos"), **changes}
    with pytest.raises(DataError) as error:
        check_prompt({"id": "r0", "images": [recipe], "prompt": "<image>\nWhat?"}, "record r0")
    assert message in str(error.value) and "record r0" in str(error.value)
    line = {"id": "r0", "images": [recipe], "prompt": "What?", "chosen": "A.", "rejected": "B."}
    (folder / "pairs.jsonl").write_text(json.dumps(line))
    with pytest.raises(DataError, match="record r0"):
        read_pairs(folder / "pairs.jsonl")


def test_one_that_would_be_enormous_is_not_drawn(folder: Path) -> None:
    with pytest.raises(ImageError, match="enormous: a grid of 90040 x 30020 pixels"):
        render(grid_of(folder / "photos", cell_size=30_000), folder=folder)


@pytest.fixture(scope="module")
def collator(tmp_path_factory: pytest.TempPathFactory) -> PreferenceCollator:
    processor = load_processor(make_tiny_llava(tmp_path_factory.mktemp("model")), "llava")
    return PreferenceCollator(processor, image_token_id=processor.image_token_id, end_id=processor.tokenizer.eos_token_id)


def test_training_sees_the_same_in_a_file_a_dataset_and_a_picture(folder: Path, collator: PreferenceCollator) -> None:
    """Lists, and datasets whose rows may have a path in another's place; the folder may be anywhere."""
    moved = shutil.copytree(folder, folder.parent / "moved")
    read = [read_pairs(path / "pairs.jsonl") for path in (folder, moved)]
    pictures = [{**record, "images": [drawn(folder, image) for image in record["images"]]} for record in read[0]]
    rows = datasets.Dataset.from_list(
        [*read[0], {**read[0][0], "id": "path", "images": [{"path": str(folder / "photos" / "0.jpg")}]}]
    )
    assert missing_pictures(rows, ["images"], ".") == {}
    expected = collator(pictures)["batch"]
    for records in (*read, [rows[0], rows[1]]):
        found = collator(records)["batch"]
        assert torch.equal(found.pictures.pixel_values, expected.pictures.pixel_values)
        assert torch.equal(found.input_ids, expected.input_ids)
    assert collator([rows[2]])["batch"].pictures.pixel_values.shape == expected.pictures.pixel_values[:1].shape
    (folder / "photos" / "1.jpg").unlink()
    assert list(missing_pictures(rows, ["images"], ".")) == [0, 1]
    with pytest.raises(DataError, match=r"record r0: picture .*1.jpg does not exist, and so it is with 2 of 2 records"):
        read_pairs(folder / "pairs.jsonl")


def test_pairs_with_recipes_are_taken_into_a_run(folder: Path) -> None:
    """Stage pairs keeps recipes as they are; two that show the same are on one side."""
    lines = (folder / "pairs.jsonl").read_text().splitlines()
    (folder / "pairs.jsonl").write_text("".join(f"{line}\n" for line in [*lines, lines[0].replace('"r0"', '"again"')]))
    config = RunConfig.from_dict({"method": "mdpo", "pairs": {"source": str(folder / "pairs.jsonl"), "held_out": 0.4}})
    context = StageContext(run=RunFolder(folder.parent / "run"), config=config, stage="pairs")
    counts = pairs.run(context)
    assert sorted(sum(counts[name].values()) for name in ("pairs", "held_out")) == [1, 2]
    written = {record["id"]: record for name in ("pairs", "held_out") for record in read_pairs(context.folder / f"{name}.jsonl")}
    assert open_image(written["r1"]["images"][0]).tobytes() == drawn(folder, pip_of(folder / "photos")).tobytes()
    assert not list(context.folder.glob("images/*"))


def test_a_run_stores_what_is_its_own_relative(folder: Path) -> None:
    from mmdpo_trainers.data.records import relative_images

    recipe = placed(grid_of(folder / "photos"), folder)
    stored = relative_images([recipe, str(folder / "photos" / "0.jpg")], folder / "augment", folder)
    assert stored[0]["images"][2] == "../photos/2.jpg" and stored[1] == "../photos/0.jpg"
    assert relative_images([recipe], folder / "augment", folder / "augment") == [recipe]
    (folder / "prompts.jsonl").write_text(
        json.dumps({"id": "a", "images": [grid_of(folder / "photos")], "prompt": "<image> What?"})
    )
    assert [record["images"] for record in read_prompts(folder / "prompts.jsonl")] == [[recipe]]


def test_a_mark_is_read_once_as_long_as_the_file_stays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe, read = placed(grid_of(folder / "photos"), folder), list[Path]()
    images._marks.clear()
    monkeypatch.setattr(images, "content_hash", lambda file: read.append(file) or hashlib.sha256(file.read_bytes()).hexdigest())
    for _ in range(3):
        open_image(recipe)
    assert len(read) == 3


def test_digests_are_learned_side_by_side(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be used says so later, by its record."""
    files = [str(folder / "photos" / f"{number}.jpg") for number in range(3)]
    images._digests.clear()
    learn_digests([*files, *files, str(folder / "gone.jpg"), grid_of(folder / "photos")])
    monkeypatch.setattr(images, "_opened", lambda *_: pytest.fail("decoded again"))
    assert len({image_digest(file) for file in files}) == 3


def test_batches_are_prepared_one_ahead() -> None:
    begun = list[int]()

    def prepare(number: int) -> int:
        begun.append(number)
        if number == 6:
            raise DataError("of batch 6")
        return number * 10

    ahead = Ahead(prepare, 7, step=2)
    assert [ahead.take(number) for number in (0, 2)] == [0, 20]
    assert ahead.take(3) == 30, "another than was expected"
    assert ahead.take(4) == 40
    with pytest.raises(DataError, match="of batch 6"):
        ahead.take(6)
    ahead.close()
    assert set(begun) >= {0, 2, 3, 4, 6} and max(begun) == 6


def test_work_is_spread_over_processes_in_order() -> None:
    def work(piece: int) -> tuple[int, int]:
        if piece == 40:
            raise DataError("piece 40")
        return piece * piece, os.getpid()

    found = list(spread(work, range(9), processes=2))
    assert [square for square, _ in found] == [piece * piece for piece in range(9)]
    assert len({process for _, process in found}) == 2 and os.getpid() not in {process for _, process in found}
    assert {process for _, process in spread(work, range(3), processes=1)} == {os.getpid()}
    with pytest.raises(DataError, match="piece 40"):
        list(spread(work, range(30, 50), processes=2))


def test_a_long_list_lies_on_disk(tmp_path: Path) -> None:
    with Spool[dict[str, int]](str(tmp_path)) as items:
        for number in range(50):
            items.append({"number": number})
        assert len(items) == 50 and items[7] == {"number": 7} and [each["number"] for each in items] == list(range(50))
        with pytest.raises(IndexError):
            items[50]
    assert not list(tmp_path.iterdir())


def scores_of(count: int) -> list[dict[str, Any]]:
    return [
        {
            **{
                "id": f"r{number}",
                "format": "sequence",
                "images": ["/a.jpg", "/b.jpg"],
                "prompt": "<image><image> Whät?",
                "target": 0,
            },
            **{"num_images": 2, "answer": ("red", "green", "blue")[number % 3], "response": ("red", "blue")[number % 2]},
            **{"perplexity": 1.5, "ratio": (number * 37 % 100) / 100},
        }
        for number in range(count)
    ]


@pytest.mark.parametrize("options", [{"max_pairs": 20}, {"rule": "random_wrong"}, {"rule": "perplexity"}, {"quantile": "youden"}])
def test_select_writes_the_same_in_parts_on_several_cores(
    tmp_path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(record) + "\n" for record in scores_of(300)))
    monkeypatch.setattr(scored, "spread", lambda work, pieces, processes: spread(work, pieces, processes=2))
    found = []
    for size in (2**20, 5000):
        monkeypatch.setattr(scored, "_PART_BYTES", size)
        config = RunConfig.from_dict({"select": {"input": str(tmp_path / "scores.jsonl"), **options}})
        context = StageContext(run=RunFolder(tmp_path / str(size)), config=config, stage="select")
        summary = select.run(context)
        files = {name: (context.folder / f"{name}.jsonl").read_bytes() for name in ("pairs", "dropped")}
        found.append((summary, files))
        assert summary["records"] == 300 and files["pairs"].count(b"\n") == summary["pairs"]["sequence"] > 0
    assert found[0] == found[1]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"response": None}, "record 'r250': field 'response' is missing or not valid, got None"),
        ({"id": "r3"}, r"record 251 \('r3'\): this id occurs twice"),
        ({"images": ["/a.jpg"]}, r"record 251 \('r250'\): the prompt has 2 <image>"),
    ],
)
def test_a_record_of_a_later_part_is_named_by_its_place_in_the_file(
    tmp_path: Path, line: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = scores_of(300)
    records[250] |= line
    (tmp_path / "scores.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    monkeypatch.setattr(scored, "_PART_BYTES", 5000)
    config = RunConfig.from_dict({"select": {"input": str(tmp_path / "scores.jsonl")}})
    with pytest.raises(DataError, match=message):
        select.run(StageContext(run=RunFolder(tmp_path / "run"), config=config, stage="select"))
