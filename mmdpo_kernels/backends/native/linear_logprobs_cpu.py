"""`linear_logprobs` on the CPU, tile by tile of the vocabulary: a product by PyTorch, a fold in C++, a product by PyTorch.

As in flash attention a row's exponentials are relative to the largest logit so far, and what was summed before shrinks where that
rises. So the logits that exist at a time are one tile's, each is written once and overwritten by its coefficient, and both products
read a tile of the weight while it is in the cache. Sums are float32. So are products: half precision, whose products PyTorch makes
slowly on a CPU, is widened, which is exact. Where the CPU has instructions for products of bfloat16 these are taken, and logits are
rounded to it, as in a model's own head; so are coefficients, and what a tile adds to a gradient.

u = 2 T H V: forward 1u, forward_with_gradient 2u, backward_kept 1u, backward 3u, or 2u without a gradient of weight and bias.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..logit_options import LogitOptions
from .extension import address, load, module

OP = "linear_logprobs"

# Vocabulary entries of a tile and rows of a block: large enough for products at full speed, also where other processes want the
# cores and threads so wait for one another at the end of each product, and 8 MiB of logits at most.
TILE_COLUMNS = 2048
BLOCK_ROWS = 1024
# Coefficients that `backward` holds at a time, of a block of rows over the whole vocabulary: 128 MiB in float32.
BACKWARD_ELEMENTS = 1 << 25
# Small probabilities underflow in float16: coefficients, of which the largest is 1, are made this much larger.
FLOAT16_SCALE = 2.0**15


def forward(
    hidden: Tensor,  # (T, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (T,)
    bias: Tensor | None,  # (V,)
    options: LogitOptions,
    stats: tuple[str, ...],
) -> tuple[Tensor, dict[str, Tensor]]:
    """-> log-probabilities (T,) and statistics (T,) each, 0 where the target is ignored.

    At most `torch.get_num_threads()` threads work.
    """
    logps, found, _ = forward_with_gradient(hidden, weight, targets, bias, options, stats, 0, None)
    return logps, found


def forward_with_gradient(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    options: LogitOptions,
    stats: tuple[str, ...],
    gradient_rows: int,
    kept: list[Tensor] | None,
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """As `forward`, and d log-probability / d hidden (gradient_rows, H) of the first rows; all in float32.

    Rows after those are scored in the same products. kept: as `empty_kept` makes it for the first rows, filled for `backward_kept`.
    """
    gradient = hidden.new_zeros(gradient_rows, hidden.shape[1], dtype=torch.float32)
    bias = None if bias is None else bias.float().contiguous()
    pieces = []
    for start in range(0, max(hidden.shape[0], 1), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        room = None if kept is None else _Kept(kept[0][rows], kept[1][:, rows], kept[2][:, rows])
        block = _Block(
            hidden[rows].to(logit_dtype(hidden)),
            targets[rows].contiguous(),
            bias,
            options,
            "entropy" in stats,
            gradient[rows],
            _scale(hidden),
        )
        block.fold(weight, room)
        block.finish_gradient(weight, room)
        pieces.append([block.logps(), *(block.stat(name, weight.shape[0]) for name in stats)])
    logps, *found = (torch.cat(values) for values in zip(*pieces, strict=True))
    return logps, dict(zip(stats, found, strict=True)), gradient


def logit_dtype(hidden: Tensor) -> torch.dtype:
    """Of products, and so of logits: float32, or bfloat16 where the CPU multiplies that."""
    return torch.bfloat16 if hidden.dtype == torch.bfloat16 and _multiplies_bfloat16() else torch.float32


def empty_kept(hidden: Tensor, weight: Tensor) -> list[Tensor]:
    """Room for the coefficients of all rows, the largest logit of each row when each tile was folded, and two factors a row."""
    rows, vocabulary = hidden.shape[0], weight.shape[0]
    tiles = (vocabulary + TILE_COLUMNS - 1) // TILE_COLUMNS
    return [
        hidden.new_empty(rows, vocabulary),
        hidden.new_empty(tiles, rows, dtype=torch.float32),
        hidden.new_empty(2, rows, dtype=torch.float64),
    ]


def backward_kept(
    grad_logps: Tensor,  # (T,)
    kept: list[Tensor],
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    options: LogitOptions,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None]:
    """-> gradients of weight and bias in float32, None where `needs` says so."""
    sums = _HeadGradients(weight, options, needs)
    sums.add(grad_logps, _Kept(*kept), hidden, targets)
    return sums.weight, sums.bias


def backward(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    options: LogitOptions,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """-> gradients of hidden, weight, bias in float32, None where `needs` says so; the logits are made again."""
    rows = hidden.shape[0]
    sums = _HeadGradients(weight, options, needs)
    head = needs[1] or needs[2]
    size = max(min(BACKWARD_ELEMENTS // weight.shape[0], BLOCK_ROWS), 1) if head else BLOCK_ROWS
    grad_hidden = hidden.new_empty(hidden.shape, dtype=torch.float32) if needs[0] else None
    kept = empty_kept(hidden[:size], weight) if head else None
    for start in range(0, rows, size):
        block = slice(start, min(start + size, rows))
        count = block.stop - start
        room = None if kept is None else [kept[0][:count], kept[1][:, :count], kept[2][:, :count]]
        _, _, gradient = forward_with_gradient(hidden[block], weight, targets[block], bias, options, (), count, room)
        if grad_hidden is not None:
            torch.mul(gradient, grad_logps[block, None], out=grad_hidden[block])
        if room is not None:
            sums.add(grad_logps[block], _Kept(*room), hidden[block], targets[block])
    return grad_hidden, sums.weight, sums.bias


@dataclass(frozen=True)
class _Kept:
    """What the gradients of weight and bias need of rows, R of them."""

    coefficients: Tensor
    """(R, V), in the dtype of hidden: of each tile, relative to the peak that the row had then; 0 for the target."""
    peaks: Tensor
    """(tiles, R) float32: those peaks."""
    factors: Tensor
    """(2, R) float64: log-sum-exp, inf where the target is ignored; d log-probability / d (logit of the target)."""


class _Block:
    """Rows, folded over the vocabulary; the first of them, as many as `gradient` has, get a gradient."""

    def __init__(
        self,
        hidden: Tensor,  # (R, H) in the dtype of logits
        targets: Tensor,  # (R,) int64
        bias: Tensor | None,  # (V,) float32
        options: LogitOptions,
        entropy: bool,
        gradient: Tensor,  # (G, H) float32, zeros
        scale: float,
    ) -> None:
        # The addresses of these are in `_args`.
        self._hidden, self._targets, self._gradient, self._bias = hidden, targets, gradient, bias
        self._options, self._scale = options, scale
        self._native = module(OP)
        self._used = targets != options.ignore_index
        self._dtype = self._native.dtypes.index(str(hidden.dtype).removeprefix("torch."))
        self._state = hidden.new_zeros(len(self._native.logit_states), hidden.shape[0], dtype=torch.float64)
        self._peak, self._others, self._target, self._deviation, self._sum = self._state
        self._peak.fill_(float("-inf"))
        self._args = self._native.LogitRowsArgs(
            rows=hidden.shape[0],
            coefficient_rows=gradient.shape[0],
            targets=targets.data_ptr(),
            ignore_index=options.ignore_index,
            bias=address(bias),
            softcap=options.softcap or 0.0,
            logit_scale=options.logit_scale,
            temperature=options.temperature,
            coefficient_scale=scale,
            entropy=entropy,
            state=self._state.data_ptr(),
            accumulator=gradient.data_ptr(),
            hidden_size=gradient.shape[1],
        )

    def fold(self, weight: Tensor, kept: _Kept | None) -> None:
        """Goes over the vocabulary. Afterwards `gradient` holds sums of coefficient times row of the weight."""
        rows, count = self._hidden.shape[0], self._gradient.shape[0]
        vocabulary = weight.shape[0]
        buffer = self._hidden.new_empty(rows * min(TILE_COLUMNS, vocabulary))
        heads = _Rows(weight, self._hidden.dtype)
        product = _Sum(self._gradient, self._hidden.dtype)
        for tile, first in enumerate(range(0, vocabulary, TILE_COLUMNS)):
            columns = slice(first, min(first + TILE_COLUMNS, vocabulary))
            head = heads.rows(columns)
            size = columns.stop - first
            logits = buffer[: rows * size].view(rows, size)
            torch.mm(self._hidden, head.T, out=logits)
            self._native.fold_logit_tile(
                self._args,
                logits=logits.data_ptr(),
                dtype=self._dtype,
                stride=size,
                first=first,
                count=size,
                num_threads=torch.get_num_threads(),
            )
            if count:
                product.add(logits[:count], head)
            if kept is not None:
                kept.peaks[tile] = self._peak[:count]
                kept.coefficients[:, columns] = logits[:count]

    def logps(self) -> Tensor:
        return self._where_used(self._target - self._peak - self._total().log())

    def stat(self, name: str, vocabulary: int) -> Tensor:
        return self._where_used(self._stat(name, vocabulary))

    def finish_gradient(self, weight: Tensor, kept: _Kept | None) -> None:
        """From the sums of `fold` to the gradient of the log-probabilities, in place."""
        count = self._gradient.shape[0]
        used, total, target = self._used[:count], self._total()[:count], self._target[:count]
        softcap, logit_scale, temperature, _ = self._options
        slope = logit_scale / temperature
        # 1 - p(target) from what is not the target: a likely target's keeps all its digits.
        at_target = slope * self._others[:count] / total
        if softcap is not None:
            at_target *= 1.0 - (target * temperature / softcap) ** 2
        at_target = at_target.where(used, 0.0)
        shrink = (-slope / self._scale / total).where(used, 0.0)
        rows = weight[self._targets[:count].where(used, 0)].float()
        self._gradient.mul_(shrink.float()[:, None]).addcmul_(rows, at_target.float()[:, None])
        if kept is not None:
            kept.factors[0] = (self._peak[:count] + total.log()).where(used, float("inf"))
            kept.factors[1] = at_target

    def _own(self) -> Tensor:
        """The target's exponential."""
        return (self._target - self._peak).exp()

    def _total(self) -> Tensor:
        return self._others + self._own()

    def _stat(self, name: str, vocabulary: int) -> Tensor:
        if name == "entropy":
            own = self._own()
            # A target that cannot come (logit -inf) adds nothing.
            deviation = self._deviation + torch.where(own > 0, own * (self._target - self._peak), 0.0)
            return self._total().log() - deviation / self._total()
        if name == "max_logp":
            return -self._total().log()
        if name == "is_top1":
            return (self._target >= self._peak).double()
        return self._sum / vocabulary

    def _where_used(self, values: Tensor) -> Tensor:
        return values.where(self._used, 0.0).float()


