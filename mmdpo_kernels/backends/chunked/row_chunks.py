"""`linear_logprobs` chunk of rows by chunk of rows: matrix products by PyTorch, rows of logits by whoever has a kernel for them.

A chunk's logits are made in one buffer, turned in place into d log-probability / d logit, and multiplied by the weight. u = 2 T H V:

    forward                  1u
    forward_with_gradient    2u; the gradient of a row is known up to its upstream factor as soon as its logits are
    backward_kept            1u, the weight's gradient from coefficients that forward kept
    backward                 3u, the logits made again
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ..layout import accumulation_dtype
from ..logit_options import LogitOptions
from .products import add_weight_gradient, logits_into, weighted_rows

Found = tuple[Tensor, dict[str, Tensor]]

# Logits that exist at a time, by device: 64 MiB of float32 on the CPU, 256 MiB of bfloat16 on a GPU, whose products want more rows.
CHUNK_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 27}
# Rows of a chunk on a GPU, where there are more, are a multiple of the tiles of its matrix products.
TILE_ROWS = 128
ALIGNMENT = 64
# Unscaled probabilities underflow in float16; its coefficients are made this large at most.
FLOAT16_EXPONENT = 13


class RowKernels(Protocol):
    """See `logit_rows`, which is one."""

    def fold(self, logits: Tensor, targets: Tensor, options: LogitOptions, stats: tuple[str, ...]) -> Found: ...

    def fold_with_gradient(
        self, logits: Tensor, targets: Tensor, options: LogitOptions, stats: tuple[str, ...], coefficient_scale: float
    ) -> Found: ...


@dataclass(frozen=True)
class RowChunks:
    """The functions of a backend of `linear_logprobs`, over row kernels."""

    kernels: RowKernels

    def forward(
        self,
        hidden: Tensor,  # (T, H)
        weight: Tensor,  # (V, H)
        targets: Tensor,  # (T,)
        bias: Tensor | None,  # (V,)
        options: LogitOptions,
        stats: tuple[str, ...],
    ) -> Found:
        """-> log-probabilities (T,) and statistics (T,) each, 0 where the target is ignored."""
        pieces = []
        for rows, logits in _chunks(hidden, weight, bias):
            pieces.append(self.kernels.fold(logits, targets[rows], options, stats))
        return _joined(pieces, hidden, stats)

    def forward_with_gradient(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        options: LogitOptions,
        stats: tuple[str, ...],
        gradient_rows: int,
        kept: list[Tensor] | None,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        """As `forward`, and d log-probability / d hidden (gradient_rows, H) of the first rows, in float32 or wider.

        Rows after those are scored in the same products. kept: as `empty_kept` makes it, filled for `backward_kept`.
        """
        scale = _coefficient_scale(hidden.dtype, options)
        gradient = hidden.new_empty(gradient_rows, hidden.shape[1], dtype=accumulation_dtype(hidden.dtype))
        pieces = []
        for rows, logits in _chunks(hidden, weight, bias, None if kept is None else kept[0]):
            # Two launches where a chunk holds both kinds; the product before them is one.
            split = min(max(gradient_rows - rows.start, 0), logits.shape[0])
            if split:
                mine = slice(rows.start, rows.start + split)
                pieces.append(self.kernels.fold_with_gradient(logits[:split], targets[mine], options, stats, scale))
                gradient[mine] = weighted_rows(logits[:split], weight).div_(scale)
            if split < logits.shape[0]:
                pieces.append(self.kernels.fold(logits[split:], targets[rows][split:], options, stats))
        return *_joined(pieces, hidden, stats), gradient

    def logit_dtype(self, hidden: Tensor) -> torch.dtype:
        """What logits are rounded to: the dtype of the product, as in a model's own head."""
        return hidden.dtype

    def empty_kept(self, hidden: Tensor, weight: Tensor) -> list[Tensor]:
        """Room for the coefficients of all rows."""
        return [_empty_rows(hidden, hidden.shape[0], weight.shape[0])]

    def backward_kept(
        self,
        grad_logps: Tensor,  # (T,)
        kept: list[Tensor],
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        options: LogitOptions,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None]:
        """-> gradients of weight and bias in float32 or wider, None where `needs` says so."""
        sums = _HeadGradients(hidden, weight, needs, _coefficient_scale(hidden.dtype, options))
        sums.add(kept[0], grad_logps, hidden)
        return sums.weight, sums.bias

    def backward(
        self,
        grad_logps: Tensor,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        bias: Tensor | None,
        options: LogitOptions,
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """-> gradients of hidden, weight, bias in float32 or wider, None where `needs` says so."""
        scale = _coefficient_scale(hidden.dtype, options)
        sums = _HeadGradients(hidden, weight, needs, scale)
        wide = accumulation_dtype(hidden.dtype)
        grad_hidden = torch.empty(hidden.shape, dtype=wide, device=hidden.device) if needs[0] else None
        for rows, logits in _chunks(hidden, weight, bias):
            self.kernels.fold_with_gradient(logits, targets[rows], options, (), scale)
            if grad_hidden is not None:
                grad_hidden[rows] = weighted_rows(logits, weight).mul_((grad_logps[rows] / scale)[:, None])
            sums.add(logits, grad_logps[rows], hidden[rows])
        return grad_hidden, sums.weight, sums.bias


class _HeadGradients:
    """Sums over chunks of what each adds to the gradients of weight and bias."""

    def __init__(self, hidden: Tensor, weight: Tensor, needs: tuple[bool, bool, bool], scale: float) -> None:
        wide = accumulation_dtype(hidden.dtype)
        self.weight = torch.zeros(weight.shape, dtype=wide, device=weight.device) if needs[1] else None
        self.bias = torch.zeros(weight.shape[0], dtype=wide, device=weight.device) if needs[2] else None
        self._scale = scale

    def add(self, coefficients: Tensor, grad_logps: Tensor, hidden: Tensor) -> None:
        """coefficients: (R, V), in the dtype of hidden (R, H); grad_logps: (R,)."""
        if coefficients.shape[0] == 0 or (self.weight is None and self.bias is None):
            return
        # float16 could hold neither the upstream gradient under a loss scale nor its product with a hidden state.
        power = torch.exp2(torch.frexp(grad_logps.abs().amax()).exponent.to(grad_logps.dtype))
        factors = (grad_logps / power)[:, None]
        if self.weight is not None:
            add_weight_gradient(self.weight, coefficients, (hidden * factors).to(hidden.dtype), power / self._scale)
        if self.bias is not None:
            self.bias += weighted_rows(factors.T.to(coefficients.dtype), coefficients)[0] * (power / self._scale)


def _chunks(hidden: Tensor, weight: Tensor, bias: Tensor | None, into: Tensor | None = None) -> Iterator[tuple[slice, Tensor]]:
    """Rows, and their hidden @ weight.T + bias; in a buffer that the next chunk overwrites, or in the rows of `into`."""
    total, vocabulary = hidden.shape[0], weight.shape[0]
    size = max(1, CHUNK_ELEMENTS.get(hidden.device.type, CHUNK_ELEMENTS["cpu"]) // vocabulary)
    if hidden.device.type == "cuda" and size > TILE_ROWS:
        size -= size % TILE_ROWS
    size = min(size, total)
    buffer = _empty_rows(hidden, size, vocabulary) if into is None else into
    for start in range(0, total, max(1, size)):
        rows = slice(start, min(start + size, total))
        logits = buffer[: rows.stop - start] if into is None else into[rows]
        logits_into(logits, hidden[rows], weight, bias)
        yield rows, logits


def _empty_rows(like: Tensor, count: int, vocabulary: int) -> Tensor:
    """(count, V). Rows begin at multiples of `ALIGNMENT` elements: products and row kernels read whole vectors of an odd vocabulary too."""
    return like.new_empty(count, -(-vocabulary // ALIGNMENT) * ALIGNMENT)[:, :vocabulary]


def _joined(pieces: list[Found], hidden: Tensor, stats: tuple[str, ...]) -> Found:
    if not pieces:
        empty = hidden.new_empty(0, dtype=accumulation_dtype(hidden.dtype))
        return empty, {name: empty.clone() for name in stats}
    return torch.cat([logps for logps, _ in pieces]), {name: torch.cat([found[name] for _, found in pieces]) for name in stats}


def _coefficient_scale(dtype: torch.dtype, options: LogitOptions) -> float:
    """A power of two."""
    if dtype != torch.float16:
        return 1.0
    return 2.0 ** (FLOAT16_EXPONENT - math.frexp(options.slope)[1])
