"""`image_segments`: which picture, or which region of a picture, each image token belongs to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def image_segments(
    input_ids: Tensor,  # (B, S)
    image_token_id: int,
    tokens_per_image: Sequence[Sequence[int]],
    *,
    regions: Sequence[Sequence[int] | Tensor | None] | None = None,
    patch_grids: Sequence[Sequence[int] | None] | None = None,
) -> Tensor:
    """Segment of each token for `attention_mass`, `tree_attention` and `record_attention`.

    Pictures are told apart by their token counts, never by runs of image tokens: adjacent pictures have no text between them.

    Args:
        input_ids: (B, S) integer.
        image_token_id: id of the placeholder that stands for one image feature.
        tokens_per_image: per row, the number of image tokens of each of its pictures, in order.
        regions: per row None, or `[row0, col0, row1, col1]`, half-open, in patches of the row's only picture: tokens inside are segment 0,
            the picture's other tokens segment 1 (a collage cell, a pasted picture). Or bool, one entry an image token of the row: where
            its picture is not one grid of them.
        patch_grids: per row `[rows, cols]` of that picture; needed where `regions` is a rectangle.

    Returns:
        (B, S) int32; index of the picture within its row, or region 0/1; -1 for tokens of no picture.

    Raises:
        ValueError: counts that do not add up to the row's image tokens, or a region that does not fit its grid. The row is named.
    """
    if input_ids.ndim != 2:
        raise ValueError(f"image_segments: input_ids must have shape (B, S), got {tuple(input_ids.shape)}")
    for name, value in (("tokens_per_image", tokens_per_image), ("regions", regions), ("patch_grids", patch_grids)):
        if value is not None and len(value) != input_ids.shape[0]:
            raise ValueError(f"image_segments: {name} must have one entry a row ({input_ids.shape[0]}), got {len(value)}")
    segments = torch.full(input_ids.shape, -1, dtype=torch.int32, device=input_ids.device)
    is_image = input_ids == image_token_id
    found = is_image.sum(1).tolist()
    for row, counts in enumerate(tokens_per_image):
        if sum(counts) != found[row]:
            raise ValueError(
                f"image_segments: row {row} has {found[row]} image tokens (id {image_token_id}), "
                f"tokens_per_image[{row}]={list(counts)} adds up to {sum(counts)}"
            )
        region = None if regions is None else regions[row]
        if isinstance(region, Tensor):
            if region.dtype != torch.bool or region.shape != (found[row],):
                raise ValueError(
                    f"image_segments: regions[{row}] must be bool ({found[row]},), one entry an image token, got {region.dtype} "
                    f"{tuple(region.shape)}"
                )
            ids = torch.where(region, 0, 1)
        elif region is None:
            ids = torch.arange(len(counts)).repeat_interleave(torch.tensor(list(counts), dtype=torch.long))
        else:
            ids = _region_ids(row, counts, region, None if patch_grids is None else patch_grids[row])
        segments[row, is_image[row]] = ids.to(segments)
    return segments


def _region_ids(row: int, counts: Sequence[int], region: Sequence[int], grid: Sequence[int] | None) -> Tensor:
    if len(counts) != 1 or grid is None or grid[0] * grid[1] != counts[0]:
        raise ValueError(
            f"image_segments: regions[{row}] needs one picture whose tokens fill patch_grids[{row}]; "
            f"got token counts {list(counts)} and grid {None if grid is None else list(grid)}"
        )
    row0, col0, row1, col1 = region
    if not (0 <= row0 < row1 <= grid[0] and 0 <= col0 < col1 <= grid[1]):
        raise ValueError(f"image_segments: regions[{row}]={list(region)} must be a non-empty rectangle within grid {list(grid)}")
    ids = torch.ones(grid[0], grid[1], dtype=torch.int32)
    ids[row0:row1, col0:col1] = 0
    return ids.flatten()
