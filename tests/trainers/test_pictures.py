"""A picture is the same picture in every form it comes in: pixels, size, digest, limit and errors, in every reader."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from tiny_models import make_tiny_llava

from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.data import images, pair_records
from mmdpo_trainers.data import pair_records as preference_records
from mmdpo_trainers.data.corruption import Corruption, corrupt
from mmdpo_trainers.data.images import MAX_PIXELS, ImageError, image_digest, image_size, open_image
from mmdpo_trainers.data.pairs import read_pairs
from mmdpo_trainers.errors import ConfigError, DataError
from mmdpo_trainers.models.encode import encode_prompts
from mmdpo_trainers.models.families import family_of
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.stages import pairs
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder
from mmdpo_trainers.training.batches.collator import PreferenceCollator


def ramp(*channels: int) -> np.ndarray:
    """12 x 8 values that differ along both sides."""
    grey = np.add.outer(np.arange(8) * 20, np.arange(12) * 5)
    return np.stack([(grey + shift) % 256 for shift in channels], axis=-1).astype(np.uint8)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def turned(orientation: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return exif


def palette() -> Image.Image:
    return Image.fromarray(ramp(0, 90, 180)).quantize(16)


def deep() -> np.ndarray:
    return ramp(0)[..., 0].astype(np.uint16) * 200


FILES = {
    "rgb": lambda: encoded(Image.fromarray(ramp(0, 90, 180)), "PNG"),
    "alpha": lambda: encoded(Image.fromarray(ramp(0, 90, 180, 40)), "PNG"),
    "grey alpha": lambda: encoded(Image.fromarray(ramp(0, 40)), "PNG"),
    "palette with a hole": lambda: encoded(palette(), "PNG", transparency=3),
    "colour that is clear": lambda: encoded(Image.fromarray(ramp(0, 0, 0)), "PNG", transparency=(20, 20, 20)),
    "16 bit": lambda: encoded(Image.fromarray(deep()), "PNG"),
    "16 bit with a clear value": lambda: encoded(Image.fromarray(deep()), "PNG", transparency=int(deep()[1, 1])),
    "float": lambda: encoded(Image.fromarray(deep().astype(np.float32) / 65535), "TIFF"),
    "turned jpeg": lambda: encoded(Image.fromarray(ramp(0, 90, 180)), "JPEG", exif=turned(6)),
    "turned png": lambda: encoded(Image.fromarray(ramp(0, 90, 180, 40)), "PNG", exif=turned(8)),
    "turned tiff": lambda: encoded(Image.fromarray(ramp(0, 90, 180)), "TIFF", exif=turned(6)),
    "cmyk": lambda: encoded(Image.fromarray(ramp(0, 90, 180)).convert("CMYK"), "JPEG"),
    "lab": lambda: encoded(Image.fromarray(ramp(0, 90, 180), "RGB").convert("LAB"), "TIFF"),
    "animated": lambda: encoded(palette(), "GIF", save_all=True, append_images=[Image.new("P", (12, 8))]),
    "profile": lambda: encoded(Image.fromarray(ramp(0, 90, 180)), "PNG", icc_profile=b"not applied"),
}


def forms(data: bytes, folder: Path) -> dict[str, Any]:
    """A file in every form that a picture may have. Those of Pillow are opened anew each time."""
    path = folder / "picture"
    path.write_bytes(data)
    return {
        "path": str(path),
        "file url": path.as_uri(),
        "bytes": data,
        "datasets": {"bytes": data, "path": "elsewhere.png"},
        "datasets path": {"bytes": None, "path": str(path)},
        "data url": f"data:image/png;base64,{base64.b64encode(data).decode()}",
        "pillow": Image.open(path),
        "pillow of bytes": Image.open(io.BytesIO(data)),
    }


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(make_tiny_llava(tmp_path_factory.mktemp("model") / "model"), device="cpu")


def collator(loaded: LoadedModel, **options: Any) -> PreferenceCollator:
    return PreferenceCollator(
        loaded.processor,
        family=family_of(loaded.model),
        image_token_id=loaded.image_token_id,
        end_id=loaded.processor.tokenizer.eos_token_id,
        **options,
    )


def pair(image: Any, **changes: Any) -> dict[str, Any]:
    return {"id": "one", "images": [image], "prompt": "what is it ?", "chosen": "red", "rejected": "blue", **changes}


@pytest.mark.parametrize("name", FILES)
def test_one_file_is_one_picture_in_every_form(name: str, tmp_path: Path, loaded: LoadedModel) -> None:
    sources = forms(FILES[name](), tmp_path)
    expected = open_image(sources["path"])
    assert expected.mode == "RGB" and not expected.info
    make = collator(loaded)
    key, tokens = make.key(pair(sources["path"])), make.batch([pair(sources["path"])])
    prompt = {"id": "one", "prompt": "<image>\nwhat is it ?"}
    shown = encode_prompts(loaded, [{**prompt, "images": [sources["path"]]}], padding_side="left").inputs["pixel_values"]
    for form, source in sources.items():
        # Sizes first: they are to be right before anything is decoded.
        assert image_size(source) == expected.size, form
        assert open_image(source).tobytes() == expected.tobytes(), form
        assert image_digest(source) == image_digest(expected), form
        assert make.key(pair(source)) == key, form
        assert torch.equal(make.batch([pair(source)]).pictures.pixel_values, tokens.pictures.pixel_values), form
        found = encode_prompts(loaded, [{**prompt, "images": [source]}], padding_side="left").inputs["pixel_values"]
        assert torch.equal(found, shown), form
    made = corrupt(Image.open(sources["path"]), Corruption(keep=(0.3, 0.5)), "key")
    assert made.tobytes() == corrupt(expected, Corruption(keep=(0.3, 0.5)), "key").tobytes()


def test_the_rules_of_what_is_seen(tmp_path: Path) -> None:
    """Alpha and clear values over white, orientation before size, profiles not applied, whatever the form."""
    for source in forms(encoded(Image.new("RGBA", (4, 4), (255, 0, 0, 0)), "PNG"), tmp_path).values():
        assert open_image(source).getpixel((1, 1)) == (255, 255, 255)
    clear = open_image(FILES["16 bit with a clear value"]())
    assert clear.getpixel((1, 1)) == (255, 255, 255) != clear.getpixel((2, 1))
    assert image_size(FILES["turned jpeg"]()) == image_size(FILES["turned tiff"]()) == (8, 12)
    assert image_digest(FILES["profile"]()) == image_digest(FILES["rgb"]())
    image = Image.open(io.BytesIO(FILES["turned png"]()))
    open_image(image)
    assert image.size == (12, 8) and image.getexif()[0x0112] == 8  # nobody's picture is changed


def test_one_limit_and_one_set_of_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    whole = encoded(noise, "JPEG")
    for source in forms(whole[: len(whole) // 2], tmp_path).values():
        for read in (open_image, image_digest):
            with pytest.raises(ImageError, match="truncated"):
                read(source)
    for form, source in forms(whole, tmp_path).items():
        with pytest.raises(ImageError, match=r"enormous: .*64 x 64 pixels, above the limit of 4095"):
            open_image(source, max_pixels=4095)
        with monkeypatch.context() as patch:
            patch.setattr(images, "MAX_PIXELS", 4095)
            patch.setattr(images, "_digests", {})
            for read in (image_size, image_digest):
                with pytest.raises(ImageError, match="enormous"):
                    read(source)
        assert open_image(source).size == (64, 64), form
    for source, reason in {
        b"hello": "not_a_picture",
        "data:image/png;base64,???": "not_a_picture",
        "data:image/png,abc": "not_a_picture",
        "https://example.org/a.png": "remote",
        "": "not_a_picture",
        str(tmp_path / "gone.png"): "missing",
    }.items():
        for read in (open_image, image_digest, image_size):
            with pytest.raises(ImageError) as caught:
                read(source)
            assert caught.value.reason == reason
    for value in (None, 3, np.zeros((4, 4, 3)), {"path": None, "bytes": None}, Image.new("RGB", (0, 4))):
        with pytest.raises(ImageError, match="not a picture"):
            open_image(value)  # type: ignore[arg-type]
    # What augment takes, no later stage refuses.
    assert RunConfig().data.max_pixels == MAX_PIXELS
    with pytest.raises(ConfigError, match=r"data\.max_pixels"):
        RunConfig.from_dict({"data": {"max_pixels": MAX_PIXELS + 1}})
    with pytest.raises(DataError, match=r"record one: a picture: truncated.*remove the record"):
        preference_records.record_image(pair(whole), whole[: len(whole) // 2])


def test_pictures_are_decoded_once_for_their_digest_and_once_for_a_batch(
    tmp_path: Path, loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = FILES["turned jpeg"]()
    path = str(tmp_path / "a.jpg")
    Path(path).write_bytes(data)
    decoded: list[str] = []
    monkeypatch.setattr(ImageFile.ImageFile, "load_prepare", _counting(ImageFile.ImageFile.load_prepare, decoded))
    monkeypatch.setattr(images, "_digests", {})
    make = collator(loaded)
    make.batch([pair(path), pair(path, id="two"), pair(data, id="three")])
    # The path and the bytes are told apart before they are known to be one picture.
    assert len(decoded) == 2
    make.batch([pair(path)])
    assert len(decoded) == 3
    for _ in range(3):
        make.key(pair(path))
        make.key(pair(data))
        make.length(pair(path))
    assert len(decoded) == 3
    Path(path).write_bytes(FILES["cmyk"]())
    assert make.key(pair(path)) != make.key(pair(data))


def _counting(method: Any, calls: list[str]) -> Any:
    def counted(self: Any) -> Any:
        calls.append(type(self).__name__)
        return method(self)

    return counted


def test_a_cache_by_other_digests_is_not_read(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys by the hash of a file's bytes, or of pixels read otherwise, name other records: those are computed anew."""
    make, files = collator(loaded), {name: FILES[name]() for name in ("rgb", "alpha", "turned jpeg")}
    keys = {name: make.key(pair(data)) for name, data in files.items()}
    monkeypatch.setattr(pair_records, "image_digest", lambda source, opened=None: hashlib.sha256(source).hexdigest())
    assert not set(keys.values()) & {make.key(pair(data)) for data in files.values()}
    monkeypatch.undo()
    plain = Image.open(io.BytesIO(files["alpha"])).convert("RGB")
    assert make.key(pair(plain)) != keys["alpha"]


