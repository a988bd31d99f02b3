"""`PathMaps`: attention maps of single sequences out of a running model, with their gradient; `record_path_maps` makes them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from .ops.attention_mass import attention_mass
from .recorder import LayerCall, tree_calls

OP = "record_path_maps"


class SequencePaths(NamedTuple):
    """n sequences out of a forward of B rows with S tokens each: paths from the roots of a packed tree, or fronts of padded rows."""

    tokens: Tensor
    """(n, L) int64: the sequences' tokens, as places in the flattened batch (B S); -1 behind a sequence's last."""
    rows: Tensor
    """(n, R) int64: query rows that count, as places in their sequence; -1 = unused."""


class PathMaps:
    """What `record_path_maps` yields; `.maps` is there once the layer has run."""

    def __init__(self, paths: SequencePaths, layer: int) -> None:
        self.paths, self.layer = paths, layer
        self.with_gradient = torch.is_grad_enabled()
        self._maps: Tensor | None = None

    @property
    def maps(self) -> Tensor:
        """(n, L) float32 (float64 for float64 models): each token's attention probability, mean over heads and counted rows; 0 behind the last.

        Differentiable where the block was entered with gradients on.
        """
        if self._maps is None:
            raise ValueError(f"{OP}: layer {self.layer} has not run; run the model that was given to it inside the block")
        return self._maps

    def observe(self, layer: int, query: Tensor, key: Tensor, call: LayerCall) -> None:
        """Keep the maps of an attention call. query (B, Hq, S, D), key (B, Hkv, S, D)."""
        # A checkpointed layer runs again inside backward.
        if layer != self.layer or torch._C._current_graph_task_id() != -1:
            return
        if self._maps is not None:
            raise ValueError(f"{OP}: layer {layer} ran twice; run one forward in the block")
        if self.with_gradient and not (query.requires_grad or key.requires_grad):
            raise ValueError(
                f"{OP}: attention of layer {layer} carries no gradient: nothing trained comes before it, or it is checkpointed with "
                "use_reentrant=True; train lower layers, take a later layer, or set use_reentrant=False"
            )
        # Checkpointing recomputes what its hooks saw, and runs the layer alone: what is saved here must not go through them.
        with torch.set_grad_enabled(self.with_gradient), saved_tensors_hooks(_as_it_is, _as_it_is):
            self._maps = self._found(query, key, call)

    def _found(self, query: Tensor, key: Tensor, call: LayerCall) -> Tensor:
        tokens, rows = (each.to(query.device) for each in self.paths)
        if query.shape[0] * query.shape[2] <= int(tokens.max()):
            raise ValueError(f"{OP}: paths name token {int(tokens.max())} of a forward of {query.shape[0]} x {query.shape[2]}")
        at_rows = tokens.gather(1, rows.clamp(min=0)).clamp(min=0)
        queries, keys = _taken(query, at_rows), _taken(key, tokens.clamp(min=0))
        length = tokens.shape[1]
        parts: list[tuple[slice, Tensor | None, Tensor]] = [(slice(None), None, rows)]
        reach = None if call.reach is None else _reach_on_paths(call.reach, tokens)
        if call.mask is not None:
            # Padded rows: a sequence is the front of its row.
            its_row = tokens[:, 0] // query.shape[2]
            mask = call.mask.expand(query.shape[0], -1, -1, -1)[its_row]
            parts = list(tree_calls(mask, rows, rows, length))
        total = queries.new_zeros(())
        for part, tree_end, positions in parts:
            found = attention_mass(
                queries[:, :, part],
                keys,
                torch.zeros_like(tokens),
                row_positions=positions,
                num_segments=1,
                tree_end=tree_end,
                reach=reach,
                scale=call.scale,
                softcap=call.softcap,
                window=call.window,
                reduce="tokens",
                backend=call.backend,
            )
            total = total + found * (positions >= 0).sum(1, keepdim=True)
        return total / (rows >= 0).sum(1, keepdim=True).clamp(min=1)


def _taken(heads: Tensor, places: Tensor) -> Tensor:
    """(n, H, P, D): those tokens of heads (B, H, S, D). places: (n, P) in (B S)."""
    return heads.transpose(1, 2).flatten(0, 1)[places].transpose(1, 2)


def _reach_on_paths(reach: Tensor, tokens: Tensor) -> Tensor:
    """(n, L) int32: how far each token of a path looks ahead on it. reach: (B, S). A block is whole in one node, so in order on the path."""
    index = torch.arange(reach.shape[1], dtype=torch.int32, device=reach.device)
    ahead = (reach - index).flatten()[tokens.clamp(min=0)]
    behind = torch.arange(tokens.shape[1], dtype=torch.int32, device=reach.device)
    return torch.where(tokens < 0, behind + 1, behind + ahead).to(torch.int32)


def _as_it_is(tensor: Tensor) -> Tensor:
    return tensor
