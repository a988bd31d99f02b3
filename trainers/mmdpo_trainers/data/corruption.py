"""Corrupted pictures: what mDPO's conditional term holds the chosen response against. Pure functions on Pillow pictures.

A picture's corruption follows from `(seed, key)` alone, whatever the process, the platform and the order of calls, so that
log-probabilities of the corrupted branch can be computed once and kept.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image, ImageFilter

from mmdpo_trainers.data.images import open_image

Kind = Literal["crop", "blank", "other", "blur", "noise", "mask"]
Draw = Literal["shared", "separate"]
Model = Literal["policy", "reference"]

KINDS: tuple[Kind, ...] = get_args(Kind)
DRAWS: tuple[Draw, ...] = get_args(Draw)

DEFAULT_STRENGTH: dict[Kind, float] = {"blur": 0.1, "noise": 100.0, "mask": 0.99}
"""Kinds that have a strength -> its default. That of "mask" is the one of BDHS (arXiv 2407.02477)."""

GREY = (128, 128, 128)
_ASPECT = 4 / 3


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """How pictures are corrupted. Raises ValueError naming the field that does not fit.

    | kind | the corrupted picture | strength |
    |---|---|---|
    | crop | a random part of the picture, enlarged to its full size (mDPO, arXiv 2406.11839) | - (`keep`) |
    | blank | mid-grey everywhere | - |
    | other | another picture, given by the caller, resized | - |
    | blur | Gaussian blur | radius as a share of the shorter side |
    | noise | Gaussian noise, cut off at black and white | standard deviation in grey levels (0-255) |
    | mask | the picture itself; the model does not see some of its tokens (`masked_tokens`) | share of the tokens not seen |
    """

    kind: Kind = "crop"
    keep: tuple[float, float] = (0.01, 0.20)
    """"crop": least and greatest share of the picture's area that is kept; 0 < least <= greatest <= 1."""
    strength: float | None = None
    """None: the kind's own default; given for a kind that has no strength, an error."""
    seed: int = 0
    draw: Draw = "shared"
    """"shared": policy and reference see one corruption. "separate": another draw for the reference, as mDPO's released code makes."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"corruption kind: expected one of {', '.join(KINDS)}, got {self.kind!r}")
        if self.draw not in DRAWS:
            raise ValueError(f"corruption draw: expected one of {', '.join(DRAWS)}, got {self.draw!r}")
        if not isinstance(self.seed, int) or isinstance(self.seed, bool):
            raise ValueError(f"corruption seed: expected a whole number, got {self.seed!r}")
        object.__setattr__(self, "keep", _checked_keep(self.keep))
        object.__setattr__(self, "strength", _checked_strength(self.kind, self.strength))


def corrupt(
    picture: Image.Image, corruption: Corruption, key: str, *, other: Image.Image | None = None, model: Model = "policy"
) -> Image.Image:
    """`picture` corrupted: a new RGB picture of the same size. Kind "mask" leaves the pixels as they are.

    Args:
        key: names the record and the picture in it; another key, another draw.
        other: kind "other" only, which needs it: the picture shown in its place.
        model: with draw "separate", whose corruption this is; the policy's is that of draw "shared".

    Raises ValueError for kind "other" without `other`, or a picture without pixels.
    """
    if not picture.width or not picture.height:
        raise ValueError(f"corrupt: expected a picture with pixels, got one of {picture.width} x {picture.height} (key {key!r})")
    picture, other = open_image(picture), None if other is None else open_image(other)
    random = _random(corruption, key, model)
    strength = corruption.strength
    match corruption.kind:
        case "crop":
            box = _crop_box(picture.size, corruption.keep, random)
            return picture.crop(box).resize(picture.size, Image.Resampling.BICUBIC)
        case "blank":
            return Image.new("RGB", picture.size, GREY)
        case "other":
            if other is None:
                raise ValueError(f"corrupt: kind 'other' needs another picture for key {key!r}, `other` is None")
            return other.resize(picture.size, Image.Resampling.BICUBIC)
        case "blur":
            assert strength is not None
            return picture.filter(ImageFilter.GaussianBlur(strength * min(picture.size)))
        case "noise":
            assert strength is not None
            pixels = np.asarray(picture, dtype=np.float64)
            noisy = pixels + random.normal(0.0, strength, pixels.shape)
            return Image.fromarray(noisy.round().clip(0, 255).astype(np.uint8))
        case _:
            return picture


def masked_tokens(count: int, corruption: Corruption, key: str, *, model: Model = "policy") -> np.ndarray:
    """Which of a picture's `count` tokens the model does not see: (count,) bool, all False for kinds other than "mask".

    Exactly `strength * count` of them, rounded half up. `key` and `model` as in `corrupt`.
    """
    masked = np.zeros(count, dtype=bool)
    if corruption.kind == "mask":
        assert corruption.strength is not None
        number = math.floor(corruption.strength * count + 0.5)
        masked[_random(corruption, key, model).permutation(count)[:number]] = True
    return masked


def _random(corruption: Corruption, key: str, model: Model) -> np.random.RandomState:
    """Draws of one picture. RandomState, because NumPy keeps its streams as they are in every version."""
    salt = "reference" if corruption.draw == "separate" and model == "reference" else ""
    digest = hashlib.sha256(json.dumps([corruption.seed, key, salt]).encode()).digest()
    return np.random.RandomState(np.frombuffer(digest, dtype="<u4").astype(np.uint32))


def _crop_box(size: tuple[int, int], keep: tuple[float, float], random: np.random.RandomState) -> tuple[int, int, int, int]:
    """Pixel box (x0, y0, x1, y1) that keeps a share of the area drawn uniformly from `keep`, anywhere in the picture.

    Its aspect, relative to the picture's own, is log-uniform in 3/4 to 4/3 as far as such a box fits.
    """
    width, height = size
    share = random.uniform(*keep)
    widest = math.log(min(_ASPECT, 1 / share))
    aspect = math.exp(random.uniform(-widest, widest))
    columns = min(width, max(1, round(width * math.sqrt(share * aspect))))
    rows = min(height, max(1, round(height * math.sqrt(share / aspect))))
    x, y = random.randint(width - columns + 1), random.randint(height - rows + 1)
    return x, y, x + columns, y + rows


def _checked_keep(keep: tuple[float, float]) -> tuple[float, float]:
    values = tuple(keep) if isinstance(keep, (tuple, list)) else ()
    if len(values) != 2 or not all(map(_is_number, values)) or not 0 < values[0] <= values[1] <= 1:
        raise ValueError(f"corruption keep: expected two shares of the area, 0 < least <= greatest <= 1, got {keep!r}")
    return float(values[0]), float(values[1])


def _checked_strength(kind: Kind, strength: float | None) -> float | None:
    if kind not in DEFAULT_STRENGTH:
        if strength is not None:
            raise ValueError(
                f"corruption strength: kind {kind!r} has none (only {', '.join(DEFAULT_STRENGTH)}), got {strength!r}"
            )
        return None
    if strength is None:
        return DEFAULT_STRENGTH[kind]
    greatest = math.inf if kind == "noise" else 1.0
    if not _is_number(strength) or not 0 < strength <= greatest:
        bound = "a finite number above 0" if kind == "noise" else "a share above 0, at most 1"
        raise ValueError(f"corruption strength: expected {bound} for kind {kind!r}, got {strength!r}")
    return float(strength)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
