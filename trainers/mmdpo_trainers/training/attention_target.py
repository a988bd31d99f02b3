"""`attention_target`: where the chosen response looks, as an objective."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmdpo_kernels import PathMaps, SequencePaths, record_path_maps
from mmdpo_trainers.training.batches.attention_targets import AttentionTargets


def target_losses(form: str, maps: Tensor, targets: AttentionTargets) -> tuple[Tensor, Tensor]:
    """The loss of each record, and the share of its pictures' attention that the target gets; (m,) each.

    With a_j the attention on token j, mean over heads and the rows that predict the chosen response, A its sum over the record's pictures,
    T that over the asked-about picture or part, s = T / A, and u the share of the pictures' tokens that are the target's (of N pictures of
    one size 1 / N):

    - `log_share`: -log s. 0 where all of it is on the target.
    - `sayo`: 1 - (1 + tanh log(s / u)) / 2 = 1 / (1 + (s / u)^2), one minus the reward of SAYO (arXiv 2602.08241), which reinforcement learning
      maximises there and the gradient does here; the mean share is that of attention spread evenly over the pictures' tokens. 1 / 2 there.
    - `kl`: KL(q || a / A) over the pictures' tokens with q even over the target's: log_share, and how uneven attention is within the target.
      After KLAL (arXiv 2511.12738). 0 where attention is q.

    A record whose pictures get no attention at all has loss 0 and share nan.

    Args:
        maps: (m, L), as `record_path_maps` gives them.
    """
    zero = maps.new_zeros(())
    pictures = torch.where(targets.pictures, maps, zero).sum(1)
    seen = pictures > 0
    tiny = torch.finfo(maps.dtype).tiny
    whole = torch.where(seen, pictures, torch.ones_like(pictures))
    share = (torch.where(targets.target, maps, zero).sum(1) / whole).clamp(min=tiny)
    size = targets.target.sum(1).to(maps)
    if form == "log_share":
        losses = -share.log()
    elif form == "sayo":
        losses = 1 / (1 + (share * targets.pictures.sum(1) / size) ** 2)
    else:
        logs = (maps / whole[:, None]).clamp(min=tiny).log()
        losses = -torch.where(targets.target, logs, zero).sum(1) / size - size.log()
    return torch.where(seen, losses, torch.zeros_like(losses)), torch.where(seen, share, torch.full_like(share, torch.nan))


@contextmanager
def recorded_maps(
    model: nn.Module, targets: AttentionTargets | None, layer: int | None, *, everywhere: bool
) -> Iterator[PathMaps | None]:
    """Record the maps of a batch's targets while the block runs the policy; None: it has none.

    everywhere: record something all the same, for a loss to multiply by 0: processes whose batches differ in having targets must agree on what
    backward runs through, or gather weights in different orders.
    """
    if targets is None and not everywhere:
        yield None
        return
    assert layer is not None
    paths = _FIRST_TOKEN if targets is None else targets.paths
    with record_path_maps(model, paths, layer=layer) as maps:
        yield maps


_FIRST_TOKEN = SequencePaths(torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.int64))
