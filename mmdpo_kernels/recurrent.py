"""Token trees through layers that carry a state (Gated DeltaNet): each node goes on from the state that its parent left.

transformers' own module runs the nodes, given a small cache that hands it the parent's state and keeps what it leaves, as tensors of the graph
in place of copies, so that autograd goes through. Nodes of one depth run as a batch. What a sequence by itself goes through is what a branch
goes through, but that the kernels' blocks of 64 tokens begin anew with each node: the same numbers up to the kernels' own rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from .decoder_layers import cache_argument, carriers
from .tree_mask import PlanCache

_HOOK: Any = "mmdpo_tree"
"""The key of the decoder's hook, the same for every model: compiled code is guarded by it."""

_BLOCK = 64
"""Tokens that the kernels go by: a row that fills its last block with padding costs them nothing."""


class NodeBatch(NamedTuple):
    """N nodes of one depth that run as one batch."""

    tokens: Tensor
    """(N, L) int64: row of each token among the B * S rows of hidden states; B * S behind a node's end."""
    parents: Tensor | None
    """(N) int64: which of the nodes of the depth above left the state, counted over those that are gone on from; None: roots."""
    depth: int
    goes_on: bool
    """Whether children go on from its states; its nodes are of one length then, since padding would change these."""


class NodePlan(NamedTuple):
    """The nodes of a tree in the order in which they run."""

    batches: tuple[NodeBatch, ...]
    """By depth."""
    source: Tensor
    """(B * S) int64: row of each token among the rows of all batches' outputs; the one behind the last for padding."""


class NodeStates(NamedTuple):
    """What N nodes leave to their children."""

    conv: Tensor
    """(N, channels, K - 1): the last inputs of a convolution of K tokens."""
    recurrent: Tensor
    """(N, heads, key size, value size)."""

    def of(self, nodes: Tensor) -> NodeStates:
        return NodeStates(self.conv.index_select(0, nodes), self.recurrent.index_select(0, nodes))


class NodeCache:
    """The methods of a transformers cache by which a layer takes the states of its batch's parents and leaves its own.

    before: of the parents; None: a batch of roots.
    """

    def __init__(self, before: NodeStates | None) -> None:
        self.before = before
        self.conv: Tensor | None = None
        self.recurrent: Tensor | None = None

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return None if self.before is None else self.before.conv

    def get_recurrent_state(self, layer_idx: int, state_idx: int = 0) -> Tensor | None:
        return None if self.before is None else self.before.recurrent

    def is_recording_past(self, layer_idx: int) -> bool:
        """Yes, so that no convolution writes to the state it is given, which the siblings take too."""
        return True

    def update_conv_state(self, conv_states: Tensor, layer_idx: int, state_idx: int = 0, *, conv_kernel_size: int) -> Tensor:
        """The batch's inputs to the convolution behind its parents' last ones; keeps the last of these."""
        whole = conv_states if self.before is None else torch.cat([self.before.conv, conv_states], dim=-1)
        width = conv_kernel_size - 1
        # What a node that is shorter than the convolution lacks, is what the convolution itself puts before a sequence: zeros.
        padded = pad(whole, (max(width - whole.shape[-1], 0), 0))
        self.conv = padded[..., padded.shape[-1] - width :]
        return whole

    def update_recurrent_state(self, recurrent_states: Tensor, layer_idx: int, state_idx: int = 0) -> Tensor:
        self.recurrent = recurrent_states
        return recurrent_states

    def left(self, module: nn.Module) -> NodeStates:
        """The states left. RuntimeError where the module did not say them."""
        if self.conv is None or self.recurrent is None:
            raise RuntimeError(
                f"{type(module).__name__}: expected a state of its convolution and a recurrent one in its cache, got none"
            )
        return NodeStates(self.conv, self.recurrent)


class CarriedForward:
    """The `forward` of a carrier in a patched model; made a copy with the module, it belongs to the copy.

    A packed tree, which comes as the layer's mask, runs node by node; everything else as the module has it. Trees are not traced by
    `torch.compile`: a layer is a break in the graph there.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.cache_argument = cache_argument(module)
        self.own: Callable[..., Any] | None = module.__dict__.get("forward")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _run_tree(self, *args, **kwargs) if is_tree(kwargs.get("attention_mask")) else self.original()(*args, **kwargs)

    def original(self) -> Callable[..., Any]:
        """What the module has without it."""
        return type(self.module).forward.__get__(self.module) if self.own is None else self.own  # type: ignore[no-any-return]


def is_tree(mask: Any) -> bool:
    """Whether a mask is a packed tree, (B or 1, 1, rows, S) int32."""
    return isinstance(mask, Tensor) and mask.dtype == torch.int32 and mask.ndim == 4


def carry_trees(tower: nn.Module) -> None:
    """Let a decoder's carriers run packed trees. Doing so twice is doing so once."""
    found = carriers(tower)
    for module in found:
        if not isinstance(module.__dict__.get("forward"), CarriedForward):
            module.__dict__["forward"] = CarriedForward(module)
    if found:
        tower._forward_pre_hooks[_HOOK] = _masks_by_kind
        tower._forward_pre_hooks_with_kwargs[_HOOK] = True


def carry_no_trees(tower: nn.Module) -> None:
    """Take away what `carry_trees` gave."""
    tower._forward_pre_hooks.pop(_HOOK, None)
    tower._forward_pre_hooks_with_kwargs.pop(_HOOK, None)
    for module in tower.modules():
        carried = module.__dict__.get("forward")
        if isinstance(carried, CarriedForward):
            if carried.own is None:
                del module.__dict__["forward"]
            else:
                module.__dict__["forward"] = carried.own


