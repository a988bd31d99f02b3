"""`load_balancing_loss` against transformers' own, and the weights that make tokens of a tree count as often as sequences hold them."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from routing import transformers_loss

from mmdpo_kernels import TokenTree, load_balancing_loss
from mmdpo_kernels.load_balancing import RoutingSums


def layers(rows: int, experts: int = 5, count: int = 3) -> list[torch.Tensor]:
    return [torch.randn(rows, experts, dtype=torch.float64, requires_grad=True) for _ in range(count)]


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_weights_stand_for_repeated_rows(top_k: int) -> None:
    """Value and gradients; a weight of 0 is a row that the mask leaves out."""
    weights = torch.tensor([3, 1, 0, 2, 1, 0, 4])
    mine = layers(len(weights))
    theirs = [logits.detach().clone().requires_grad_() for logits in mine]
    spread = torch.repeat_interleave(torch.arange(len(weights)), weights.clamp(min=1))
    mask = (weights > 0).long()[spread]
    expected = transformers_loss(tuple(logits[spread] for logits in theirs), 5, top_k, mask)
    found = load_balancing_loss(mine, top_k, weights)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    found.backward()
    expected.backward()
    sums = RoutingSums(top_k, weights)
    for logits in mine:
        sums.add(logits.detach())
    for logits, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(logits.grad, other.grad, rtol=1e-10, atol=1e-15)
        torch.testing.assert_close(sums.gradient(logits.detach()), other.grad, rtol=1e-10, atol=1e-15)
    assert (mine[0].grad[2] == 0).all()


def test_without_weights_all_rows_count_once() -> None:
    logits = layers(6)
    torch.testing.assert_close(load_balancing_loss(logits, 2), transformers_loss(tuple(logits), 5, 2, None))
    torch.testing.assert_close(load_balancing_loss(logits, 2), load_balancing_loss(logits, 2, torch.ones(2, 3)))


def test_even_routing_is_one_times_the_experts_taken() -> None:
    """Half precision is widened, also for probabilities that it would round."""
    logits = torch.eye(4, dtype=torch.bfloat16).repeat(8, 1)
    found = load_balancing_loss([logits], 1)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, torch.tensor(1.0), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    ("logits", "top_k", "weights", "message"),
    [
        ([], 1, None, "expected the router logits of one layer or more, got none"),
        ([torch.zeros(4, 3)], 4, None, "with 4 experts or more, got torch.float32 (4, 3)"),
        ([torch.zeros(4, 3)], 0, None, "with 0 experts"),
        ([torch.zeros(4, 3, dtype=torch.int64)], 1, None, "got torch.int64"),
        ([torch.zeros(2, 4, 3)], 1, None, "router logits (tokens, experts)"),
        ([torch.zeros(4, 3)], 1, torch.ones(5), "a weight for each of 4 rows of router logits, got 5"),
    ],
)
def test_what_does_not_fit_is_named(logits: list[torch.Tensor], top_k: int, weights: torch.Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        load_balancing_loss(logits, top_k, weights)


def test_counts_of_a_tree_are_sequences_that_hold_a_token() -> None:
    """Branches within branches, a sequence that ends inside of another, one twice, a token that no token sees."""
    sequences = [[1, 2, 3, 4], [1, 2, 3, 5, 6], [1, 2], [1, 2], [7, 8]]
    unseen = [np.array([token == 2 for token in row]) for row in sequences]
    tree = TokenTree.from_sequences(sequences, prompt_lengths=[1] * 5, unseen=unseen)
    found = dict(zip(tree.input_ids.tolist(), tree.sequence_counts.tolist(), strict=True))
    assert found == {1: 4, 2: 0, 3: 2, 4: 1, 5: 1, 6: 1, 7: 1, 8: 1}
    assert sum(found.values()) == sum(int((~row).sum()) for row in unseen)
