"""`load_balancing_loss`: the auxiliary loss of mixture-of-experts models, over tokens that count as often as sequences hold them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def load_balancing_loss(router_logits: Sequence[Tensor], top_k: int, weights: Tensor | None = None) -> Tensor:
    """How unevenly routers use their experts, 1 times `top_k` where all are used alike.

    Over all layers and tokens together, with w the tokens' weights, n their sum times the layers, and E experts:

    > `E * sum_e (sum_lt w_t [e is among token t's top k in layer l] / n) * (sum_lt w_t softmax(logits_lt)_e / n)`

    It is the loss of Switch Transformers (Fedus et al., arXiv 2101.03961, equations 4 to 6) for k experts a token, as transformers'
    `load_balancing_loss_func` has it, where a row of a padded batch has weight 1 or 0. A token of a token tree is routed once and stands for as
    many tokens as there are sequences that hold it (`TokenTree.sequence_counts`): with these weights the tree's loss and gradients are those of
    its sequences by themselves. Gradients go through the probabilities; the counts have none.

    In PyTorch, for one layer and weights of 1:

        p = logits.softmax(-1)
        loss = E * (F.one_hot(p.topk(k).indices, E).sum(1).double().mean(0) * p.mean(0)).sum()

    Args:
        router_logits: per layer (T, E), any floating-point dtype.
        top_k: experts a token takes.
        weights: (T,) of 0 or more, in the order of the rows; None: 1 each.

    Returns:
        Scalar, float32, or float64 for float64 logits.

    Raises:
        ValueError: no logits, or `top_k` or `weights` that do not fit them.
    """
    if not router_logits:
        raise ValueError("load_balancing_loss: expected the router logits of one layer or more, got none")
    sums = RoutingSums(top_k, weights)
    for logits in router_logits:
        sums.add(logits)
    return sums.loss()


class RoutingSums:
    """What `load_balancing_loss` adds up over layers, which a forward hands over one by one. The arguments are its own."""

    def __init__(self, top_k: int, weights: Tensor | None) -> None:
        self.top_k = top_k
        self.weights = None if weights is None else weights.flatten()
        self.counts: Tensor | None = None
        """(E,): how often each expert was taken."""
        self.probabilities: Tensor | None = None
        """(E,): probabilities added up."""
        self.rows: Tensor | None = None
        """Scalar: weights added up."""

    def add(self, logits: Tensor) -> None:
        """Take in a layer's logits (T, E). ValueError where they do not fit `top_k` or the weights."""
        weights = self.weights_of(logits)
        probabilities = logits.to(weights.dtype).softmax(-1)
        taken = probabilities.detach().topk(self.top_k, dim=-1).indices
        counts = weights.new_zeros(logits.shape[1]).scatter_add(0, taken.flatten(), weights.repeat_interleave(self.top_k))
        summed, rows = weights @ probabilities, weights.sum()
        self.counts = counts if self.counts is None else self.counts + counts
        self.probabilities = summed if self.probabilities is None else self.probabilities + summed
        self.rows = rows if self.rows is None else self.rows + rows

    def weights_of(self, logits: Tensor) -> Tensor:
        """(T,) weights of a layer's tokens in the dtype of the loss. ValueError where these do not fit."""
        if logits.ndim != 2 or not logits.is_floating_point() or not 1 <= self.top_k <= logits.shape[-1]:
            raise ValueError(
                f"load_balancing_loss: expected router logits (tokens, experts) with {self.top_k} experts or more, got {logits.dtype} "
                f"{tuple(logits.shape)}"
            )
        wide = torch.promote_types(logits.dtype, torch.float32)
        if self.weights is None:
            return logits.new_ones(len(logits), dtype=wide)
        if len(self.weights) != len(logits):
            raise ValueError(
                f"load_balancing_loss: expected a weight for each of {len(logits)} rows of router logits, got {len(self.weights)}"
            )
        return self.weights.to(logits.device, wide)

    def loss(self) -> Tensor:
        """The loss of what was taken in. ValueError where that is nothing."""
        if self.counts is None or self.probabilities is None or self.rows is None:
            raise ValueError("load_balancing_loss: no router ran; its layers were left out of the forward")
        return len(self.counts) * (self.counts / self.rows * (self.probabilities / self.rows)).sum()

    def gradient(self, logits: Tensor) -> Tensor:
        """(T, E) gradient of `loss()` for a layer's logits, in their dtype widened to the loss's, once all layers are taken in."""
        if self.counts is None or self.rows is None:
            raise ValueError("load_balancing_loss: no router ran; its layers were left out of the forward")
        weights = self.weights_of(logits)
        probabilities = logits.to(weights.dtype).softmax(-1)
        shares = self.counts * (len(self.counts) / self.rows**2)
        centred = shares - (probabilities @ shares)[:, None]
        return weights[:, None] * probabilities * centred
