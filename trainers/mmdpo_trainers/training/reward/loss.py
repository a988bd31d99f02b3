"""Bradley-Terry loss of rewards."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry(scores: Tensor, margins: Tensor | None = None, center_rewards_coefficient: float | None = None) -> Tensor:
    """(n,) losses `-log sigmoid(s_chosen - s_rejected - margin) + c (s_chosen + s_rejected)^2`.

    The pair's likelihood under Bradley and Terry (1952), as in arXiv 2309.14525, equation 1, and arXiv 2203.02155; log 2 where both rewards
    are the same. The margin is that of arXiv 2307.09288; the second term, which holds the mean reward at 0, equation 2 of arXiv 2312.09244.
    Both are as in TRL's `RewardTrainer`, whose loss is the mean of these. LLaVA-RLHF's released code adds
    `0.001 |mean(s_chosen + s_rejected)|` over the micro-batch, which its paper does not have.

    Args:
        scores: (n, 2), chosen and rejected. margins: (n,), by how much a chosen reward is to be higher; None: 0.
        center_rewards_coefficient: c; None: 0.
    """
    chosen, rejected = scores.unbind(1)
    found = -logsigmoid(chosen - rejected - (0.0 if margins is None else margins))
    if center_rewards_coefficient is not None:
        found = found + center_rewards_coefficient * (chosen + rejected).square()
    return found