class _HeadGradients:
    """Sums over blocks of rows of what each adds to the gradients of weight and bias."""

    def __init__(self, weight: Tensor, options: LogitOptions, needs: tuple[bool, bool, bool]) -> None:
        self._slope = options.logit_scale / options.temperature
        self._ignore_index = options.ignore_index
        self.weight = weight.new_zeros(weight.shape, dtype=torch.float32) if needs[1] else None
        self.bias = weight.new_zeros(weight.shape[0], dtype=torch.float32) if needs[2] else None

    def add(self, grad_logps: Tensor, kept: _Kept, hidden: Tensor, targets: Tensor) -> None:
        """grad_logps: (R,), hidden: (R, H), targets: (R,)."""
        hidden, grad = hidden.to(logit_dtype(hidden)), grad_logps.double()
        vocabulary = kept.coefficients.shape[1]
        lse, at_target = kept.factors
        parts = _Rows(kept.coefficients.T, hidden.dtype)
        scaled = torch.empty_like(hidden)
        for tile, first in enumerate(range(0, vocabulary, TILE_COLUMNS)):
            columns = slice(first, min(first + TILE_COLUMNS, vocabulary))
            coefficients = parts.rows(columns)
            factors = (-self._slope / _scale(kept.coefficients) * grad * (kept.peaks[tile] - lse).exp()).float()
            if self.weight is not None:
                torch.mul(hidden, factors[:, None], out=scaled)
                _Sum(self.weight[columns], hidden.dtype).add(coefficients, scaled)
            if self.bias is not None:
                self.bias[columns].addmv_(coefficients.float(), factors)
        # Ignored rows add 0 to row 0.
        where, factors = targets.where(targets != self._ignore_index, 0), (grad * at_target).float()
        if self.weight is not None:
            self.weight.index_add_(0, where, hidden.float() * factors[:, None])
        if self.bias is not None:
            self.bias.index_add_(0, where, factors)


