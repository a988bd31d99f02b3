"""`patch_model` and `unpatch_model`: token-tree attention behind transformers' own attention interface.

Nothing is pasted or replaced in the model: the attention function and the mask function are registered under one name, and the language
tower's configuration is pointed at it. transformers is imported only when a model is patched.
"""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from .backends.ops_table import OPS
from .backends.reference.scores import capped_scores, expand_heads
from .decoder_layers import CARRYING, carry_refusal, carrying_layers
from .ops.precision import autocast_to
from .ops.tree_attention import tree_attention
from .patched import (
    IMPLEMENTATION,
    PatchState,
    attach,
    detach,
    language_tower,
    on_unpickling,
    place_of,
    remember_configs,
    restore_configs,
    state_of,
)
from .recorder import LayerCall
from .recorder_ops import remove_watch, watch_attention
from .tree_mask import PlanCache, depth, visible, visible_rows

ModelT = TypeVar("ModelT", bound=nn.Module)

# The dtype tells masks that `tree_mask` made of padding from packed trees, which are int32, wherever they have been on their way.
_PADDING = torch.uint32


def patch_model(model: ModelT, *, backend: str = "auto", mass_backend: str = "auto") -> ModelT:
    """Run the language tower of a transformers model on token trees.

    Padded batches give the unpatched model's logits; a packed `TokenTree` is passed as `attention_mask=tree.attention_mask`. Vision towers
    stay as they are. Patching twice is patching once, with the later keyword arguments. Works before and after wrapping with PEFT.

    Args:
        model: a transformers model whose decoder uses the attention interface, or a PEFT model around one. Layers of linear attention
            run a tree node by node, each from the state its parent left, where `tree_refusal` is None.
        backend: backend of `tree_attention`.
        mass_backend: backend of `attention_mass` while attention is recorded.

    Returns:
        The same object.

    Raises:
        ValueError: an unknown backend, or a model that does not use transformers' attention interface.
    """
    for op, name in (("tree_attention", backend), ("attention_mass", mass_backend)):
        if name != "auto" and name not in OPS[op].backends:
            raise ValueError(f"patch_model: {op} has no backend {name!r}; choose 'auto' or one of {', '.join(OPS[op].backends)}")
    from .recurrent import carry_trees  # with a decorator of torch.compile's, whose tracer comes with every transformers model

    tower = language_tower(model)
    state = state_of(tower) or PatchState()
    state.backend, state.mass_backend = backend, mass_backend
    state.tree_refusal, state.cross_layers = tree_refusal(model), _cross_layers(tower)
    state.carrying_layers = carrying_layers(tower)
    if state.tree_refusal is None:
        carry_trees(tower)
    state.needs_reach = images_see_themselves(type(_base(model).base_model))
    remember_configs(state, tower)
    if tower.config._attn_implementation != IMPLEMENTATION:
        register()
        tower.set_attn_implementation(IMPLEMENTATION)
    attach(tower, state)
    return model


def unpatch_model(model: ModelT) -> ModelT:
    """Give the model its own attention back, attribute for attribute. An unpatched model is returned as it is.

    Models that share one configuration object share its attention implementation: the last to be unpatched restores it, and until then
    the others run as with transformers' "sdpa". A copy of a patched model gets back what its original would.
    """
    from .recurrent import carry_no_trees

    tower = language_tower(model)
    state = state_of(tower)
    detach(tower)
    remove_watch(model)
    carry_no_trees(tower)
    restore_configs(state, tower)
    return model


def patch_state(model: nn.Module) -> PatchState:
    """The state of a patched model.

    Raises:
        ValueError: the model is not patched, or its attention implementation was changed since.
    """
    tower = language_tower(model)
    state = state_of(tower)
    if state is None or tower.config._attn_implementation != IMPLEMENTATION:
        raise ValueError(f"{type(model).__name__} is not patched; call mmdpo_kernels.patch_model(model) first")
    return state


