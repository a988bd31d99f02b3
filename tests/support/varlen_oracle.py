"""Variable-length attention in plain PyTorch, as flash attention's documentation says of its arguments."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mmdpo_kernels.backends.varlen.library import Options
from mmdpo_kernels.backends.varlen.plan import Call


def sequence_scores(query: Tensor, key: Tensor, call: Call, options: Options) -> Iterator[tuple[slice, slice, Tensor]]:
    """Per sequence its queries, its keys, and scores (Hq, Rq, Rk): what flash attention's documentation says of the arguments."""
    left, right = options.sides(call)
    for n in range(len(call.query_starts) - 1):
        q, k = (slice(*starts[n : n + 2].tolist()) for starts in (call.query_starts, call.key_starts))
        expanded = key[k].repeat_interleave(query.shape[1] // key.shape[1], dim=1)
        scores = options.scale * torch.einsum("qhd,khd->hqk", query[q], expanded)
        if options.softcap is not None:
            scores = options.softcap * torch.tanh(scores / options.softcap)
        num_queries, num_keys = scores.shape[1:]
        assert 0 < num_queries <= call.max_queries and 0 < num_keys <= call.max_keys
        # Where a query stands among the keys, the last one at the last key.
        offset = torch.arange(num_keys) - (torch.arange(num_queries) + num_keys - num_queries)[:, None]
        hidden = ((right >= 0) & (offset > right)) | ((left >= 0) & (offset < -left))
        yield q, k, scores.masked_fill(hidden, float("-inf"))


def oracle_forward(query: Tensor, key: Tensor, value: Tensor, call: Call, options: Options) -> tuple[Tensor, Tensor]:
    output, lse = torch.full_like(query, float("nan")), query.new_full((query.shape[1], query.shape[0]), float("nan"))
    for q, k, scores in sequence_scores(query, key, call, options):
        values = value[k].repeat_interleave(query.shape[1] // value.shape[1], dim=1)
        output[q] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values)
        lse[:, q] = scores.logsumexp(-1)
    return output, lse


def oracle_backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, output: Tensor, lse: Tensor, call: Call, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """As the libraries do: from output and lse given, dscores = P (dP - rowsum(dO output)), without another softmax."""
    grads = torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    group = query.shape[1] // key.shape[1]
    for q, k, scores in sequence_scores(query, key, call, options):
        p = torch.exp(scores - lse[:, q, None])
        grads[2][k] += torch.einsum("hqk,qhd->khd", p, grad[q]).unflatten(1, (-1, group)).sum(2)
        grad_p = torch.einsum("qhd,khd->hqk", grad[q], value[k].repeat_interleave(group, dim=1))
        grad_scores = options.scale * p * (grad_p - (grad[q] * output[q]).sum(-1).T[..., None])
        if options.softcap is not None:
            grad_scores *= 1 - (scores.masked_fill(scores.isinf(), 0.0) / options.softcap) ** 2
        grads[0][q] += torch.einsum("hqk,khd->qhd", grad_scores, key[k].repeat_interleave(group, dim=1))
        grads[1][k] += torch.einsum("hqk,qhd->khd", grad_scores, query[q]).unflatten(1, (-1, group)).sum(2)
    return grads
