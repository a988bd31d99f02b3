"""Calls of `attention_mass` and the accuracy they are held to, shared by the tests of the C++ and the CUDA kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from trees import random_tree_end, with_reach

from mmdpo_kernels.backends.calls import AttentionMassCall
from mmdpo_kernels.backends.reference.scores import capped_scores
from mmdpo_kernels.tree_mask import visible_rows

REDUCTIONS = (None, "mean", "tokens")


@dataclass
class Sizes:
    B: int
    Hq: int
    Hkv: int
    R: int
    S: int
    D: int


@dataclass
class Call:
    """Arguments of `forward`; `scores` and `seen` are the float64 truth behind them."""

    query_rows: Tensor
    key: Tensor
    segments: Tensor
    row_positions: Tensor
    tree_end: Tensor | None
    options: dict[str, float]
    num_segments: int = 4
    lse: Tensor | None = None
    reach: Tensor | None = None

    def arguments(self, reduce: str | None, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor, AttentionMassCall]:
        query_rows, key = (t if dtype is None else t.to(dtype) for t in (self.query_rows, self.key))
        lse = self.lse if self.lse is None or dtype is None else self.lse.to(dtype)
        options: dict[str, Any] = {"softcap": None, "window": None, "scale": key.shape[-1] ** -0.5, **self.options}
        known = (self.segments, self.row_positions, self.num_segments, self.tree_end, lse)
        return query_rows, key, AttentionMassCall(*known, reduce=reduce, reach=self.reach, **options)

    def run(self, module: object, reduce: str | None, dtype: torch.dtype | None = None) -> Tensor:
        return module.forward(*self.arguments(reduce, dtype))  # type: ignore[attr-defined]

    def run_backward(
        self, module: object, reduce: str | None, grad: Tensor, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, Tensor]:
        return module.backward(grad, *self.arguments(reduce, dtype))  # type: ignore[attr-defined]

    def largest_score(self) -> float:
        scores = self.scores()
        return scores[scores.isfinite()].abs().max().item()

    def scores(self) -> Tensor:
        """(B, Hq, R, S) float64, -inf where not visible."""
        scores = capped_scores(
            self.query_rows.double(), self.key.double(), self.key.shape[-1] ** -0.5, self.options.get("softcap")
        )
        tree_end = self.tree_end if self.tree_end is not None else torch.full_like(self.segments, self.segments.shape[1])
        seen = visible_rows(self.row_positions, tree_end, self.options.get("window"), self.reach)
        return scores.masked_fill(~seen[:, None], float("-inf"))


def make_call(
    sizes: Sizes, dtype: torch.dtype, options: dict[str, float], tree: bool = True, lse: bool = False, reach: bool = False
) -> Call:
    """Non-contiguous query and key, long segments and short ones, unused rows; with reach, pictures in the tree's nodes."""
    query = torch.randn(sizes.B, sizes.R, sizes.Hq, sizes.D).to(dtype).transpose(1, 2)
    key = (1.5 * torch.randn(sizes.B, sizes.S, sizes.Hkv, 2 * sizes.D)).to(dtype)[..., : sizes.D].transpose(1, 2)
    segments = (torch.arange(sizes.S) * 5 // sizes.S - 1).repeat(sizes.B, 1)
    segments[:, : sizes.S // 6] = torch.randint(-1, 4, (sizes.B, sizes.S // 6))
    rows = torch.randint(-1, sizes.S, (sizes.B, sizes.R))
    rows[0, 0] = sizes.S - 1
    tree_end = random_tree_end(sizes.B, sizes.S, seed=sizes.S, padding=False) if tree else None
    call = Call(query, key, segments, rows, tree_end, options)
    if reach:
        ends = torch.full((sizes.B, sizes.S), sizes.S) if tree_end is None else tree_end
        ends, call.reach = with_reach(ends, sizes.S, kind="pictures")
        call.tree_end = ends if tree else None
    call.lse = call.scores().logsumexp(-1).float() if lse else None
    return call


def assert_as_accurate(ours: Tensor, torchs: Tensor, truth: Tensor, largest_score: float) -> None:
    """|truth - ours| <= 2 |truth - torch| + one rounding step, elementwise; without the score's step for the whole tensor.

    The step is that of the score inside the exponential, which moves a probability by `eps * |score|`, and that of the result.
    """
    assert ours.dtype == torchs.dtype and ours.shape == torchs.shape
    step = torch.finfo(ours.dtype).eps * (1.0 + largest_score) * truth.abs()
    error, allowed = ours.double() - truth, torchs.double() - truth
    assert not ours.isnan().any()
    excess = error.abs() - (2 * allowed.abs() + step)
    assert not (excess > 0).any(), f"beyond the bound by {excess.max():.2e}"
    assert error.norm() <= 2 * allowed.norm() + torch.finfo(ours.dtype).eps * truth.norm()


def assert_sums_as_accurate(ours: Tensor, torchs: Tensor, truth: Tensor, largest_score: float) -> None:
    """The same for entries that are sums over keys or rows, with the step of the largest one.

    One near zero is a sum of terms of the largest's size, which plain PyTorch may hit by luck. The score's step counts twice: beside the
    probability it is in lse, or in the sum that is taken off a gradient.
    """
    assert ours.dtype == torchs.dtype and ours.shape == torchs.shape
    assert not ours.isnan().any()
    step = torch.finfo(ours.dtype).eps * (1.0 + 2.0 * largest_score) * truth.abs().max()
    error, allowed = ours.double() - truth, torchs.double() - truth
    excess = error.abs() - (2 * allowed.abs() + step)
    assert not (excess > 0).any(), f"beyond the bound by {excess.max():.2e}"
    assert error.norm() <= 2 * allowed.norm() + torch.finfo(ours.dtype).eps * truth.norm()
