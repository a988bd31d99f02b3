"""Readers: each odd record and odd picture is used, or reported by record with a reason; none stops the reading."""

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmdpo_trainers.data.images import ImageError, open_image, read_image
from mmdpo_trainers.data.records import check_prompt, read_prompts, relative_images
from mmdpo_trainers.data.sources import Problem, SourceRecord, read_source
from mmdpo_trainers.errors import DataError


def picture_file(folder: Path, name: str, colour: tuple[int, int, int] = (200, 30, 40), size: tuple[int, int] = (8, 6)) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(folder / name)
    return folder / name


def llava(
    id: Any, image: Any = "a.png", question: Any = "<image>\nWhat is it?", answer: Any = "A cat.", **more: Any
) -> dict[str, Any]:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": id, "image": image, "conversations": turns, **more}


def read(tmp_path: Path, records: list[Any], suffix: str = ".json") -> tuple[list[SourceRecord], list[Problem]]:
    images = tmp_path / "images"
    if not images.exists():
        picture_file(images, "a.png")
    path = tmp_path / f"data{suffix}"
    path.write_text(json.dumps(records) if suffix == ".json" else "".join(json.dumps(record) + "\n" for record in records))
    return split(read_source(path, image_folder=images, cache=tmp_path / "cache"))


def split(items: Any) -> tuple[list[SourceRecord], list[Problem]]:
    items = list(items)
    return [i for i in items if isinstance(i, SourceRecord)], [i for i in items if isinstance(i, Problem)]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_llava_record(tmp_path: Path, suffix: str) -> None:
    records, problems = read(
        tmp_path, [llava("x1"), llava(7, question="What is it?\n<image>", options=["A cat.", "A dog."])], suffix
    )
    assert problems == []
    assert records == [
        SourceRecord("x1", (tmp_path / "images/a.png").resolve(), "What is it?", "A cat."),
        SourceRecord("7", (tmp_path / "images/a.png").resolve(), "What is it?", "A cat.", ("A cat.", "A dog.")),
    ]


def test_turns_of_a_conversation_become_questions_about_its_picture(tmp_path: Path) -> None:
    record = llava("x")
    record["conversations"] += [{"from": "human", "value": "Its colour?"}, {"from": "gpt", "value": " Red. "}]
    record["conversations"] += [{"from": "human", "value": "And?"}, {"from": "gpt", "value": "  "}]
    record["conversations"].insert(0, {"from": "system", "value": "Be kind."})
    records, problems = read(tmp_path, [record])
    assert [(r.id, r.question, r.answer) for r in records] == [("x-q0", "What is it?", "A cat."), ("x-q1", "Its colour?", "Red.")]
    assert [(p.id, p.reason, p.dropped) for p in problems] == [("x", "system_prompt", False), ("x-q2", "empty_answer", True)]
    assert "Be kind." in problems[0].detail


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (llava("x", image=None), "no_picture"),
        (llava("x", image=""), "no_picture"),
        (llava("x", image=3), "no_picture"),
        ({"id": "x", "conversations": llava("x")["conversations"]}, "no_picture"),
        (llava("x", image="gone.png"), "missing"),
        (llava("x", image="a\0.png"), "missing"),
        (llava("x", image="n" * 5000), "missing"),
        (llava("x", image="."), "missing"),
        (llava("x", image=["a.png", "a.png"]), "several_pictures"),
        (llava("x", question="<image> <image> Same?"), "several_pictures"),
        (llava("x", image="../secret.png"), "outside_image_folder"),
        (llava("x", image="/etc/hostname"), "outside_image_folder"),
        (llava("x", image="link.png"), "outside_image_folder"),
        (llava("x", question="<image>\n"), "empty_question"),
        (llava("x", answer=""), "empty_answer"),
        (llava("x", answer="see <image>"), "image_token_in_answer"),
        (llava("x", answer=5), "not_text"),
        (llava("x", question=None), "not_text"),
        (llava("x", options="A"), "not_text"),
        ({"id": "x", "image": "a.png", "conversations": "hello"}, "not_text"),
        ({"id": "x", "image": "a.png", "conversations": ["hello"]}, "not_text"),
        ({"id": "x", "image": "a.png", "conversations": []}, "no_conversation"),
        ({"id": "x", "image": "a.png"}, "no_conversation"),
        ({"id": "x", "image": "a.png", "conversations": llava("x")["conversations"][::-1]}, "wrong_roles"),
        ({"id": "x", "image": "a.png", "conversations": llava("x")["conversations"][:1]}, "wrong_roles"),
        (
            {"id": "x", "image": "a.png", "conversations": [{"from": "bot", "value": "?"}, {"from": "gpt", "value": "!"}]},
            "wrong_roles",
        ),
    ],
)
def test_bad_record_is_reported_and_the_next_one_read(tmp_path: Path, record: dict[str, Any], reason: str) -> None:
    picture_file(tmp_path, "secret.png")
    picture_file(tmp_path / "images", "a.png")
    (tmp_path / "images/link.png").symlink_to(tmp_path / "secret.png")
    records, problems = read(tmp_path, [record, llava("good")])
    assert [r.id for r in records] == ["good"]
    assert [(p.id, p.reason, p.dropped) for p in problems] == [("x", reason, True)]
    assert problems[0].detail


