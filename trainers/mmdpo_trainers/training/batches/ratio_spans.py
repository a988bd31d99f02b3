"""Where the attention ratios of a batch's records are read off recorded masses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mmdpo_kernels import image_segments
from mmdpo_trainers.answers.attention_ratios import REGION_FORMATS, region_on
from mmdpo_trainers.data.pair_records import record_target
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.models.families import EncodedImages, View, plain_grid
from mmdpo_trainers.training.batches.examples import Example


@dataclass(frozen=True)
class RatioSpan:
    """Where the attention ratio of one record is read off recorded masses (B, N)."""

    format: str
    row: int
    """Batch row."""
    first: int
    """Its first segment."""
    count: int
    """Its number of segments: pictures, or the asked-about region and the rest."""
    target: int
    """The asked-about one among them."""

    def ratio(self, mass: Tensor) -> float | None:
        """Share in [0, 1] of the attention on the record's pictures that goes to the asked-about one; None: they get none."""
        mine = mass[self.row, self.first : self.first + self.count]
        total = float(mine.sum())
        return None if total == 0 else float(mine[self.target]) / total


class RatioSpans:
    """Segments and query rows of a batch of token ids (B, S), filled record by record."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.segments = torch.full(shape, -1, dtype=torch.int32)
        self.recorded_rows = torch.zeros(shape, dtype=torch.bool)
        self.spans: list[RatioSpan] = []

    def add(self, example: Example, encoded: EncodedImages | None, row: int, columns: Tensor, response_rows: Tensor) -> None:
        """Give a record's pictures segments of their own, where it has an attention ratio, and mark its response's rows.

        columns: (P,) of the record's prompt in batch row `row`; response_rows: those that predict its chosen response.
        """
        found = segments_of(example, encoded)
        if found is None:
            return
        its_segments, count, target = found
        is_image_part = its_segments >= 0
        if bool((self.segments[row, columns[is_image_part]] >= 0).any()):
            # The tree shares these pictures with an earlier record, whose rows they are recorded for.
            return
        first = int(self.segments[row].max()) + 1
        self.segments[row, columns[is_image_part]] = its_segments[is_image_part] + first
        self.recorded_rows[row, response_rows] = True
        self.spans.append(RatioSpan(str(example.record.get("format") or "sequence"), row, first, count, target))


def segments_of(example: Example, encoded: EncodedImages | None) -> tuple[Tensor, int, int] | None:
    """Segment of each prompt token, number of segments, and which one is asked about; None: nothing to tell apart."""
    record = example.record
    if encoded is None or not example.pictures:
        return None
    boxed = record.get("box") is not None and record.get("format") in REGION_FORMATS
    in_image = boxed or record.get("region") is not None
    target = None if in_image else record_target(record)
    if not in_image and target is None:
        return None
    if in_image and not encoded.views[example.pictures[0]]:
        # Nothing is known of where its tokens lie.
        return None
    counts = [encoded.tokens[picture] for picture in example.pictures]
    # Feature rows tell image tokens from text without the model's image token.
    kinds = torch.from_numpy(np.where(example.sequences[0].feature_rows >= 0, 1, 0))[None]
    try:
        views = encoded.views[example.pictures[0]]
        region = _region(example, views) if in_image else None
        found = image_segments(kinds, 1, [counts], regions=[region], patch_grids=[plain_grid(views)])[0]
    except (TypeError, ValueError) as error:
        raise DataError(f"record {example.name}: {error}") from error
    return (found, 2, 0) if in_image else (found, len(counts), target or 0)


def _region(example: Example, views: Sequence[View]) -> list[int] | Tensor:
    """The asked-about part of the record's one picture."""
    region = region_on(example.record, views)
    if region is None:
        grid = plain_grid(views)
        mine = "pictures that are tiled" if grid is None else f"{grid[0]}x{grid[1]}"
        raise ValueError(
            f"region is on {example.record.get('patch_grid')} patches, and the model has {mine}; add `box`, or drop region"
        )
    return region
