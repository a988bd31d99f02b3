"""What a call of an attention op asks for beside its head vectors: one tuple an op, which ops make and backends take."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TreeAttentionCall(NamedTuple):
    """`tree_attention` of query (B, Hq, S, D), key (B, Hkv, S, D) and value (B, Hkv, S, Dv)."""

    tree_end: Tensor | None
    """(B, S) integer; None: causal."""
    segments: Tensor | None
    """(B, S) integer, -1 = none; None: no mass."""
    num_segments: int
    scale: float
    softcap: float | None
    window: int | None
    reach: Tensor | None = None
    """(B, S) integer, by query; None: a query sees no later key."""


class AttentionMassCall(NamedTuple):
    """`attention_mass` of query_rows (B, Hq, R, D) and key (B, Hkv, S, D)."""

    segments: Tensor
    """(B, S) integer, -1 = none."""
    row_positions: Tensor
    """(B, R) integer, -1 = unused row."""
    num_segments: int
    tree_end: Tensor | None
    """(B, S) integer; None: causal."""
    lse: Tensor | None
    """(B, Hq, R); None: not known."""
    scale: float
    softcap: float | None
    window: int | None
    reduce: str | None
    """None, "mean" or "tokens"."""
    reach: Tensor | None = None
    """(B, S) integer, by packed index and not by row; None: a row sees no later key."""