def test_items_that_are_not_records_and_lines_that_are_not_json(tmp_path: Path) -> None:
    records, problems = read(tmp_path, [None, 3, llava("x")])
    assert [r.id for r in records] == ["x"] and [p.reason for p in problems] == ["not_a_record", "not_a_record"]
    path = tmp_path / "lines.jsonl"
    path.write_bytes(json.dumps(llava("a")).encode() + b'\n{"id": \n\xff\xfe\n\n' + json.dumps(llava("b")).encode())
    records, problems = split(read_source(path, image_folder=tmp_path / "images", cache=tmp_path / "cache"))
    assert [r.id for r in records] == ["a", "b"]
    assert [(p.id, p.reason) for p in problems] == [("line2", "invalid_json"), ("line3", "invalid_json")]


def test_duplicate_ids(tmp_path: Path) -> None:
    records, problems = read(
        tmp_path, [llava("x"), llava("x"), llava("x", answer="A dog."), llava("x", answer="A dog."), llava("y")]
    )
    assert [(r.id, r.answer) for r in records] == [("x", "A cat."), ("x~2", "A dog."), ("y", "A cat.")]
    assert [(p.reason, p.dropped) for p in problems] == [
        ("duplicate_record", True),
        ("duplicate_id", False),
        ("duplicate_record", True),
    ]
    assert len({p.key for p in problems}) == 3


@pytest.mark.parametrize("first", ["turns", "alike"])
def test_turns_do_not_take_the_id_of_another_record(tmp_path: Path, first: str) -> None:
    turns = llava("a")
    turns["conversations"] += [{"from": "human", "value": "Its colour?"}, {"from": "gpt", "value": "Red."}]
    records, problems = read(tmp_path, [turns, llava("a-q0")] if first == "turns" else [llava("a-q0"), turns])
    expected = ["a-q0", "a-q1", "a-q0~2"] if first == "turns" else ["a-q0", "a-q0~2", "a-q1"]
    assert [r.id for r in records] == expected
    assert [(p.id, p.reason, p.dropped) for p in problems] == [("a-q0~2", "duplicate_id", False)]


@pytest.mark.parametrize(
    "record",
    [
        llava("x\ud800"),
        llava("x", image="\ud800.png"),
        llava("x", question="What \ud800?"),
        llava("x", answer="\ud800"),
        llava("x", options=["A cat.", "\ud800"]),
    ],
)
def test_half_a_surrogate_pair_costs_its_record_only(tmp_path: Path, record: dict[str, Any]) -> None:
    records, problems = read(tmp_path, [record, llava("good")])
    assert [r.id for r in records] == ["good"]
    assert [(p.reason, p.dropped) for p in problems] == [("invalid_text", True)] and problems[0].id.startswith("x")
    json.dumps(problems[0].to_json(), ensure_ascii=False).encode()


def test_records_without_an_id_are_named_by_their_row(tmp_path: Path) -> None:
    records, _ = read(tmp_path, [llava(None), llava("  "), llava({"a": 1})])
    assert [r.id for r in records] == ["row0", "row1", "row2"]