def tree_refusal(model: nn.Module) -> str | None:
    """Why packed token trees are not exact with a transformers model, or None where they are.

    A patched model raises with this reason when it is given a tree with branches; padded batches run exactly all the same. Where the tokens
    of a picture see each other both ways, a tree must say so (`TokenTree.from_sequences(blocks=)`), and by layer what the model's masks do.
    """
    tower = language_tower(model)
    if _cross_layers(tower):
        return "pictures come in by cross-attention layers, which see them row by row of a batch"
    others = set(getattr(tower.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention", CARRYING}
    return f"there are layers of {sorted(others)[0]}" if others else _beyond_attention(model, tower) or carry_refusal(tower)


def _base(model: nn.Module) -> Any:
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def _beyond_attention(model: nn.Module, tower: Any) -> str | None:
    """What layers that attend by the tree's rule do beside it, where a tree has other rows than its sequences; None: nothing."""
    config, kinds = tower.config, getattr(tower.config, "layer_types", None) or ()
    told = images_see_themselves(type(_base(model).base_model))
    # Where the model is told what sees ahead, a tree's reach says so.
    if getattr(config, "use_bidirectional_attention", False) is True and not told:
        return "tokens see those that come after them"
    if getattr(config, "attn_temperature_tuning", False):
        return "attention is scaled by a token's row, which a tree changes"
    # Where layers carry a state along, convolutions are a part of that.
    attending = [
        layer for number, layer in enumerate(getattr(tower, "layers", (tower,))) if CARRYING not in kinds[number : number + 1]
    ]
    if any(isinstance(module, nn.Conv1d) for layer in attending for module in layer.modules()):
        return "there are convolutions from row to row"
    return None


def images_see_themselves(body_class: type) -> bool:
    """Whether a model class makes the tokens of a picture see each other both ways, by what it asks for.

    It needs to know them for its mask then; where positions follow pictures (`get_rope_index`), it asks for these.
    """
    asked = set(inspect.signature(body_class.forward).parameters)  # type: ignore[attr-defined]
    return "token_type_ids" in asked or ("mm_token_type_ids" in asked and not hasattr(body_class, "get_rope_index"))


def _cross_layers(tower: Any) -> frozenset[int]:
    return frozenset(getattr(tower.config, "cross_attention_layers", None) or ())


def register() -> None:
    """Make the attention and mask functions known to transformers, in this process."""
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, tree_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, tree_mask)


on_unpickling.append(register)


def tree_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: Any = 0,
    kv_offset: int = 0,
    mask_function: Any = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask hook: padding as a tree, (B, 1, 1, S) uint32, or None for plain causal attention.

    Whatever is not causal attention over whole sequences (decoding, packed position ids, bidirectional pictures, windows) gets the boolean
    mask that transformers makes for its own "sdpa", and is served exactly by that.
    """
    from transformers.masking_utils import causal_mask_function, sdpa_mask

    whole = q_length == kv_length and q_length > 1 and isinstance(q_offset, int) and q_offset == 0 and kv_offset == 0
    # Layers that take keys of earlier layers may be left with the last rows alone, for which no mask would mean the first rows.
    cut = bool(getattr(kwargs.get("config"), "num_kv_shared_layers", 0))
    if cut:
        kwargs["allow_is_causal_skip"] = False
    if mask_function is not causal_mask_function or not whole:
        return sdpa_mask(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            mask_function=mask_function,
            attention_mask=attention_mask,
            **kwargs,
        )
    if attention_mask is None and cut:
        attention_mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=kwargs.get("device"))
    # Traced, padding that is not there is not seen.
    if attention_mask is None or (not cut and not torch.compiler.is_compiling() and bool(attention_mask.all())):
        return None
    index = torch.arange(kv_length, dtype=torch.int32, device=attention_mask.device)
    return torch.where(attention_mask.bool(), kv_length, index)[:, None, None, :].to(torch.int32).view(_PADDING)


def tree_attention_forward(
    module: nn.Module,
    query: Tensor,  # (B, Hq, R, D)
    key: Tensor,  # (B, Hkv, S, D)
    value: Tensor,  # (B, Hkv, S, D)
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention hook. A 4-D integer mask is a tree; None with equal lengths is causal; a boolean mask is transformers' own."""
    for name in ("s_aux", "position_bias", "cache"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__}: attention argument '{name}' is not supported by a patched model")
    # Rotary embeddings leave query and key wider than value under autocast.
    query, key, value = autocast_to(query, key, value)
    given = _HookCall(module, query, key, value, attention_mask, dropout, scaling, softcap, kwargs)
    place = place_of(module)
    if place is None:
        return _unpatched_attention(given)
    state = place.state
    tree_end, reach = (None, None) if place.crosses else _tree(attention_mask, key)
    is_tree = tree_end is not None
    if is_tree and not _is_padding(attention_mask):
        _check_tree(module, state, attention_mask)
    if tree_end is not None and query.shape[2] != key.shape[2]:
        # Layers that take keys of earlier layers may be left with the last rows alone.
        last = torch.arange(key.shape[2] - query.shape[2], key.shape[2], device=key.device).expand(key.shape[0], -1)
        seen = visible_rows(last, tree_end, sliding_window, reach)[:, None]
        given, tree_end, reach, is_tree = given._replace(mask=seen), None, None, False
    if state.recorder is not None or state.paths is not None:
        call = LayerCall(
            tree_end=tree_end,
            mask=None if is_tree else given.mask,
            scale=scaling,
            softcap=softcap,
            window=sliding_window if is_tree else None,
            backend=state.mass_backend,
            reach=reach,
        )
        if state.recorder is not None:
            watch_attention(place, state.recorder, query, key, call)
        if state.paths is not None:
            state.paths.observe(int(place.layer), query, key, call)
    whole_causal = (
        not place.crosses and given.mask is None and query.shape[2] == key.shape[2] and kwargs.get("is_causal") is not False
    )
    if not (is_tree or whole_causal) or (dropout > 0 and not is_tree):
        return _dense_attention(given)
    if dropout > 0:
        raise ValueError(
            f"{type(module).__name__}: attention dropout {dropout} with a padded or packed batch; set config.attention_dropout = 0, "
            "since branches of a tree share their prefix"
        )
    # A causal mask from `tree_mask` already stands for layers without a window; a prepared tree reaches windowed layers as it is.
    window = _limiting(sliding_window, tree_end) if tree_end is not None else None
    output = tree_attention(
        query, key, value, tree_end, reach=reach, scale=scaling, softcap=softcap, window=window, backend=state.backend
    ).output
    return output.transpose(1, 2).contiguous(), None


class _HookCall(NamedTuple):
    """What transformers calls its attention with."""

    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    dropout: float
    scaling: float | None
    softcap: float | None
    kwargs: dict[str, Any]


def _unpatched_attention(given: _HookCall) -> tuple[Tensor, None]:
    """A model that is not patched, whose configuration is a patched model's or a copy of one: attention as transformers' "sdpa" has it."""
    tree_end, _ = _tree(given.mask, given.key)
    if tree_end is not None:
        if not _is_padding(given.mask):
            raise ValueError(
                f"{type(given.module).__name__}: a packed token tree came to a model that is not patched, although its configuration, a patched "
                "model's, asks for tree attention; call mmdpo_kernels.patch_model(model) first"
            )
        given = given._replace(mask=visible(tree_end)[:, None])
    return _dense_attention(given)


def _dense_attention(given: _HookCall) -> tuple[Tensor, None]:
    """transformers' own attention under a mask of its own."""
    module, query, key, value, mask, dropout, scaling, softcap, kwargs = given
    if softcap is not None:
        return _capped_attention(query, key, value, mask, dropout, scaling, softcap), None
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scaling, **kwargs)  # type: ignore[no-any-return]


