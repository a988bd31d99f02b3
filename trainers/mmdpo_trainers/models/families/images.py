"""Pictures as a model takes them, and which part of a picture each of its image tokens stands for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Box = tuple[float, float, float, float]
"""Left, top, right and bottom as shares of the picture's width and height."""

WHOLE: Box = (0.0, 0.0, 1.0, 1.0)


@dataclass(frozen=True)
class View:
    """A grid of image tokens over a part of a picture, the whole of it or a tile, with the tokens beside it that show nothing."""

    rows: int
    columns: int
    box: Box = WHOLE
    row_ends: int = 0
    """Image tokens that end each row."""
    marks: int = 0
    """Image tokens behind the last row."""

    @property
    def tokens(self) -> int:
        return self.rows * (self.columns + self.row_ends) + self.marks

    def shown(self, values: Tensor) -> Tensor:
        """(rows, columns): the grid's part of values of all its tokens."""
        return values[: len(values) - self.marks].view(self.rows, -1)[:, : self.columns]

    def inside(self, box: Box) -> Tensor:
        """(tokens) bool: which of its image tokens have their centres in `box`, a part of the whole picture."""
        found = torch.zeros(self.tokens, dtype=torch.bool)
        left, top, right, bottom = self.box
        x = left + (torch.arange(self.columns) + 0.5) / max(self.columns, 1) * (right - left)
        y = top + (torch.arange(self.rows) + 0.5) / max(self.rows, 1) * (bottom - top)
        self.shown(found)[:] = ((y >= box[1]) & (y < box[3]))[:, None] & ((x >= box[0]) & (x < box[2]))
        return found


@dataclass(frozen=True, kw_only=True)
class EncodedImages:
    """P pictures as a model takes them."""

    inputs: dict[str, Tensor]
    """The model's keyword arguments. Their entries go picture after picture, whatever number each of them has there."""
    tokens: list[int]
    """(P) image tokens of each picture in the language model."""
    blocks: list[list[int]]
    """(P) token ids that stand in the place of each picture's one image token in a prompt: image tokens, and in some families marks
    between them."""
    views: list[tuple[View, ...]]
    """(P) what each picture's image tokens show, in their order; empty where that is not known."""
    grids: Tensor | None = None
    """(P, 3) int64, `image_grid_thw`: frames, rows and columns of vision patches, where positions follow them."""

    @property
    def pixel_values(self) -> Tensor:
        """LLaVA: (P, 3, H, W); tiled: (P, tiles, 3, H, W) or (tiles of all, 3, H, W); Qwen: (patches of all, values of a patch)."""
        return self.inputs["pixel_values"]

    @property
    def patch_grids(self) -> list[tuple[int, int] | None]:
        """(P) rows and columns of image tokens; None where they are not just one grid."""
        return [plain_grid(views) for views in self.views]


def plain_grid(views: Sequence[View]) -> tuple[int, int] | None:
    """Rows and columns of a picture's image tokens; None where they are not just one grid."""
    if len(views) != 1 or views[0].row_ends or views[0].marks or views[0].box != WHOLE:
        return None
    return views[0].rows, views[0].columns


def inside(views: Sequence[View], box: Box) -> Tensor:
    """(tokens) bool: which image tokens of a picture have their centres in `box`; where there is none, those nearest to its centre.

    Raises ValueError for a box that is empty or leaves the picture.
    """
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise ValueError(f"box: expected 0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, got {tuple(box)}")
    found = torch.cat([view.inside(box) for view in views])
    if found.any():
        return found
    far = torch.full(found.shape, torch.inf)
    for view, its_far in zip(views, far.split([view.tokens for view in views]), strict=True):
        left, top, right, bottom = view.box
        x = left + (torch.arange(view.columns) + 0.5) / max(view.columns, 1) * (right - left) - (x0 + x1) / 2
        y = top + (torch.arange(view.rows) + 0.5) / max(view.rows, 1) * (bottom - top) - (y0 + y1) / 2
        view.shown(its_far)[:] = x.square() + y.square()[:, None]
    return far == far.min()


def heat_map(views: Sequence[View], values: Tensor) -> Tensor:
    """(rows, columns): values of a picture's image tokens (tokens) where they lie in the picture, on the grid of its finest view.

    What a token has is spread evenly over the cells it covers, and views add up. What tokens that show nothing have is left out, and what
    lies outside of the picture, where a view is a square around it.
    """
    seen = [view for view in views if view.columns]
    rows = max(1, *(round(view.rows / (view.box[3] - view.box[1])) for view in seen))
    columns = max(1, *(round(view.columns / (view.box[2] - view.box[0])) for view in seen))
    found = values.new_zeros(rows, columns)
    for view, its_values in zip(views, values.split([view.tokens for view in views]), strict=True):
        left, top, right, bottom = view.box
        down, across = _cover(rows, view.rows, top, bottom), _cover(columns, view.columns, left, right)
        shares = view.shown(its_values) / (down.sum(0)[:, None] * across.sum(0)).clamp(min=1)
        found += down.to(values) @ shares @ across.to(values).T
    return found


def _cover(cells: int, count: int, low: float, high: float) -> Tensor:
    """(cells, count) bool: which of `count` equal pieces between `low` and `high` the centre of each of `cells` pieces of 0 to 1 lies in."""
    centres = (torch.arange(cells) + 0.5) / cells
    pieces = ((centres - low) / (high - low) * count).floor()
    return pieces[:, None] == torch.arange(count)
