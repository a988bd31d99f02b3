"""A file system that fails for a while: waited for with a word, and no picture is missing for it. Nobody waits in these tests."""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile
from prompt_records import make_prompts

from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.data import outages
from mmdpo_trainers.data.images import ImageError, image_digest, image_exists, image_size, locate_image, read_image
from mmdpo_trainers.errors import StageError
from mmdpo_trainers.shapes.world import write_sft
from mmdpo_trainers.stages import augment
from mmdpo_trainers.stages.batches import own_records
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder


class Clock:
    """Time that only waiting moves. `at` the given second something happens."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now, self.happens = 0.0, {}  # type: float, dict[float, Callable[[], None]]
        patch.setattr(outages.time, "monotonic", lambda: self.now)
        patch.setattr(outages.time, "sleep", self.sleep)

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        for when in [when for when in self.happens if when <= self.now]:
            self.happens.pop(when)()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def failing(patch: pytest.MonkeyPatch, clock: Clock, folder: Path, code: int, until: float) -> None:
    """Everything below a folder fails with this error until then, however it is reached."""

    def broken(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **options: Any) -> Any:
            if clock.now < until and isinstance(path, str | os.PathLike) and os.fspath(path).startswith(str(folder)):
                raise OSError(code, os.strerror(code), os.fspath(path))
            return original(path, *args, **options)

        return call

    patch.setattr(os, "stat", broken(os.stat))
    patch.setattr(Image, "open", broken(Image.open))


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN], ids=errno.errorcode.get)
@pytest.mark.parametrize(
    "read",
    [read_image, image_size, image_digest, image_exists, lambda path: locate_image(path.name, path.parent)],
    ids=["read", "size", "digest", "exists", "locate"],
)
def test_a_minute_without_the_folder_is_waited_for(
    tmp_path: Path,
    clock: Clock,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    code: int,
    read: Callable[[Path], Any],
) -> None:
    caplog.set_level(logging.WARNING)
    file = tmp_path / "a.png"
    Image.new("RGB", (4, 4), "red").save(file)
    with monkeypatch.context() as patch:
        failing(patch, clock, tmp_path, code, 60.0)
        found = read(file)
    assert found == read(file) or found.image.tobytes() == read(file).image.tobytes()
    assert (
        clock.now >= 60
        and caplog.text.count("read again for up to 10 min") == 1
        and caplog.text.count("is read again, after") == 1
    )


def test_a_read_that_breaks_off_is_an_outage_and_a_damaged_file_is_none(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "a.png"
    Image.new("RGB", (64, 64), "red").save(file)
    original, calls = PngImageFile.load, [0]

    def load(self: Image.Image) -> Any:
        calls[0] += 1
        if calls[0] == 1:
            raise OSError(errno.EIO, "Input/output error")
        return original(self)  # type: ignore[no-untyped-call]

    with monkeypatch.context() as patch:
        patch.setattr(PngImageFile, "load", load)
        assert read_image(file).image.getpixel((0, 0)) == (255, 0, 0) and clock.now == 1
    file.write_bytes(file.read_bytes()[:60])
    with pytest.raises(ImageError, match="truncated"):
        read_image(file)
    with pytest.raises(ImageError, match="missing"):
        read_image(tmp_path / "none.png")
    assert clock.now == 1


def test_a_mount_that_is_lost_is_waited_for(tmp_path: Path, clock: Clock) -> None:
    """Its folder is gone, or empty, and files were found in it before; a file that alone is missing is missing at once."""
    folder, away = tmp_path / "photos", tmp_path / "away"
    folder.mkdir()
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(folder / name)
    assert image_exists(folder / "a.png") and not image_exists(folder / "c.png") and clock.now == 0
    for left in (False, True):
        shutil.move(folder, away)
        if left:
            folder.mkdir()

        def back(left: bool = left) -> None:
            if left:
                folder.rmdir()
            shutil.move(away, folder)

        clock.happens[clock.now + 60] = back
        assert image_exists(folder / "b.png")
    assert clock.now >= 120


def test_an_outage_without_end_stops_the_stage_and_counts_nothing(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where missing pictures are allowed; the same command continues."""
    data = write_sft(tmp_path / "data", pictures=12, seed=0)
    source = {"source": str(data), "image_folder": str(data.parent / "images")}
    config = RunConfig.from_dict(
        {"allow_missing": True, "data": source, "augment": {"num_prompts": 4, "formats": {"sequence": 1.0}}}
    )
    context = StageContext(run=RunFolder(tmp_path / "run"), config=config, stage="augment")
    with (
        monkeypatch.context() as patch,
        pytest.raises(StageError, match=r"the file system has not answered for 10 min\. Nothing is counted"),
    ):
        failing(patch, clock, data.parent / "images", errno.EIO, 1e9)
        augment.run(context)
    assert clock.now >= 500
    summary = augment.run(context)
    assert not summary.get("lost", {}).get("reasons")


def test_own_prompts_are_not_left_out_for_an_outage(tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    make_prompts(tmp_path / "data", [("single", 1), ("sequence", 2)])
    config = RunConfig.from_dict({"allow_missing": True})
    context = StageContext(run=RunFolder(tmp_path / "run"), config=config, stage="generate")
    with monkeypatch.context() as patch:
        failing(patch, clock, tmp_path / "data" / "r", errno.ESTALE, 60.0)
        records, left_out = own_records(context, tmp_path / "data" / "prompts.jsonl", "prompts")
    assert len(records) == 2 and not left_out
