"""Corrupted pictures: what each kind keeps, that draws follow from (seed, key) alone, and errors that name the field."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmdpo_trainers.data.corruption import KINDS, Corruption, Kind, corrupt, masked_tokens


def coordinates(width: int = 90, height: int = 60) -> Image.Image:
    """Red is the column, green the row: a crop shows where it came from."""
    rows, columns = np.mgrid[0:height, 0:width]
    return Image.fromarray(np.stack([columns, rows, np.full_like(rows, 7)], axis=-1).astype(np.uint8))


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture, dtype=np.int64)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_every_kind_gives_an_rgb_picture_of_the_same_size(kind: Kind, mode: str) -> None:
    picture = coordinates().convert(mode)
    before = picture.tobytes()
    made = corrupt(picture, Corruption(kind=kind), "a", other=coordinates(8, 20))
    assert made is not picture
    assert (made.mode, made.size) == ("RGB", (90, 60))
    assert picture.tobytes() == before
    assert (made.tobytes() == picture.convert("RGB").tobytes()) == (kind == "mask")


@pytest.mark.parametrize("keep", [(0.01, 0.2), (0.2, 0.5), (0.9, 1.0)])
def test_crop_keeps_the_share_asked_for(keep: tuple[float, float]) -> None:
    shares, left, right, top, bottom = [], [], [], [], []
    for index in range(300):
        made = pixels(corrupt(coordinates(), Corruption(keep=keep), str(index)))
        columns = made[..., 0].max() - made[..., 0].min() + 1
        rows = made[..., 1].max() - made[..., 1].min() + 1
        shares.append(columns * rows / (90 * 60))
        left.append(made[..., 0].min())
        right.append(made[..., 0].max())
        top.append(made[..., 1].min())
        bottom.append(made[..., 1].max())
        assert 0.9 * 3 / 4 < (columns / 90) / (rows / 60) < 4 / 3 / 0.9 or min(columns, rows) < 12  # whole pixels
    # Whole pixels move the share of a small crop; bicubic resizing may shave a level off each end.
    assert keep[0] * 0.7 <= min(shares) and max(shares) <= keep[1] * 1.06 + 1e-9
    assert np.mean(shares) == pytest.approx(sum(keep) / 2, rel=0.06)
    if keep[1] < 0.9:
        assert min(left) <= 1 and max(right) >= 88 and min(top) <= 1 and max(bottom) >= 58, "crops come from everywhere"


def test_crop_of_a_tiny_picture() -> None:
    assert corrupt(Image.new("RGB", (1, 1), (3, 4, 5)), Corruption(), "a").getpixel((0, 0)) == (3, 4, 5)
    assert corrupt(coordinates(1, 500), Corruption(), "a").size == (1, 500)


def test_whole_crop_is_the_picture() -> None:
    assert corrupt(coordinates(), Corruption(keep=(1, 1)), "a").tobytes() == coordinates().tobytes()


def test_blank_tells_nothing_of_the_picture() -> None:
    made = [corrupt(picture, Corruption(kind="blank"), "a") for picture in (coordinates(), Image.new("RGB", (90, 60), "red"))]
    assert made[0].tobytes() == made[1].tobytes()
    assert made[0].getcolors() == [(90 * 60, (128, 128, 128))]


def test_other_shows_the_other_picture() -> None:
    made = corrupt(coordinates(), Corruption(kind="other"), "a", other=Image.new("RGB", (5, 50), (1, 2, 3)))
    assert made.getcolors() == [(90 * 60, (1, 2, 3))]


def test_blur_grows_with_strength_and_with_the_picture() -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::16] = stripes[:, 1::16] = 255

    def contrast(strength: float, scale: int = 1) -> float:
        picture = Image.fromarray(stripes).resize((64 * scale, 64 * scale), Image.Resampling.NEAREST)
        return float(pixels(corrupt(picture, Corruption(kind="blur", strength=strength), "a"))[:, 8 * scale : -8 * scale].std())

    assert contrast(0.01) > 2 * contrast(0.05) > 0
    assert contrast(0.03, 4) == pytest.approx(contrast(0.03), rel=0.2), "the radius is a share of the picture"


def test_noise_has_its_strength_and_never_wraps() -> None:
    grey = Image.new("RGB", (80, 80), (128, 128, 128))
    made = pixels(corrupt(grey, Corruption(kind="noise", strength=20.0), "a"))
    assert made.std() == pytest.approx(20, rel=0.05)
    assert made.mean() == pytest.approx(128, abs=1)
    assert abs(np.corrcoef(made[..., 0].ravel(), made[..., 1].ravel())[0, 1]) < 0.05, "channels are drawn apart"
    white = pixels(corrupt(Image.new("RGB", (80, 80), "white"), Corruption(kind="noise", strength=20.0), "a"))
    assert white.min() > 128 and (white == 255).mean() > 0.4, "above white stays white"


@pytest.mark.parametrize("count, strength, masked", [(16, 0.5, 8), (5, 0.5, 3), (576, 0.99, 570), (7, 1.0, 7), (0, 0.5, 0)])
def test_masked_tokens(count: int, strength: float, masked: int) -> None:
    corruption = Corruption(kind="mask", strength=strength)
    found = masked_tokens(count, corruption, "a")
    assert (found.dtype, found.shape, found.sum()) == (np.bool_, (count,), masked)
    assert (found == masked_tokens(count, corruption, "a")).all()
    if 0 < masked < count:
        assert any((found != masked_tokens(count, corruption, key)).any() for key in "bcd")


def test_no_tokens_are_masked_by_other_kinds() -> None:
    assert not masked_tokens(9, Corruption(kind="crop"), "a").any()


@pytest.mark.parametrize("kind", ["crop", "noise"])
def test_draws_follow_from_seed_and_key(kind: Kind) -> None:
    def made(key: str = "a", **options: Any) -> bytes:
        return corrupt(coordinates(), Corruption(kind=kind, **options), key).tobytes()

    assert made() == made()
    assert len({made(), made("b"), made(seed=1), made("1", seed=0), made("", seed=-1)}) == 5


def test_separate_draws_change_the_reference_only() -> None:
    shared, separate = Corruption(kind="crop"), Corruption(kind="crop", draw="separate")
    policy = corrupt(coordinates(), separate, "a", model="policy").tobytes()
    assert policy == corrupt(coordinates(), shared, "a", model="policy").tobytes()
    assert policy == corrupt(coordinates(), shared, "a", model="reference").tobytes()
    assert policy != corrupt(coordinates(), separate, "a", model="reference").tobytes()
    masks = [
        masked_tokens(64, Corruption(kind="mask", strength=0.5, draw="separate"), "a", model=m) for m in ("policy", "reference")
    ]
    assert (masks[0] != masks[1]).any()


def test_draws_are_the_same_everywhere() -> None:
    """Pinned, since kept log-probabilities rest on them: a change here makes every reference cache wrong without a word."""
    made = pixels(corrupt(coordinates(), Corruption(), "é"))[..., :2]
    assert np.abs([*made.min((0, 1)), *made.max((0, 1))] - np.array([10, 12, 36, 28])).max() <= 1
    made = pixels(corrupt(coordinates(), Corruption(draw="separate"), "é", model="reference"))[..., :2]
    assert np.abs([*made.min((0, 1)), *made.max((0, 1))] - np.array([51, 30, 76, 49])).max() <= 1
    assert np.flatnonzero(masked_tokens(16, Corruption(kind="mask", strength=0.3), "é")).tolist() == [4, 5, 9, 12, 14]
    grey = Image.new("RGB", (2, 1), (128, 128, 128))
    assert corrupt(grey, Corruption(kind="noise"), "é").tobytes() == bytes.fromhex("ff12ee03ff9a")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"kind": "sepia"}, "kind: expected one of crop, blank, other, blur, noise, mask, got 'sepia'"),
        ({"keep": (0.0, 0.2)}, r"keep: expected two shares .* got \(0.0, 0.2\)"),
        ({"keep": (0.3, 0.2)}, "keep: expected two shares"),
        ({"keep": (0.3, 1.2)}, "keep: expected two shares"),
        ({"keep": 0.2}, "keep: expected two shares"),
        ({"keep": (0.1, float("nan"))}, "keep: expected two shares"),
        ({"kind": "crop", "strength": 0.5}, r"kind 'crop' has none \(only blur, noise, mask\), got 0.5"),
        ({"kind": "blur", "strength": 0.0}, "expected a share above 0, at most 1 for kind 'blur', got 0.0"),
        ({"kind": "mask", "strength": 1.5}, "expected a share above 0, at most 1 for kind 'mask', got 1.5"),
        ({"kind": "noise", "strength": float("inf")}, "expected a finite number above 0 for kind 'noise', got inf"),
        ({"seed": 1.5}, "seed: expected a whole number, got 1.5"),
        ({"draw": "twice"}, "draw: expected one of shared, separate, got 'twice'"),
    ],
)
def test_settings_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Corruption(**options)


def test_pictures_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="kind 'other' needs another picture for key 'record-1'"):
        corrupt(coordinates(), Corruption(kind="other"), "record-1")
    with pytest.raises(ValueError, match="expected a picture with pixels"):
        corrupt(Image.new("RGB", (0, 5)), Corruption(), "record-1")


def test_strength_defaults_by_kind() -> None:
    assert [Corruption(kind=kind).strength for kind in ("crop", "blur", "noise", "mask")] == [None, 0.1, 100.0, 0.99]
