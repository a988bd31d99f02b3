"""Noise on the pictures that answers are given to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from PIL import Image

from mmdpo_trainers.data.compose import add_noise
from mmdpo_trainers.data.seeds import batch_seed
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.models.encode import load_images

GRID_NOISE = 225.0


PIP_NOISE = 49.0
"""Standard deviations of MIA-DPO's code, in 0..255 levels."""


def noisy_images(record: Mapping[str, Any], preset: str, seed: int) -> list[Image.Image]:
    """A record's pictures as the model sees them at generation; training always sees the clean ones.

    Sequence and single: clean. Grid: Gaussian noise of 225 levels on the target's cell. Pic-in-pic: 49 levels on the whole
    picture, added in float and clipped (`paper`), or wrapping modulo 256 as MIA-DPO's uint8 sum does (`official_code`).
    """
    pictures = load_images(record)
    if preset == "none" or record["format"] not in ("grid", "pip"):
        return pictures
    own_seed = batch_seed(seed, "noise", record["id"])
    if record["format"] == "pip":
        return [add_noise(pictures[0], PIP_NOISE, own_seed, wrap=preset == "official_code")]
    if record["box"] is None:
        raise DataError(f"record {record['id']}: noise needs the target's `box`; add it, or set generate.noise to none")
    return [add_noise(pictures[0], GRID_NOISE, own_seed, box=record["box"])]
