"""`patch_model` and `unpatch_model`: token-tree attention behind transformers' own attention interface.

Nothing is pasted or replaced in the model: the attention function and the mask function are registered under one name, and the language
tower's configuration is pointed at it. transformers is imported only when a model is patched.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from .backends.reference.scores import capped_scores, expand_heads
from .backends.registry import PREFERENCE
from .ops.precision import autocast_to
from .ops.tree_attention import tree_attention

if TYPE_CHECKING:
    from .recorder import AttentionRecorder

# Without "flash" or "/", which transformers reads as its own kernels and as hub addresses.
IMPLEMENTATION = "mmdpo_tree"

ModelT = TypeVar("ModelT", bound=nn.Module)


@dataclass
class PatchState:
    """What a patched language tower's attention function needs to know."""

    backend: str = "auto"
    mass_backend: str = "auto"
    recorder: AttentionRecorder | None = None
    tree_refusal: str | None = None
    cross_layers: frozenset[int] = frozenset()
    """Layers whose keys are of pictures, and not of the tokens."""


class _Original:
    """The attention implementation a configuration had before, and the patched towers that share the configuration."""

    def __init__(self, implementation: str | None) -> None:
        self.implementation = implementation
        self.towers: WeakSet[nn.Module] = WeakSet()


_CONFIGS: WeakIdKeyDictionary = WeakIdKeyDictionary()
_TOWERS: WeakKeyDictionary[nn.Module, PatchState] = WeakKeyDictionary()
_ATTENTIONS: WeakKeyDictionary[nn.Module, PatchState] = WeakKeyDictionary()
_PADDING: WeakIdKeyDictionary = WeakIdKeyDictionary()
"""Masks of padded batches that `tree_mask` made."""


def patch_model(model: ModelT, *, backend: str = "auto", mass_backend: str = "auto") -> ModelT:
    """Run the language tower of a transformers model on token trees.

    Padded batches give the unpatched model's logits; a packed `TokenTree` is passed as `attention_mask=tree.attention_mask`. Vision towers
    stay as they are. Patching twice is patching once, with the later keyword arguments. Works before and after wrapping with PEFT.

    Args:
        model: a transformers model whose decoder uses the attention interface, or a PEFT model around one.
        backend: backend of `tree_attention`.
        mass_backend: backend of `attention_mass` while attention is recorded.

    Returns:
        The same object.

    Raises:
        ValueError: an unknown backend, or a model that does not use transformers' attention interface.
    """
    for op, name in (("tree_attention", backend), ("attention_mass", mass_backend)):
        if name != "auto" and name not in PREFERENCE[op]:
            raise ValueError(f"patch_model: {op} has no backend {name!r}; choose 'auto' or one of {', '.join(PREFERENCE[op])}")
    tower = language_tower(model)
    state = _TOWERS.setdefault(tower, PatchState())
    for module in tower.modules():
        if hasattr(module, "layer_idx"):
            _ATTENTIONS[module] = state
    for config in _configs(tower):
        original = _CONFIGS.get(config)
        if config._attn_implementation_internal != IMPLEMENTATION:
            original = _Original(config._attn_implementation_internal)
        elif original is None:  # a copy of a patched model
            original = _Original(_default_implementation(tower))
        original.towers.add(tower)
        _CONFIGS[config] = original
    if tower.config._attn_implementation != IMPLEMENTATION:
        _register()
        tower.set_attn_implementation(IMPLEMENTATION)
    state.backend, state.mass_backend = backend, mass_backend
    state.tree_refusal, state.cross_layers = tree_refusal(model), _cross_layers(tower)
    return model


def unpatch_model(model: ModelT) -> ModelT:
    """Give the model its own attention back, attribute for attribute. An unpatched model is returned as it is.

    Models that share one configuration object share its attention implementation: the last to be unpatched restores it. A copy of a
    patched model gets the default implementation of its class.
    """
    tower = language_tower(model)
    _TOWERS.pop(tower, None)
    for module in tower.modules():
        _ATTENTIONS.pop(module, None)
    for config in _configs(tower):
        original = _CONFIGS.get(config) or _Original(_default_implementation(tower))
        original.towers.discard(tower)
        if config._attn_implementation_internal == IMPLEMENTATION and not original.towers:
            config._attn_implementation_internal = original.implementation
            _CONFIGS.pop(config, None)
    return model


