"""Multi-image pictures out of single ones: MIA-DPO's grid collage and pic-in-pic, their patch regions, and its noise.

Pure functions on Pillow pictures; nothing here knows prompts or models. Source: MIA-DPO (arXiv 2410.17637) and its released code.
A *box* is ``(x0, y0, x1, y1)`` in fractions of the final picture's width and height. A *region* is ``[row0, col0, row1, col1]``,
half-open, on a patch grid ``(rows, columns)``.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Box = tuple[float, float, float, float]
Size = tuple[int, int]
"""Width and height in pixels."""

_Pixels = tuple[int, int, int, int]
"""``(x0, y0, x1, y1)`` in pixels, the last ones exclusive."""

GRID_SHAPES: dict[int, tuple[int, int]] = {2: (1, 2), 3: (1, 3), 4: (2, 2), 6: (2, 3), 9: (3, 3)}
"""Pictures in a collage -> (rows, columns)."""

WHITE = (255, 255, 255)
MIN_LABEL_MARGIN = 8


def grid_collage(
    pictures: Sequence[Image.Image], *, cell_size: int = 448, margin: int = 40, label: bool = True, square: bool = True
) -> tuple[Image.Image, list[Box]]:
    """Lay pictures out on white in reading order and return the collage with the box of every cell.

    Each picture keeps its aspect and is centred in a ``cell_size`` square; ``margin`` pixels surround every cell, and the margin
    above a cell carries its label ``Image{k}``, counted from 1. With ``square`` the collage is centred on a white square, because
    CLIP image processors centre-crop; the boxes are those of the padded picture.

    Raises ``ValueError`` for a number of pictures outside `GRID_SHAPES`, a cell without pixels, or a margin too thin for labels.
    """
    layout: dict[str, Any] = {"cell_size": cell_size, "margin": margin, "label": label, "square": square}
    canvas = Image.new("RGB", collage_size(len(pictures), **layout), WHITE)
    for k, (picture, (x, y)) in enumerate(zip(pictures, _corners(len(pictures), **layout), strict=True)):
        _paste_centred(canvas, picture, (x, y, x + cell_size, y + cell_size))
        if label:
            _draw_label(canvas, f"Image{k + 1}", x, y - margin, margin)
    return canvas, collage_boxes(len(pictures), **layout)


def collage_boxes(num_images: int, *, cell_size: int, margin: int, label: bool, square: bool) -> list[Box]:
    """The boxes of the cells of `grid_collage`, without a picture; raises the same errors."""
    layout: dict[str, Any] = {"cell_size": cell_size, "margin": margin, "label": label, "square": square}
    width, height = collage_size(num_images, **layout)
    return [(x / width, y / height, (x + cell_size) / width, (y + cell_size) / height) for x, y in _corners(num_images, **layout)]


def _corners(num_images: int, *, cell_size: int, margin: int, label: bool, square: bool) -> list[tuple[int, int]]:
    """Upper left pixel of each cell."""
    size = collage_size(num_images, cell_size=cell_size, margin=margin, label=label, square=square)
    width, height = collage_size(num_images, cell_size=cell_size, margin=margin, label=label, square=False)
    left, top = (size[0] - width) // 2, (size[1] - height) // 2
    places = (divmod(k, _grid_shape(num_images)[1]) for k in range(num_images))
    step = cell_size + margin
    return [(left + margin + column * step, top + margin + row * step) for row, column in places]


def collage_size(num_images: int, *, cell_size: int, margin: int, label: bool, square: bool) -> Size:
    """Width and height in pixels of what `grid_collage` makes, which raises the same errors."""
    rows, columns = _grid_shape(num_images)
    if cell_size < 1 or margin < 0:
        raise ValueError(f"grid_collage: expected cell_size >= 1 and margin >= 0, got cell_size={cell_size}, margin={margin}")
    if label and margin < MIN_LABEL_MARGIN:
        raise ValueError(
            f"grid_collage: labels need a margin of {MIN_LABEL_MARGIN} pixels, got {margin}; pass label=False or more margin"
        )
    width = columns * cell_size + (columns + 1) * margin
    height = rows * cell_size + (rows + 1) * margin
    side = max(width, height)
    return (side, side) if square else (width, height)


def pic_in_pic(
    host: Image.Image, target: Image.Image, *, max_fraction: float = 0.7, square: bool = True
) -> tuple[Image.Image, Box]:
    """Paste ``target`` at the centre of ``host`` and return the picture with the pasted box.

    The target keeps its aspect and is scaled, up or down, to fill ``max_fraction`` of the host's width or height. ``square``
    first pads the host with white to a square (see `grid_collage`). Raises ``ValueError`` for a fraction outside (0, 1].
    """
    size, place, box = pic_in_pic_place(host.size, target.size, max_fraction=max_fraction, square=square)
    canvas = Image.new("RGB", size, WHITE)
    canvas.paste(host.convert("RGB"), ((size[0] - host.width) // 2, (size[1] - host.height) // 2))
    _paste(canvas, target, place)
    return canvas, box


def pic_in_pic_place(host: Size, target: Size, *, max_fraction: float, square: bool) -> tuple[Size, _Pixels, Box]:
    """Of what `pic_in_pic` makes of pictures of these sizes: its size, the pixels that the target covers, and their box."""
    if not 0 < max_fraction <= 1:
        raise ValueError(f"pic_in_pic: expected 0 < max_fraction <= 1, got {max_fraction}")
    size = (max(host), max(host)) if square else host
    room = (max(1, int(host[0] * max_fraction)), max(1, int(host[1] * max_fraction)))
    x, y = (size[0] - room[0]) // 2, (size[1] - room[1]) // 2
    x0, y0, x1, y1 = place = _centred(target, (x, y, x + room[0], y + room[1]))
    return size, place, (x0 / size[0], y0 / size[1], x1 / size[0], y1 / size[1])


def box_to_region(box: Sequence[float], patch_grid: tuple[int, int]) -> list[int]:
    """The patches whose centres lie inside ``box``; where there is none, the patch under the box's own centre.

    Raises ``ValueError`` for a box that is empty or leaves the picture, or for a grid without patches.
    """
    x0, y0, x1, y1 = box
    rows, columns = _patch_grid(patch_grid)
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise ValueError(f"box_to_region: expected 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, got {tuple(box)}")
    row0, row1 = _covered(y0, y1, rows)
    column0, column1 = _covered(x0, x1, columns)
    return [row0, column0, row1, column1]


def official_grid_region(index: int, num_images: int, patch_grid: tuple[int, int]) -> list[int]:
    """Cell ``index`` (0-based) as MIA-DPO's code cuts it: the patch grid in equal blocks, remainders given to the first blocks.

    It ignores margins, labels and padding; `box_to_region` follows the pixels. Raises ``ValueError`` for an index that is not
    in the collage.
    """
    rows, columns = _grid_shape(num_images)
    if not 0 <= index < num_images:
        raise ValueError(f"official_grid_region: expected 0 <= index < {num_images}, got {index}")
    patch_rows, patch_columns = _patch_grid(patch_grid)
    row, column = divmod(index, columns)
    row0, row1 = _block(row, rows, patch_rows)
    column0, column1 = _block(column, columns, patch_columns)
    return [row0, column0, row1, column1]


def official_pip_region(patch_grid: tuple[int, int]) -> list[int]:
    """MIA-DPO's fixed pic-in-pic region: the centre 16x16 of LLaVA-1.5's 24x24 patches, in proportion on any other grid."""
    rows, columns = _patch_grid(patch_grid)
    row0, column0 = (round(n * 4 / 24) for n in (rows, columns))
    return [row0, column0, rows - row0, columns - column0]


def add_noise(
    image: Image.Image, sigma: float, seed: int, *, box: Sequence[float] | None = None, wrap: bool = False
) -> Image.Image:
    """Add Gaussian noise of standard deviation ``sigma`` (in 0..255 levels) to the picture, or only inside ``box``.

    The noise is added in float and clipped. ``wrap=True`` repeats MIA-DPO's code, where the sum is uint8 and wraps modulo 256.
    Deterministic in ``seed``. Raises ``ValueError`` for a negative sigma.
    """
    if sigma < 0:
        raise ValueError(f"add_noise: expected sigma >= 0, got {sigma}")
    pixels = np.array(image.convert("RGB"))
    x0, y0, x1, y1 = box if box is not None else (0.0, 0.0, 1.0, 1.0)
    area = (slice(round(y0 * image.height), round(y1 * image.height)), slice(round(x0 * image.width), round(x1 * image.width)))
    clean = pixels[area].astype(np.float64)
    noisy = np.rint(clean + np.random.default_rng(seed).normal(0.0, sigma, clean.shape))
    pixels[area] = (np.mod(noisy, 256) if wrap else np.clip(noisy, 0, 255)).astype(np.uint8)
    return Image.fromarray(pixels)


def _grid_shape(num_images: int) -> tuple[int, int]:
    if num_images not in GRID_SHAPES:
        raise ValueError(f"a grid collage holds {', '.join(map(str, GRID_SHAPES))} pictures, got {num_images}")
    return GRID_SHAPES[num_images]


def _patch_grid(patch_grid: tuple[int, int]) -> tuple[int, int]:
    rows, columns = patch_grid
    if rows < 1 or columns < 1:
        raise ValueError(f"expected a patch grid (rows, columns) of positive numbers, got {tuple(patch_grid)}")
    return rows, columns


def _centred(size: Size, room: _Pixels) -> _Pixels:
    """The rectangle that a picture of this size covers in ``room``, aspect kept."""
    x0, y0, x1, y1 = room
    scale = min((x1 - x0) / size[0], (y1 - y0) / size[1])
    width, height = max(1, round(size[0] * scale)), max(1, round(size[1] * scale))
    x, y = x0 + (x1 - x0 - width) // 2, y0 + (y1 - y0 - height) // 2
    return x, y, x + width, y + height


def _paste_centred(canvas: Image.Image, picture: Image.Image, room: _Pixels) -> None:
    _paste(canvas, picture, _centred(picture.size, room))


def _paste(canvas: Image.Image, picture: Image.Image, place: _Pixels) -> None:
    """Paste the picture scaled to a rectangle of pixels."""
    x0, y0, x1, y1 = place
    canvas.paste(picture.convert("RGB").resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC), (x0, y0))


def _draw_label(canvas: Image.Image, text: str, x: int, y: int, height: int) -> None:
    ImageDraw.Draw(canvas).text((x, y + height / 2), text, fill=(0, 0, 0), font=_font(max(1, int(height * 0.6))), anchor="lm")


_font = functools.lru_cache(maxsize=8)(ImageFont.load_default)


def _covered(low: float, high: float, patches: int) -> tuple[int, int]:
    inside = [i for i in range(patches) if low <= (i + 0.5) / patches <= high]
    if not inside:
        middle = min(patches - 1, int((low + high) / 2 * patches))
        return middle, middle + 1
    return inside[0], inside[-1] + 1


def _block(index: int, blocks: int, patches: int) -> tuple[int, int]:
    size, remainder = divmod(patches, blocks)
    start = index * size + min(index, remainder)
    return start, start + size + (index < remainder)