def _capped_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, scaling: float | None, softcap: float
) -> Tensor:
    """(B, R, Hq, D): attention with a softcap under any mask, dense, which PyTorch's own does not offer."""
    rows, keys = query.shape[2], key.shape[2]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = capped_scores(query, key, scale, softcap)
    if mask is None:  # several rows stand at the start of a longer static cache, one row at its end
        seen = torch.ones(rows, keys, dtype=torch.bool, device=query.device)
        mask = seen.tril() if rows > 1 else seen
    hidden = torch.finfo(scores.dtype).min
    scores = scores.masked_fill(~mask, hidden) if mask.dtype == torch.bool else scores + mask
    probabilities = torch.nn.functional.dropout(scores.softmax(-1), dropout).to(value.dtype)
    return (probabilities @ expand_heads(value, query.shape[1])).transpose(1, 2).contiguous()


def _check_tree(module: nn.Module, state: PatchState, mask: Tensor | None) -> None:
    """Raises ValueError for a packed tree that is not what the model's own masks say."""
    reason, remedy = state.tree_refusal, "run its sequences as a padded batch"
    if reason is None and state.needs_reach and mask is not None and mask.shape[2] == 1:
        reason = "the tokens of a picture see each other both ways"
        remedy = "pack it with TokenTree.from_sequences(blocks=...), which gives its mask a row of reach, or " + remedy
    if reason is not None:
        raise ValueError(f"{type(module).__name__}: a packed token tree is not exact with this model: {reason}; {remedy}")