def test_limit_counts_source_records(tmp_path: Path) -> None:
    read(tmp_path, [llava("a", image="gone.png"), llava("b"), llava("c")])
    records, problems = split(read_source(tmp_path / "data.json", image_folder=tmp_path / "images", cache=tmp_path, limit=2))
    assert [r.id for r in records] == ["b"] and [p.id for p in problems] == ["a"]


def trl_rows() -> dict[str, list[Any]]:
    red, blue = (Image.new("RGB", (5, 4), colour) for colour in ("red", "blue"))
    ask = [{"role": "user", "content": "What colour?"}]
    return {
        "prompt": [ask, ask, ask],
        "chosen": [[{"role": "assistant", "content": text}] for text in ("red", "blue", "none")],
        "rejected": [[{"role": "assistant", "content": "green"}]] * 3,
        "images": [[red], [blue], []],
    }


@pytest.mark.parametrize("form", ["folder", "parquet", "parquet_folder", "splits"])
def test_datasets_with_trl_columns(tmp_path: Path, form: str) -> None:
    import datasets

    features = datasets.Features(
        {
            "prompt": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            "chosen": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            "rejected": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            "images": datasets.List(datasets.Image()),
        }
    )
    data = datasets.Dataset.from_dict(trl_rows(), features=features)
    path = tmp_path / ("data.parquet" if form == "parquet" else "data")
    if form == "folder":
        data.save_to_disk(str(path))
    elif form == "splits":
        datasets.DatasetDict({"test": data.select([2]), "train": data}).save_to_disk(str(path))
    else:
        (path if form == "parquet_folder" else path.parent).mkdir(exist_ok=True)
        data.to_parquet(str(path / "part.parquet" if form == "parquet_folder" else path))
    for _ in range(2):
        records, problems = split(read_source(path, cache=tmp_path / "cache"))
        assert [(r.id, r.question, r.answer) for r in records] == [
            ("row0", "What colour?", "red"),
            ("row1", "What colour?", "blue"),
        ]
        assert [(p.id, p.reason) for p in problems] == [("row2", "no_picture")]
    assert open_image(records[1].picture).getpixel((0, 0)) == (0, 0, 255)
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_other_trl_forms(tmp_path: Path) -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "What?"}]
    rows = [
        {"id": "text", "images": ["a.png"], "prompt": "What?", "completion": "This."},
        {
            "id": "implicit",
            "image": "a.png",
            "chosen": [{"role": "user", "content": parts}, {"role": "assistant", "content": "That."}],
        },
        {
            "id": "messages",
            "images": ["a.png"],
            "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "It."}],
        },
        {"id": "audio", "images": ["a.png"], "prompt": [{"role": "user", "content": [{"type": "audio"}]}], "completion": "?"},
        {"id": "alone", "images": ["a.png"], "prompt": "What?"},
    ]
    records, problems = read(tmp_path, rows)
    assert [(r.id, r.question, r.answer) for r in records] == [
        ("text", "What?", "This."),
        ("implicit", "What?", "That."),
        ("messages", "What?", "It."),
    ]
    assert [(p.id, p.reason) for p in problems] == [("audio", "unread_content"), ("alone", "no_conversation")]


def test_broken_sources_are_errors_with_a_remedy(tmp_path: Path) -> None:
    def reading(name: str, content: str | None = None, image_folder: Path | None = None) -> None:
        if content is not None:
            (tmp_path / name).write_text(content)
        list(read_source(tmp_path / name, image_folder=image_folder, cache=tmp_path / "cache"))

    with pytest.raises(DataError, match="does not exist"):
        reading("none.json")
    with pytest.raises(DataError, match=r"expected a list of records, got dict; .*\.jsonl"):
        reading("lines.json", '{"id": 1}\n{"id": 2}\n')
    with pytest.raises(DataError, match="expected a list of records, got dict"):
        reading("object.json", "{}")
    with pytest.raises(DataError, match="cannot be read by `datasets`"):
        reading("x.parquet", "not parquet")
    with pytest.raises(DataError, match=r"expected a \.jsonl file, a \.json list"):
        reading("x.csv", "a,b\n")
    with pytest.raises(DataError, match="image folder .* does not exist"):
        reading("ok.json", "[]", image_folder=tmp_path / "gone")