def _masks_by_kind(tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A tree as one mask for each kind of layer: as its argument, it reaches carriers in checkpointing's recomputation, too.

    Left to itself a decoder hands carriers padding masks only.
    """

    def by_kind(value: Any) -> Any:
        return dict.fromkeys(tower.config.layer_types, value) if is_tree(value) else value

    return tuple(map(by_kind, args)), {name: by_kind(value) for name, value in kwargs.items()}


@torch.compiler.disable
def _run_tree(carried: CarriedForward, hidden_states: Tensor, *, attention_mask: Tensor, **kwargs: Any) -> Tensor:
    """(B, S, H): the layer's output on packed trees, zeros at padding.

    Equivalent to the module on each path from a root by itself.
    """
    module, name = carried.module, carried.cache_argument
    if kwargs.pop(name, None) is not None:
        raise ValueError(f"{type(module).__name__}: a packed token tree leaves no state to decode from; pass use_cache=False")
    if attention_mask.shape[2] != 1:
        raise ValueError(
            f"{type(module).__name__}: expected a tree of shape (B or 1, 1, 1, S), got {tuple(attention_mask.shape)}: a state is carried one "
            "way, and no token looks ahead"
        )
    batch, length, size = hidden_states.shape
    plan = node_plan(attention_mask[:, 0, 0, :].expand(batch, length))
    rows = torch.cat([hidden_states.reshape(-1, size), hidden_states.new_zeros(1, size)])
    found: list[Tensor] = []
    left: dict[int, list[NodeStates]] = {}
    for nodes in plan.batches:
        before = None
        if nodes.parents is not None:
            above = left[nodes.depth - 1]
            before = NodeStates(*(torch.cat(states) for states in zip(*above, strict=True))).of(nodes.parents)
        cache = NodeCache(before)
        inputs = rows.index_select(0, nodes.tokens.flatten()).view(*nodes.tokens.shape, size)
        output = carried.original()(hidden_states=inputs, attention_mask=None, **{name: cache}, **kwargs)
        found.append(output.flatten(0, 1))
        if nodes.goes_on:
            left.setdefault(nodes.depth, []).append(cache.left(module))
    width = found[0].shape[1] if found else size
    zero = (found[0] if found else hidden_states).new_zeros(1, width)
    return torch.cat([*found, zero]).index_select(0, plan.source).view(batch, length, width)


def node_plan(tree_end: Tensor) -> NodePlan:
    """How the nodes of packed trees (B, S) run. The plan of a tensor is kept, see `PlanCache`.

    A node is a run of tokens with one `tree_end`; padding tokens are of none. Inner nodes of one length run as a batch, and so do leaves of
    as many blocks, with padding behind them, where it changes nothing. An inner node of one token below another is run with each of its
    children: kernels for single tokens have no backward.
    """
    return _node_plan(tree_end)


class _Node:
    """A run of tokens, by their rows, below another."""

    def __init__(self, parent: _Node | None, end: int) -> None:
        self.parent, self.end = parent, end
        self.rows: list[int] = []
        self.children: list[_Node] = []
        self.place = -1
        """Among the states that are left at its depth."""

    @property
    def depth(self) -> int:
        return 0 if self.parent is None else self.parent.depth + 1


def _make_plan(tree_end: Tensor) -> NodePlan:
    batch, length = tree_end.shape
    by_depth: dict[int, list[_Node]] = {}
    for row, ends in enumerate(tree_end.tolist()):
        for node in _nodes(ends, row * length):
            by_depth.setdefault(node.depth, []).append(node)
    batches: list[NodeBatch] = []
    source, count = [-1] * (batch * length), 0
    device = tree_end.device
    for depth, nodes in sorted(by_depth.items()):
        groups: dict[tuple[bool, int], list[_Node]] = {}
        for node in nodes:
            inner, size = bool(node.children), len(node.rows)
            groups.setdefault((inner, size if inner else -(-size // _BLOCK)), []).append(node)
        places = 0
        for (inner, _), group in groups.items():
            # Never one token, which would go to a kernel without a backward.
            width = max(2 * (depth > 0), *(len(node.rows) for node in group))
            tokens = torch.full((len(group), width), batch * length, dtype=torch.int64)
            for index, node in enumerate(group):
                tokens[index, : len(node.rows)] = torch.tensor(node.rows)
                for offset, its_row in enumerate(node.rows):
                    source[its_row] = count + index * width + offset
                if inner:
                    node.place, places = places, places + 1
            count += len(group) * width
            parents = None if depth == 0 else torch.tensor([node.parent.place for node in group if node.parent], device=device)
            batches.append(NodeBatch(tokens.to(device), parents, depth, inner))
    sources = torch.tensor([count if place < 0 else place for place in source], dtype=torch.int64)
    return NodePlan(tuple(batches), sources.to(device))


_node_plan = PlanCache(_make_plan)


def _nodes(ends: list[int], first: int) -> list[_Node]:
    """The nodes of one packed row in order, whose rows count from `first`; without inner nodes of one token below others."""
    found: list[_Node] = []
    path: list[_Node] = []
    for index, end in enumerate(ends):
        if end <= index:  # padding
            continue
        while path and path[-1].end <= index:
            path.pop()
        if path and path[-1].end == end and not path[-1].children:
            path[-1].rows.append(first + index)
            continue
        node = _Node(path[-1] if path else None, end)
        if node.parent is not None:
            node.parent.children.append(node)
        node.rows.append(first + index)
        found.append(node)
        path.append(node)
    kept: list[_Node] = []
    for node in found:
        if node.parent is not None and node.children and len(node.rows) == 1:
            for child in node.children:
                child.parent, child.rows = node.parent, node.rows + child.rows
        else:
            kept.append(node)
    return kept