def patch_state(model: nn.Module) -> PatchState:
    """The state of a patched model.

    Raises:
        ValueError: the model is not patched, or its attention implementation was changed since.
    """
    tower = language_tower(model)
    state = _TOWERS.get(tower)
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
    if pictures_see_themselves(type(base.base_model)):
        return "the tokens of a picture see each other both ways"
    others = set(getattr(tower.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    return f"there are layers of {sorted(others)[0]}" if others else None


def pictures_see_themselves(body_class: type) -> bool:
    """Whether a model class makes the tokens of a picture see each other both ways, by what it asks for.

    It needs to know them for its mask then; where positions follow pictures (`get_rope_index`), it asks for these.
    """
    asked = set(inspect.signature(body_class.forward).parameters)  # type: ignore[attr-defined]
    return "token_type_ids" in asked or ("mm_token_type_ids" in asked and not hasattr(body_class, "get_rope_index"))


def _cross_layers(tower: Any) -> frozenset[int]:
    return frozenset(getattr(tower.config, "cross_attention_layers", None) or ())


def language_tower(model: nn.Module) -> Any:
    """The decoder of a transformers model, under PEFT or not.

    Raises:
        ValueError: no decoder that uses the attention interface.
    """
    base: Any = model
    if hasattr(model, "get_base_model"):  # PEFT
        base = model.get_base_model()  # type: ignore[operator]
    tower = base.get_decoder() if hasattr(base, "get_decoder") else None
    if tower is None or not getattr(tower, "_supports_attention_backend", False):
        found = "no get_decoder()" if tower is None else f"decoder {type(tower).__name__}"
        raise ValueError(
            f"{type(base).__name__} cannot be patched: {found} uses transformers' attention interface "
            "(a model with get_decoder() whose class sets _supports_attention_backend is needed)"
        )
    return tower


def _configs(tower: Any) -> list[Any]:
    """The distinct configurations inside the tower."""
    found: dict[int, Any] = {}
    for module in tower.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_attn_implementation_internal"):
            found.setdefault(id(config), config)
    return list(found.values())


def _default_implementation(tower: Any) -> str:
    """What transformers gives a model of this class when nothing is asked for."""
    return "sdpa" if getattr(tower, "_supports_sdpa", False) else "eager"


def _register() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(IMPLEMENTATION, tree_attention_forward)
    AttentionMaskInterface.register(IMPLEMENTATION, tree_mask)


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
    """transformers' mask hook: padding as a tree, (B, 1, 1, S) int32, or None for plain causal attention.

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
    if attention_mask is None or bool(attention_mask.all()):
        return None
    index = torch.arange(kv_length, dtype=torch.int32, device=attention_mask.device)
    mask = torch.where(attention_mask.bool(), kv_length, index)[:, None, None, :].to(torch.int32)
    _PADDING[mask] = True
    return mask


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
    state = _ATTENTIONS.get(module)
    is_cross = state is not None and getattr(module, "layer_idx", None) in state.cross_layers
    tree_end = None if is_cross else _tree_end(attention_mask, key)
    is_tree = tree_end is not None
    refused = is_tree and state is not None and state.tree_refusal is not None
    # Padding is a tree of `tree_mask`'s own. A checkpointed layer that runs again in backward was looked at before.
    if refused and attention_mask not in _PADDING and torch._C._current_graph_task_id() == -1:
        assert state is not None
        raise ValueError(
            f"{type(module).__name__}: a packed token tree is not exact with this model: {state.tree_refusal}; run its sequences as a "
            "padded batch"
        )
    if state is not None and state.recorder is not None:
        mask = None if is_tree else attention_mask
        state.recorder.observe(
            module,
            query,
            key,
            tree_end=tree_end,
            mask=mask,
            scale=scaling,
            softcap=softcap,
            window=sliding_window if is_tree else None,
            backend=state.mass_backend,
        )
    whole_causal = (
        not is_cross and attention_mask is None and query.shape[2] == key.shape[2] and kwargs.get("is_causal") is not False
    )
    if not (is_tree or whole_causal) or (dropout > 0 and not is_tree):
        if softcap is not None:
            return _capped_attention(query, key, value, attention_mask, dropout, scaling, softcap), None
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if dropout > 0:
        raise ValueError(
            f"{type(module).__name__}: attention dropout {dropout} with a padded or packed batch; set config.attention_dropout = 0, "
            "since branches of a tree share their prefix"
        )
    # A causal mask from `tree_mask` already stands for layers without a window; a prepared tree reaches windowed layers as it is.
    window = sliding_window if is_tree else None
    backend = "auto" if state is None else state.backend
    output = tree_attention(query, key, value, tree_end, scale=scaling, softcap=softcap, window=window, backend=backend).output
    return output.transpose(1, 2).contiguous(), None


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
    """(B, S) `tree_end` from an integer mask (B or 1, 1, 1, S); None where the mask is boolean or additive.

    Raises:
        ValueError: an integer mask of another kind, which unpatched attention refuses too.
    """
    if mask is None or mask.dtype.is_floating_point or mask.dtype == torch.bool:
        return None
    expected = (1, 1, key.shape[2])
    if mask.dtype != torch.int32 or mask.shape[1:] != expected or mask.shape[0] not in (1, key.shape[0]):
        raise ValueError(
            f"attention_mask: an integer mask is a token tree, int32 of shape ({key.shape[0]} or 1, 1, 1, {key.shape[2]}), see "
            f"TokenTree.attention_mask; got {mask.dtype} {tuple(mask.shape)}. A padding mask has two dimensions, any other is boolean"
        )
    return mask[:, 0, 0, :].expand(key.shape[0], -1)
