"""Which keys the counted rows of an attention call see, as calls of `attention_mass` take it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..tree_mask import visible_rows


def positions_of(rows: Tensor) -> Tensor:
    """(B, S) bool -> (B, R) indices of the true entries, in order, padded with -1."""
    longest = max(1, int(rows.sum(1).max())) if rows.numel() else 1
    # A stable sort of "not wanted" brings the wanted indices to the front in order.
    order = torch.argsort(~rows, dim=1, stable=True)[:, :longest]
    return order.masked_fill(~rows.gather(1, order), -1)


def tree_calls(
    mask: Tensor,  # (B or 1, 1, L, >= K)
    rows: Tensor,  # (B, R)
    positions: Tensor,  # (B, R)
    length: int,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The counted rows of a mask as calls of `attention_mass`: rows, their `tree_end` (B, K), their positions.

    Padding, windows and packed sequences follow the tree rule, each key being seen up to one row: one call. Other masks, such as
    pictures that see themselves both ways, take a call a row.
    """
    seen = _seen(mask, rows, length)
    index = torch.arange(length, dtype=torch.int32, device=mask.device)
    if rows.shape[1] > 1:
        last = torch.where(seen, positions[:, :, None], -1).amax(1)
        tree_end = torch.maximum(last + 1, index).to(torch.int32)
        if torch.equal(visible_rows(positions, tree_end), seen):
            yield slice(None), tree_end, positions
            return
    for row in range(rows.shape[1]):
        # A row alone stands after all keys and sees those that are not ended.
        its_positions = torch.where(positions[:, row : row + 1] >= 0, length - 1, -1)
        yield slice(row, row + 1), torch.where(seen[:, row], length, index).to(torch.int32), its_positions


def cross_calls(
    mask: Tensor | None,  # (B or 1, 1, L, K)
    rows: Tensor,  # (B, R)
    length: int,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """As `tree_calls`, for keys without an order: all rows that see the same keys, as those behind the last picture do, in one call."""
    used = rows >= 0
    seen = used[:, :, None].expand(-1, -1, length) if mask is None else _seen(mask, rows, length)
    index = torch.arange(length, dtype=torch.int32, device=rows.device)
    either = seen.any(1, keepdim=True)
    alike = bool((seen == (either & used[:, :, None])).all())
    for part in [slice(None)] if alike else [slice(row, row + 1) for row in range(rows.shape[1])]:
        visible = seen[:, part].any(1)
        yield part, torch.where(visible, length, index).to(torch.int32), torch.where(used[:, part], length - 1, -1)


def _seen(mask: Tensor, rows: Tensor, length: int) -> Tensor:
    """(B, R, K) bool: which keys each counted row sees; none where the row is unused."""
    if mask.shape[1] != 1:
        raise ValueError(f"record_attention: an attention mask of one head is needed, got {tuple(mask.shape)}")
    chosen = mask[:, 0, :, :length].expand(rows.shape[0], -1, -1)
    chosen = chosen.gather(1, rows.clamp(min=0)[:, :, None].expand(-1, -1, length))
    if chosen.dtype != torch.bool:
        lowest = torch.finfo(chosen.dtype).min / 2
        if not bool(((chosen == 0) | (chosen < lowest)).all()):
            raise ValueError(
                "record_attention: an additive attention mask must hold 0 and the lowest number only, got other values"
            )
        chosen = chosen == 0
    return chosen & (rows >= 0)[:, :, None]
