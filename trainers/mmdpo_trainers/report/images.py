"""Pictures of the page: sized for reading, outlined, overlaid with attention, embedded as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

SIDE = 224
"""Pixels of the longer side of a picture on the page; twice that for a collage, which holds several."""
TARGET_COLOUR = (224, 24, 122)
OVERLAY = 0.62

Box = Sequence[float]


def sized(picture: Image.Image, side: int = SIDE) -> Image.Image:
    """The picture in RGB with its longer side near `side`; small pictures grow by whole factors, so pixels stay square."""
    picture = picture.convert("RGB")
    longest = max(picture.size)
    if longest * 2 <= side:
        factor = side // longest
        return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)
    if longest > side:
        scale = side / longest
        return picture.resize(
            (max(1, round(picture.width * scale)), max(1, round(picture.height * scale))), Image.Resampling.LANCZOS
        )
    return picture


def outlined(picture: Image.Image, box: Box | None) -> Image.Image:
    """A copy with the rectangle `[x0, y0, x1, y1]` (fractions of width and height) drawn on it; None draws nothing."""
    picture = picture.copy()
    if box is not None:
        corners = [edge * size for edge, size in zip(box, (*picture.size, *picture.size), strict=True)]
        ImageDraw.Draw(picture).rectangle(
            [corners[0], corners[1], max(corners[0], corners[2] - 1), max(corners[1], corners[3] - 1)],
            outline=TARGET_COLOUR,
            width=max(2, round(max(picture.size) / 90)),
        )
    return picture


def overlaid(picture: Image.Image, heat: np.ndarray, *, centre_crop: bool = False) -> Image.Image:
    """The picture in grey under its attention.

    heat: (rows, columns) in [0, 1], one value a patch. centre_crop: the model saw only the centred square, as CLIP crops it; what
    it did not see stays plain grey.
    """
    grey = np.asarray(picture.convert("L").convert("RGB"), dtype=np.float32)
    side = min(picture.size)
    width, height = (side, side) if centre_crop else picture.size
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    rows = np.arange(height) * heat.shape[0] // height
    columns = np.arange(width) * heat.shape[1] // width
    colours = _colours(heat)[np.ix_(rows, columns)]
    seen = grey[top : top + height, left : left + width]
    grey[top : top + height, left : left + width] = (1 - OVERLAY) * seen + OVERLAY * colours
    return Image.fromarray(grey.round().astype(np.uint8))


def heat_gradient(steps: int = 9) -> str:
    """The colours of `overlaid` from 0 to 1 as a CSS gradient."""
    colours = _colours(np.linspace(0, 1, steps))
    return "linear-gradient(to right, " + ", ".join(f"rgb({r:.0f} {g:.0f} {b:.0f})" for r, g, b in colours) + ")"


def data_uri(picture: Image.Image) -> str:
    """PNG or JPEG, whichever is smaller, as a `data:` URI."""
    encoded = {}
    for kind, options in (("png", {"optimize": True}), ("jpeg", {"quality": 88})):
        buffer = io.BytesIO()
        picture.save(buffer, kind, **options)
        encoded[kind] = buffer.getvalue()
    kind = min(encoded, key=lambda name: len(encoded[name]))
    return f"data:image/{kind};base64,{base64.b64encode(encoded[kind]).decode('ascii')}"


def _colours(heat: np.ndarray) -> np.ndarray:
    from .plots import require_matplotlib

    return np.asarray(require_matplotlib().colormaps["inferno"](np.clip(heat, 0, 1)))[..., :3].astype(np.float32) * 255
