"""`linear_logprobs` in plain PyTorch: the whole T x V logits at once."""

from __future__ import annotations

import torch
from torch import Tensor


def unavailable_reason(device_type: str, dtype: torch.dtype, **features: object) -> str | None:
    """None: the reference runs everywhere."""
    return None


def logits_of(
    hidden: Tensor,  # (T, H)
    weight: Tensor,  # (V, H)
    bias: Tensor | None,  # (V,)
    softcap: float | None,
    logit_scale: float,
    temperature: float,
) -> Tensor:
    """-> (T, V) float32 or wider. The product is rounded to the inputs' dtype first, as a model's own head does."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def forward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,  # (T,)
    bias: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
    stats: tuple[str, ...],
) -> tuple[Tensor, dict[str, Tensor]]:
    """-> logps (T,), stats (T,) each; 0 where the target is ignored."""
    return read_off(logits_of(hidden, weight, bias, softcap, logit_scale, temperature), targets, ignore_index, stats)


def read_off(logits: Tensor, targets: Tensor, ignore_index: int, stats: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """What `forward` returns, from logits (T, V)."""
    used = targets != ignore_index
    lse = logits.logsumexp(-1)
    chosen = logits.gather(1, targets.where(used, 0)[:, None])[:, 0]
    found = {name: _stat(name, logits, lse, chosen).where(used, 0.0) for name in stats}
    return (chosen - lse).where(used, 0.0), found


def backward(
    grad_logps: Tensor,  # (T,)
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
    """-> gradients of hidden, weight, bias, each None where `needs` says so."""
    logits = logits_of(hidden, weight, bias, softcap, logit_scale, temperature)
    grad = grad_products(grad_logps, logits, targets, softcap, logit_scale, temperature, ignore_index)
    grad_hidden = (grad.to(weight.dtype) @ weight).to(hidden.dtype) if needs[0] else None
    grad_weight = grad.T @ hidden.to(grad.dtype) if needs[1] else None
    grad_bias = grad.sum(0) if needs[2] else None
    return grad_hidden, grad_weight, grad_bias


def grad_products(
    grad_logps: Tensor,  # (T,)
    logits: Tensor,  # (T, V)
    targets: Tensor,  # (T,)
    softcap: float | None,
    logit_scale: float,
    temperature: float,
    ignore_index: int,
) -> Tensor:
    """-> (T, V) gradient of hidden @ weight.T + bias, dtype of the logits. dlogits = g (onehot(target) - softmax)."""
    used = targets != ignore_index
    scale = grad_logps.to(logits.dtype).where(used, 0.0)
    grad = logits.softmax(-1).mul_(-scale[:, None])
    grad.scatter_add_(1, targets.where(used, 0)[:, None], scale[:, None])
    if softcap is not None:
        grad *= 1.0 - (logits * temperature / softcap) ** 2
    grad *= logit_scale / temperature
    return grad


def _stat(name: str, logits: Tensor, lse: Tensor, chosen: Tensor) -> Tensor:
    if name == "entropy":
        probabilities = logits.softmax(-1)
        # A token that cannot come (logit -inf) adds nothing.
        return lse - torch.where(probabilities > 0, probabilities * logits, 0.0).sum(-1)
    if name == "max_logp":
        return logits.amax(-1) - lse
    if name == "is_top1":
        return (chosen >= logits.amax(-1)).to(logits.dtype)
    return logits.mean(-1)
