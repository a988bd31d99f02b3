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
from .recurrent import carry_no_trees, carry_trees
from .tree_mask import PlanCache, visible

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
    tower = language_tower(model)
    state = state_of(tower) or PatchState()
    state.backend, state.mass_backend = backend, mass_backend
    state.tree_refusal, state.cross_layers = tree_refusal(model), _cross_layers(tower)
    state.carrying_layers = carrying_layers(tower)
    if state.tree_refusal is None:
        carry_trees(tower)
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

    A patched model raises with this reason when it is given a tree with branches; padded batches run exactly all the same.
    """
    tower = language_tower(model)
    if _cross_layers(tower):
        return "pictures come in by cross-attention layers, which see them row by row of a batch"
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    if images_see_themselves(type(base.base_model)):
        return "the tokens of a picture see each other both ways"
    others = set(getattr(tower.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention", CARRYING}
    return f"there are layers of {sorted(others)[0]}" if others else carry_refusal(tower)


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
    # Traced, padding that is not there is not seen.
    if attention_mask is None or (not torch.compiler.is_compiling() and bool(attention_mask.all())):
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
    tree_end = None if place.crosses else _tree_end(attention_mask, key)
    is_tree = tree_end is not None
    if is_tree and state.tree_refusal is not None and not _is_padding(attention_mask):
        raise ValueError(
            f"{type(module).__name__}: a packed token tree is not exact with this model: {state.tree_refusal}; run its sequences as a "
            "padded batch"
        )
    if state.recorder is not None or state.paths is not None:
        call = LayerCall(
            tree_end=tree_end,
            mask=None if is_tree else attention_mask,
            scale=scaling,
            softcap=softcap,
            window=sliding_window if is_tree else None,
            backend=state.mass_backend,
        )
        if state.recorder is not None:
            watch_attention(place, state.recorder, query, key, call)
        if state.paths is not None:
            state.paths.observe(int(place.layer), query, key, call)
    whole_causal = (
        not place.crosses and attention_mask is None and query.shape[2] == key.shape[2] and kwargs.get("is_causal") is not False
    )
    if not (is_tree or whole_causal) or (dropout > 0 and not is_tree):
        return _dense_attention(given)
    if dropout > 0:
        raise ValueError(
            f"{type(module).__name__}: attention dropout {dropout} with a padded or packed batch; set config.attention_dropout = 0, "
            "since branches of a tree share their prefix"
        )
    # A causal mask from `tree_mask` already stands for layers without a window; a prepared tree reaches windowed layers as it is.
    window = sliding_window if is_tree else None
    output = tree_attention(
        query, key, value, tree_end, scale=scaling, softcap=softcap, window=window, backend=state.backend
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
    tree_end = _tree_end(given.mask, given.key)
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


def _tree_end(mask: Tensor | None, key: Tensor) -> Tensor | None:
    """(B, S) int32 `tree_end` from an integer mask (B or 1, 1, 1, S); None where the mask is boolean or additive.

    Raises:
        ValueError: an integer mask of another kind, which unpatched attention refuses too.
    """
    if mask is None or mask.dtype.is_floating_point or mask.dtype == torch.bool:
        return None
    expected = (1, 1, key.shape[2])
    if mask.dtype not in (torch.int32, _PADDING) or mask.shape[1:] != expected or mask.shape[0] not in (1, key.shape[0]):
        raise ValueError(
            f"attention_mask: an integer mask is a token tree, int32 of shape ({key.shape[0]} or 1, 1, 1, {key.shape[2]}), see "
            f"TokenTree.attention_mask; got {mask.dtype} {tuple(mask.shape)}. A padding mask has two dimensions, any other is boolean"
        )
    if mask.dtype == _PADDING:
        mask = mask.view(torch.int32) if torch.compiler.is_compiling() else _as_int32(mask)
    return mask[:, 0, 0, :].expand(key.shape[0], -1)


def _view_as_int32(mask: Tensor) -> Tensor:
    return mask.view(torch.int32)


_as_int32 = PlanCache(_view_as_int32)
"""One view for all layers: what they derive from it is kept by tensor, and views of another dtype do not know of each other."""


def _is_padding(mask: Tensor | None) -> bool:
    """Whether `tree_mask` made a tree of a padded batch."""
    return mask is not None and mask.dtype == _PADDING