class _Rows:
    """Rows of a matrix in a dtype: themselves, or a copy that the next ones overwrite."""

    def __init__(self, matrix: Tensor, dtype: torch.dtype) -> None:
        self._matrix = matrix
        # The copy is laid out as its source, rows or columns dense: then it is one of consecutive elements to consecutive elements.
        self._buffer = None if matrix.dtype == dtype else torch.empty_like(matrix[:TILE_COLUMNS], dtype=dtype)

    def rows(self, rows: slice) -> Tensor:
        part = self._matrix[rows]
        return part if self._buffer is None else self._buffer[: part.shape[0]].copy_(part)


class _Sum:
    """A sum of products in float32, each of them rounded to the dtype of its factors."""

    def __init__(self, sums: Tensor, dtype: torch.dtype) -> None:
        self._sums = sums
        self._buffer = None if sums.dtype == dtype else torch.empty_like(sums, dtype=dtype)

    def add(self, left: Tensor, right: Tensor) -> None:
        if self._buffer is None:
            self._sums.addmm_(left, right)
        else:
            self._sums.add_(torch.mm(left, right, out=self._buffer))


def _scale(hidden: Tensor) -> float:
    """What coefficients are kept times, a power of two."""
    return FLOAT16_SCALE if hidden.dtype == torch.float16 else 1.0


def _multiplies_bfloat16() -> bool:
    native = load()
    return not isinstance(native, str) and native.multiplies_bfloat16()