def save(folder: Path, name: str, image: Image.Image, **options: Any) -> Path:
    image.save(folder / name, **options)
    return folder / name


def test_pictures_become_upright_rgb(tmp_path: Path) -> None:
    ramp = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)
    expected = np.rint(ramp / 257).astype(np.uint8)
    deep = read_image(save(tmp_path, "deep.png", Image.fromarray(ramp)))
    assert deep.converted == "16-bit"
    assert np.array_equal(np.asarray(deep.image)[..., 0], expected)

    tiff = read_image(save(tmp_path, "float.tiff", Image.fromarray((ramp / 65535).astype(np.float32))))
    assert np.array_equal(np.asarray(tiff.image)[..., 1], expected)

    cmyk = read_image(save(tmp_path, "cmyk.jpg", Image.new("CMYK", (8, 8), (0, 255, 255, 0))))
    assert cmyk.converted == "CMYK" and np.abs(np.asarray(cmyk.image)[4, 4].astype(int) - (255, 0, 0)).max() < 8

    frames = [Image.new("RGB", (6, 6), colour) for colour in ("red", "blue")]
    gif = read_image(save(tmp_path, "two.gif", frames[0], save_all=True, append_images=frames[1:]))
    assert gif.converted == "animated" and gif.image.getpixel((0, 0)) == (255, 0, 0)

    clear = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_image(save(tmp_path, "clear.png", clear)).getpixel((1, 1)) == (255, 255, 255)
    palette = Image.new("P", (4, 4), 1)
    palette.putpalette([0, 0, 0, 0, 255, 0])
    assert read_image(save(tmp_path, "palette.png", palette)).converted is None
    assert open_image(save(tmp_path, "hole.png", palette, transparency=1)).getpixel((0, 0)) == (255, 255, 255)

    wide = Image.new("RGB", (8, 4), "white")
    wide.putpixel((0, 0), (0, 0, 0))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = read_image(save(tmp_path, "turned.png", wide, exif=exif))
    assert turned.converted == "rotated" and turned.image.size == (4, 8) and turned.image.getpixel((3, 0)) == (0, 0, 0)

    assert read_image(save(tmp_path, "lab.tiff", Image.new("LAB", (4, 4)))).converted == "LAB"
    for mode in ("RGB", "L", "1"):
        plain = read_image(save(tmp_path, f"{mode}.png", Image.new(mode, (3, 2))))
        assert plain.converted is None and plain.image.mode == "RGB" and plain.image.size == (3, 2)


