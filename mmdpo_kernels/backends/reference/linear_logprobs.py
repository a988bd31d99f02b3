"""`linear_logprobs` in plain PyTorch: the whole T x V logits at once."""

from __future__ import annotations

import torch
from torch import Tensor

from ..layout import accumulation_dtype
from ..logit_options import LogitOptions


def unavailable_reason(device_type: str, dtype: torch.dtype, **features: object) -> str | None:
    """None: the reference runs everywhere."""
    return None


def logit_dtype(hidden: Tensor) -> torch.dtype:
    """What logits are rounded to before they become float32."""
    return hidden.dtype


def forward(
    hidden: Tensor,  # (T, H)
    weight: Tensor,  # (V, H)
    targets: Tensor,  # (T,)
    bias: Tensor | None,  # (V,)
    options: LogitOptions,
    stats: tuple[str, ...],
) -> tuple[Tensor, dict[str, Tensor]]:
    """-> logps (T,), stats (T,) each; 0 where the target is ignored."""
    return read_off(logits_of(torch.nn.functional.linear(hidden, weight, bias), options), targets, options, stats)


def backward(
    grad_logps: Tensor,  # (T,)
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    options: LogitOptions,
    needs: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """-> gradients of hidden, weight, bias, each None where `needs` says so; weight's and bias' in float32 or wider."""
    products = torch.nn.functional.linear(hidden, weight, bias)
    grad = grad_products(grad_logps, logits_of(products, options), targets, options)
    grad_hidden = grad.to(weight.dtype) @ weight if needs[0] else None
    grad_weight = grad.T @ hidden.to(grad.dtype) if needs[1] else None
    grad_bias = grad.sum(0) if needs[2] else None
    return grad_hidden, grad_weight, grad_bias


def logits_of(products: Tensor, options: LogitOptions) -> Tensor:
    """(T, V) hidden @ weight.T + bias, rounded to the inputs' dtype as a model's own head does, -> logits in float32 or wider."""
    logits = products.to(accumulation_dtype(products.dtype)) * options.logit_scale
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    return logits / options.temperature


def read_off(logits: Tensor, targets: Tensor, options: LogitOptions, stats: tuple[str, ...]) -> tuple[Tensor, dict[str, Tensor]]:
    """What `forward` returns, from logits (T, V)."""
    used = targets != options.ignore_index
    lse = logits.logsumexp(-1)
    chosen = logits.gather(1, targets.where(used, 0)[:, None])[:, 0]
    found = {name: _stat(name, logits, lse, chosen).where(used, 0.0) for name in stats}
    return (chosen - lse).where(used, 0.0), found


def grad_products(
    grad_logps: Tensor,  # (T,)
    logits: Tensor,  # (T, V)
    targets: Tensor,  # (T,)
    options: LogitOptions,
) -> Tensor:
    """-> (T, V) gradient of hidden @ weight.T + bias, dtype of the logits. dlogits = g (onehot(target) - softmax)."""
    used = targets != options.ignore_index
    scale = grad_logps.to(logits.dtype).where(used, 0.0)
    grad = logits.softmax(-1).mul_(-scale[:, None])
    grad.scatter_add_(1, targets.where(used, 0)[:, None], scale[:, None])
    if options.softcap is not None:
        grad *= 1.0 - (logits * options.temperature / options.softcap) ** 2
    grad *= options.logit_scale / options.temperature
    return grad


def _stat(name: str, logits: Tensor, lse: Tensor, chosen: Tensor) -> Tensor:
    if name == "entropy":
        logps = logits - lse[:, None]
        probabilities = logps.exp()
        # A token that cannot come (logit -inf) adds nothing. Relative to the log-sum-exp, as large logits would round the sum.
        return torch.where(probabilities > 0, -probabilities * logps, 0.0).sum(-1)
    if name == "max_logp":
        return logits.amax(-1) - lse
    if name == "is_top1":
        return (chosen >= logits.amax(-1)).to(logits.dtype)
    return logits.mean(-1)