@pytest.mark.parametrize("stored_as", ["bytes", "paths"])
def test_pairs_and_train_see_one_parquet_alike(stored_as: str, tmp_path: Path, loaded: LoadedModel) -> None:
    import datasets

    names = ["alpha", "16 bit", "turned jpeg", "cmyk", "float", "palette with a hole"]
    (tmp_path / "data" / "pictures").mkdir(parents=True)
    rows = []
    for index, name in enumerate(names):
        (tmp_path / "data" / "pictures" / str(index)).write_bytes(FILES[name]())
        image = {"bytes": FILES[name](), "path": None} if stored_as == "bytes" else f"pictures/{index}"
        rows.append(pair(image, id=f"r{index}", chosen=f"red {index}"))
    kind = datasets.Image() if stored_as == "bytes" else datasets.Value("string")
    texts = {name: datasets.Value("string") for name in rows[0] if name != "images"}
    source = tmp_path / "data" / "mine.parquet"
    datasets.Dataset.from_list(rows, features=datasets.Features(texts | {"images": datasets.List(kind)})).to_parquet(str(source))
    config = RunConfig.from_dict(
        {"method": "mdpo", "pairs": {"source": str(source), "held_out": 0.3}, "run_dir": str(tmp_path / "run")}
    )
    context = StageContext(run=RunFolder(tmp_path / "run"), config=config, stage="pairs")
    pairs.run(context)
    stored = [record for name in ("pairs", "held_out") for record in read_pairs(context.folder / f"{name}.jsonl")]
    given = read_pairs(source)
    make = collator(loaded)
    direct = {record["id"]: make.batch([record]).pictures.pixel_values for record in given}
    assert {record["id"] for record in stored} == set(direct) == {f"r{index}" for index in range(6)}
    for record in stored:
        assert torch.equal(make.batch([record]).pictures.pixel_values, direct[record["id"]]), record["id"]
    assert {record["id"]: make.key(record) for record in stored} == {record["id"]: make.key(record) for record in given}


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_pictures_of_parts_are_read_in_their_place(form: str, tmp_path: Path, loaded: LoadedModel) -> None:
    files = {name: FILES[name]() for name in ("rgb", "alpha")}
    (tmp_path / "a.png").write_bytes(files["rgb"])
    url = f"data:image/png;base64,{base64.b64encode(files['alpha']).decode()}"
    content = [
        {"type": "text", "text": "is "},
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": " like "},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "text", "text": " ?"},
    ]
    record = {
        "id": "parts",
        "prompt": [{"role": "user", "content": content}],
        "chosen": [{"role": "assistant", "content": "red"}],
        "rejected": [{"role": "assistant", "content": "blue"}],
    }
    source = tmp_path / f"mine.{form}"
    if form == "jsonl":
        source.write_text(json.dumps(record) + "\n")
    else:
        import datasets

        datasets.Dataset.from_list([record]).to_parquet(str(source))
    plain = pair(None, id="parts", prompt="is <image> like <image> ?", images=[files["alpha"], files["rgb"]])
    make = collator(loaded)
    (read,) = list(read_pairs(source))
    assert make.key(read) == make.key(plain)
    in_memory = {**record, "prompt": [{"role": "user", "content": [dict(part) for part in content]}]}
    in_memory["prompt"][0]["content"][3] = {"type": "image", "image": Image.open(tmp_path / "a.png")}
    assert make.key(in_memory) == make.key(plain)
    config = RunConfig.from_dict(
        {
            "method": "mdpo",
            "pairs": {"source": str(source), "held_out": 0.0},
            "evaluate": {"input": "x"},
            "run_dir": str(tmp_path / "run"),
        }
    )
    context = StageContext(run=RunFolder(tmp_path / "run"), config=config, stage="pairs")
    pairs.run(context)
    (stored,) = read_pairs(context.folder / "pairs.jsonl")
    assert make.key(stored) == make.key(plain)