def png_header(width: int, height: int) -> bytes:
    body = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = b"IDAT" + zlib.compress(b"")
    chunks = [body, data, b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(struct.pack(">I", len(c) - 4) + c + struct.pack(">I", zlib.crc32(c)) for c in chunks)


def test_unusable_pictures_have_a_reason(tmp_path: Path) -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    noise.save(buffer, "JPEG")
    files = {
        "truncated": buffer.getvalue()[: len(buffer.getvalue()) // 2],
        "not_a_picture": b"hello",
        "enormous": png_header(30_000, 3_000),
    }
    for reason, data in files.items():
        (tmp_path / reason).write_bytes(data)
        with pytest.raises(ImageError) as caught:
            read_image(tmp_path / reason)
        assert caught.value.reason == reason and reason in caught.value.detail
    (tmp_path / "bomb").write_bytes(png_header(100_000, 100_000))
    with pytest.raises(ImageError, match="enormous"):
        read_image(tmp_path / "bomb", max_pixels=10**12)
    with pytest.raises(ImageError, match="enormous: .*8 x 6 pixels, above the limit of 47"):
        read_image(picture_file(tmp_path, "small.png"), max_pixels=47)
    with pytest.raises(ImageError, match="missing"):
        read_image(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ImageError, match="missing"):
        read_image(tmp_path / "pipe")


def prompt(**changes: Any) -> dict[str, Any]:
    images = ["images/a.png", "/b.png"]
    record = {"id": "p", "images": images, "prompt": "Image1:<image>\nImage2:<image>\nIn Image2, what?", "target": 1}
    return {key: value for key, value in {**record, **changes}.items() if value is not ...}


def test_prompts_of_the_users_own_get_their_optional_fields(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    single = {"id": "s", "images": ["a.png"], "prompt": "<image>\nWhat?"}
    path.write_text("".join(json.dumps(record) + "\n" for record in (prompt(mine=1), single)))
    first, second = read_prompts(path)
    assert first["images"] == [str(tmp_path / "images/a.png"), "/b.png"] and first["mine"] == 1
    assert (first["format"], first["num_images"], first["target"], first["answer"]) == ("sequence", 2, 1, None)
    assert (second["format"], second["num_images"], second["target"], second["region"]) == ("single", 1, 0, None)
    path.write_text(json.dumps(single) + "\n" + json.dumps(single) + "\n")
    with pytest.raises(DataError, match=r"record 2 \('s'\): this id occurs twice"):
        list(read_prompts(path))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"id": 3}, "id must be text, got 3"),
        ({"prompt": ...}, "prompt must be text or a list of messages, got None"),
        ({"images": "a.png"}, "images must be a list of paths"),
        ({"images": []}, "the prompt has 2 <image> but images holds 0 paths"),
        ({"images": ["a.png", ""]}, "images must be a list of paths"),
        ({"images": [], "prompt": "why ?", "format": "single"}, "format must be text where there are no pictures, got 'single'"),
        ({"images": [], "prompt": "why ?"}, "a prompt without pictures has num_images 0 and no target, got 0 and 1"),
        ({"format": "text"}, "format must be one of sequence, grid, pip, single, got 'text'"),
        ({"prompt": "<image> what?"}, "the prompt has 1 <image> but images holds 2 paths"),
        ({"format": "collage"}, "format must be one of sequence, grid, pip, single, got 'collage'"),
        ({"target": ...}, "target must be the 0-based index of the asked-about picture, below 2, got None"),
        ({"target": 2}, "below 2, got 2"),
        ({"target": True}, "below 2, got True"),
        ({"num_images": "2"}, "num_images must be a whole number from 1 up, got '2'"),
        ({"num_images": 3}, "num_images must be the number of images of a sequence, 2, got 3"),
        ({"answer": 5}, "answer must be text or null, got 5"),
        ({"answer": "\ud800"}, "cannot be written as UTF-8"),
        ({"options": "red"}, "options must be a list of texts or null, got 'red'"),
        ({"options": ["red", 5]}, "options must be a list of texts or null"),
        ({"box": [0, 0, 1]}, "box must be [x0, y0, x1, y1]"),
        ({"box": [0, 0, 1, "1"]}, "box must be [x0, y0, x1, y1]"),
        ({"box": [0.5, 0, 0.5, 1]}, "0 <= x0 < x1 <= 1"),
        ({"box": [0, 0, 1, float("nan")]}, "0 <= y0 < y1 <= 1"),
        ({"box": [0, 0, 30, 40]}, "got [0, 0, 30, 40]"),
        ({"patch_grid": [4]}, "patch_grid must be [rows, columns]"),
        ({"region": [0, 0, 1, 1]}, "region needs the patch_grid"),
        ({"region": [0, 0, 5, 1], "patch_grid": [4, 4]}, "inside patch_grid [4, 4], got [0, 0, 5, 1]"),
        ({"region": [0, 0, 1.5, 1], "patch_grid": [4, 4]}, "region must be [row0, col0, row1, col1]"),
    ],
)
def test_prompts_that_do_not_hold_together_are_errors(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError) as caught:
        check_prompt(prompt(**changes), "here")
    assert str(caught.value).startswith("here: ") and message in str(caught.value)


def test_pictures_of_a_run_are_stored_relative(tmp_path: Path) -> None:
    run = tmp_path / "run"
    paths = [str(run / "augment/images/a.png"), "/elsewhere/../b.png"]
    assert relative_images(paths, run / "generate", run) == ["../augment/images/a.png", "/b.png"]