def _tree(mask: Tensor | None, key: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(B, S) int32 `tree_end` and `reach` from an integer mask (B or 1, 1, 1 or 2, S); None where the mask is boolean or additive, and
    no reach where it has none or no token sees ahead.

    Raises:
        ValueError: an integer mask of another kind, which unpatched attention refuses too.
    """
    if mask is None or mask.dtype.is_floating_point or mask.dtype == torch.bool:
        return None, None
    batch, length = key.shape[0], key.shape[2]
    fits = mask.ndim == 4 and mask.shape[1] == 1 and mask.shape[2] in (1, 2) and mask.shape[3] == length
    if mask.dtype not in (torch.int32, _PADDING) or not fits or mask.shape[0] not in (1, batch):
        raise ValueError(
            f"attention_mask: an integer mask is a token tree, int32 of shape ({batch} or 1, 1, 1, {length}), or (…, 2, {length}) with reach, "
            f"see TokenTree.attention_mask; got {mask.dtype} {tuple(mask.shape)}. A padding mask has two dimensions, any other is boolean"
        )
    if mask.dtype == _PADDING:
        mask = mask.view(torch.int32) if torch.compiler.is_compiling() else _as_int32(mask)
    rows = [row.expand(batch, -1) for row in mask[:, 0].unbind(1)]
    if len(rows) == 1 or not (torch.compiler.is_compiling() or _looks_ahead(rows[1])):
        return rows[0], None
    return rows[0], rows[1]


def _limiting(window: int | None, tree_end: Tensor) -> int | None:
    """The window, or None where no path is longer: the kernels on the CPU that are fastest have none. Elsewhere looking would wait."""
    if window is None or tree_end.device.type != "cpu" or torch.compiler.is_compiling():
        return window
    return window if _longest_path(tree_end) > window else None


def _longest(tree_end: Tensor) -> int:
    return int(depth(tree_end).max()) + 1


_longest_path = PlanCache(_longest)


def _any_ahead(reach: Tensor) -> bool:
    return bool((reach > torch.arange(1, reach.shape[1] + 1, device=reach.device)).any())


_looks_ahead = PlanCache(_any_ahead)
"""Layers that are causal all the same, and texts alone, are served as trees without reach."""


def _view_as_int32(mask: Tensor) -> Tensor:
    return mask.view(torch.int32)


_as_int32 = PlanCache(_view_as_int32)
"""One view for all layers: what they derive from it is kept by tensor, and views of another dtype do not know of each other."""


def _is_padding(mask: Tensor | None) -> bool:
    """Whether `tree_mask` made a tree of a padded batch."""
    return mask is not None and mask.dtype == _PADDING
