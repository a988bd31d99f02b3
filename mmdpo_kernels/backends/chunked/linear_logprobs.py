"""`linear_logprobs` over chunks of rows: at most `CHUNK_ELEMENTS` logits exist at a time, in forward and in backward."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference import linear_logprobs as reference

# 64 MiB of float32 logits: large enough for efficient matrix products, small beside any model.
CHUNK_ELEMENTS = 1 << 24


def unavailable_reason(device_type: str, dtype: torch.dtype, **features: object) -> str | None:
    """None: plain PyTorch runs everywhere."""
    return None


def forward(
    hidden: Tensor,  # (T, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (T,)
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
) -> tuple[Tensor, dict[str, Tensor]]:
    """As the reference's `forward`."""
    pieces = [
        reference.forward(hidden[rows], weight, targets[rows], bias, softcap, logit_scale, temperature, ignore_index, stats)
        for rows in _chunks(hidden, weight)
    ]
    return torch.cat([logps for logps, _ in pieces]), {name: torch.cat([found[name] for _, found in pieces]) for name in stats}


def forward_with_gradient(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    """As `forward`, and the gradient (T, H) of each row's log-probability in its hidden state, in the dtype of hidden.

    A row's gradient is this times its upstream gradient, so one product with the weight in forward and one here are all there are:
    `backward` would have to make the logits again.
    """
    pieces = []
    gradient = torch.empty_like(hidden)
    for rows in _chunks(hidden, weight):
        logits = reference.logits_of(hidden[rows], weight, bias, softcap, logit_scale, temperature)
        pieces.append(reference.read_off(logits, targets[rows], ignore_index, stats))
        ones = logits.new_ones(logits.shape[0])
        products = reference.grad_products(ones, logits, targets[rows], softcap, logit_scale, temperature, ignore_index)
        gradient[rows] = products.to(weight.dtype) @ weight
    return (
        torch.cat([logps for logps, _ in pieces]),
        {name: torch.cat([found[name] for _, found in pieces]) for name in stats},
        gradient,
    )


def backward(
    grad_logps: Tensor,
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """As the reference's `backward`; weight and bias gradients are summed over chunks in float32 or wider."""
    grad_hidden = torch.empty_like(hidden)
    sums: list[Tensor | None] = [None, None]
    for rows in _chunks(hidden, weight):
        part_hidden, *parts = reference.backward(
            grad_logps[rows], hidden[rows], weight, targets[rows], bias, softcap, logit_scale, temperature, ignore_index, needs
        )
        if part_hidden is not None:
            grad_hidden[rows] = part_hidden
        sums = [part if total is None or part is None else total.add_(part) for total, part in zip(sums, parts, strict=True)]
    return grad_hidden if needs[0] else None, sums[0], sums[1]


def _chunks(hidden: Tensor, weight: Tensor) -> list[slice]:
    rows = max(1, CHUNK_ELEMENTS // weight.shape[0])
    return [slice(start, start + rows) for start in range(0, max(1, hidden.shape[0]), rows)]
