"""`record_attention`: attention mass per picture from a patched model's own forwards, at the layers asked for; `record_path_maps`: maps
with a gradient."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .patch import patch_state
from .patched import PatchState, language_tower
from .path_maps import PathMaps, SequencePaths
from .recorder import AttentionRecorder, ForwardStopped
from .recorder_ops import Replaced, replace_method, ticket_of, watch_decoder, watch_model

# Ways of `generate` in which a row of a forward is not the one sequence that it was at the start, or a forward does not emit one token;
# with the values that leave them off.
_NOT_FOLLOWED: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "constraints": (),
    "force_words_ids": (),
    "penalty_alpha": (0,),  # contrastive search
    "dola_layers": (),
    "assistant_model": (),
    "assistant_early_exit": (),
    "prompt_lookup_num_tokens": (),
    "use_mtp": (False,),
    "guidance_scale": (1,),
    "custom_generate": (),
}
# What may end rows of a batch at different steps, unseen from the tokens.
_OWN_ENDS = ("stop_strings", "stopping_criteria")


@contextmanager
def record_attention(
    model: nn.Module,
    segments: Tensor,  # (B, S)
    rows: Tensor | None,  # (B, S)
    *,
    layers: Iterable[int],
    num_segments: int | None = None,
    reduce: str | None = "mean",
    stop_early: bool = False,
    eos_token_ids: Iterable[int] | None = None,
    cross_segments: Tensor | None = None,  # (B, K)
) -> Iterator[AttentionRecorder]:
    """Record how much attention query rows put on each segment, while a patched model runs.

    Equivalent to a forward with eager attention and `output_attentions=True`, then
    `attentions[layer].mean(1)[rows] @ one_hot(segments)`, without the S x S maps. One `with` may span several forwards: masses are then
    averages over all counted rows. Recomputation of checkpointed layers is not counted. No gradient.

    `generate` is followed with dynamic, static and sliding caches, without a cache, and with `prefill_chunk_size`; decoding steps run
    uncompiled. Keys that a sliding cache has dropped get no attention and no mass.

    Args:
        model: a patched model, or a PEFT model around one.
        segments: (B, S) integer; segment of each token, -1 = none. See `image_segments`. With `rows`, of the tokens that the forward is
            called with; in `generate`, of the prompt.
        rows: (B, S) bool; query rows that count (a row predicts the next token). None, in `generate`: every row that emits a token.
        layers: decoder layers, 0-based; negative counts from the end.
        num_segments: number of segments N, default `segments.max() + 1`.
        reduce: "mean" -> (B, N), None -> (B, Hq, R, N), "tokens" -> (B, S): each key's probability, a heat map.
        stop_early: end each forward after the last wanted layer; it then returns an empty `ModelOutput`. Not for `generate`.
        eos_token_ids: end tokens of `generate`, default those that `generate` ends with.
        cross_segments: (B, K) integer; segment of each key of the model's cross-attention layers (Mllama's K: pictures times tiles times
            patches), -1 = none. At such layers mass is on these; "tokens" is a map over K.

    Yields:
        `AttentionRecorder` with `.mass[layer]`.

    Raises:
        ValueError: a model that is not patched, layers it does not have, shapes that do not fit, a recorder that is already active, or a
            `generate` whose rows cannot be followed: beams, several sequences a prompt, contrastive or assisted decoding, guidance, and
            for more than one row stop strings or stopping criteria. At the end of the block: a layer that was not observed, layers that
            counted different rows, or a prompt that was not read as far as `segments` cover it; with what was seen instead.
    """
    state = patch_state(model)
    if state.recorder is not None:
        raise ValueError("record_attention: the model is already being recorded; recorders do not nest")
    tower = language_tower(model)
    wanted = _check_layers(layers, int(tower.config.num_hidden_layers))
    _check_attends("record_attention", wanted, state)
    if segments.ndim != 2 or segments.dtype.is_floating_point:
        raise ValueError(
            f"record_attention: segments must be an integer tensor (B, S), got {segments.dtype} {tuple(segments.shape)}"
        )
    if rows is not None and (rows.shape != segments.shape or rows.dtype != torch.bool):
        raise ValueError(
            f"record_attention: rows must be bool {tuple(segments.shape)} or None, got {rows.dtype} {tuple(rows.shape)}"
        )
    if reduce not in ("mean", "tokens", None):
        raise ValueError(f"record_attention: reduce must be 'mean', 'tokens' or None, got {reduce!r}")
    crossed = sorted(state.cross_layers.intersection(wanted))
    if crossed and cross_segments is None:
        raise ValueError(f"record_attention: layer {crossed[0]} attends to pictures and not to tokens; pass cross_segments")
    largest = max(int(each.max()) for each in (segments, cross_segments) if each is not None)
    count = largest + 1 if num_segments is None else num_segments
    recorder = AttentionRecorder(segments, rows, wanted, count, reduce, stop_early, cross_segments, state.cross_layers)
    recorder.ticket = ticket_of(recorder)
    with ExitStack() as undo:
        if rows is None:
            _follow_generate(model, recorder, None if eos_token_ids is None else tuple(eos_token_ids), undo)
        watch_decoder(tower, undo)
        if stop_early:
            replace_method(model, "forward", _stoppable, undo)
        state.recorder = recorder
        try:
            yield recorder
        finally:
            state.recorder = None
    recorder.check()


@contextmanager
def record_path_maps(model: nn.Module, paths: SequencePaths, *, layer: int) -> Iterator[PathMaps]:
    """Record where the counted rows of single sequences look, in one forward of a patched model, with a gradient.

    Equivalent to eager attention on each sequence by itself, `attentions[layer].mean(1)[rows].mean(0)`, without the S x S maps; a sequence
    sees its own path alone, so packing changes nothing. The gradient goes through the maps into the layer's queries and keys, also with
    non-reentrant gradient checkpointing. Beside it `record_attention` may record.

    Args:
        model: a patched model, or a PEFT model around one.
        paths: the sequences. Every counted row sees all that comes before it on its path but what a window or a mask of the model's hides.
        layer: decoder layer, 0-based.

    Raises:
        ValueError: a model that is not patched, a layer that it does not have, that attends to pictures alone, or that carries no gradient.
    """
    state = patch_state(model)
    count = int(language_tower(model).config.num_hidden_layers)
    if not 0 <= layer < count:
        raise ValueError(f"record_path_maps: layer must be one of the model's {count}, got {layer}")
    _check_attends("record_path_maps", [layer], state)
    if layer in state.cross_layers:
        raise ValueError(f"record_path_maps: layer {layer} attends to pictures and not to tokens; its maps have no path")
    if state.paths is not None:
        raise ValueError("record_path_maps: the model's maps are already being recorded")
    state.paths = PathMaps(paths, layer)
    try:
        yield state.paths
    finally:
        state.paths = None


def _stoppable(replaced: Replaced, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward that returns an empty output where a recorder ends it."""
    from transformers.modeling_outputs import BaseModelOutput

    try:
        return replaced.original()(*args, **kwargs)
    except ForwardStopped:
        return BaseModelOutput()


def _follow_generate(model: nn.Module, recorder: AttentionRecorder, ends: tuple[int, ...] | None, undo: ExitStack) -> None:
    """Let the recorder see the tokens that the model reads, and what `generate` was asked for."""
    # A PEFT model's `generate` calls that of the model inside.
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
    for module in {model, base}:
        watch_model(module, undo)
    recorder.end_with(_token_ids(_setting("eos_token_id", base, {})) if ends is None else ends, fixed=ends is not None)
    if hasattr(base, "generate"):
        replace_method(base, "generate", _followed, undo)


def _followed(replaced: Replaced, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A `generate` that tells its recorder where it begins and ends."""
    module, original = replaced.module, replaced.original()
    recorder = patch_state(module).recorder
    if recorder is None:  # a copy that was made while its original was recorded
        return original(*args, **kwargs)
    call = inspect.signature(original).bind_partial(*args, **kwargs)
    given = {**call.arguments, **call.arguments.get("kwargs", {})}
    _check_generate(module, given, batch=recorder.segments.shape[0])
    recorder.begin_generate(_token_ids(_setting("eos_token_id", module, given)))
    # Steps of a compiled forward would be made again for each number of tokens. Said in the caller's configuration where there is one:
    # transformers warns of an argument beside it.
    if given.get("generation_config") is None:
        result = original(*args, **{**kwargs, "disable_compile": True})
    else:
        call.arguments["generation_config"] = config = copy.copy(given["generation_config"])
        config.disable_compile = True
        result = original(*call.args, **call.kwargs)
    recorder.end_generate()
    return result


def _check_generate(model: Any, given: dict[str, Any], batch: int) -> None:
    """Refuse a `generate` call whose rows the recorder cannot follow."""
    for name, off in _NOT_FOLLOWED.items():
        value = _setting(name, model, given)
        if value is not None and value not in off:
            raise ValueError(
                f"record_attention: generate({name}={_shown(value)}) cannot be recorded; record greedy search or sampling, one sequence "
                "a prompt, or score the finished answers with rows="
            )
    for name in _OWN_ENDS:
        value = _setting(name, model, given)
        if batch > 1 and value:
            raise ValueError(
                f"record_attention: generate({name}={_shown(value)}) ends rows of a batch at steps that cannot be followed; "
                "generate one prompt at a time, or use eos_token_id"
            )
    if _setting("cache_implementation", model, given) == "paged":
        raise ValueError("record_attention: generate(cache_implementation='paged') cannot be recorded; use 'dynamic' or 'static'")


def _setting(name: str, model: Any, given: dict[str, Any]) -> Any:
    """What a `generate` call goes by: its own argument, its configuration's, the model's, or None."""
    sources = (given.get(name), getattr(given.get("generation_config"), name, None))
    found = next((value for value in sources if value is not None), None)
    return getattr(getattr(model, "generation_config", None), name, None) if found is None else found


def _token_ids(found: Any) -> tuple[int, ...]:
    return () if found is None else tuple(torch.as_tensor(found).flatten().tolist())


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, int | float | str | list) else type(value).__name__


def _check_attends(name: str, layers: Iterable[int], state: PatchState) -> None:
    carrying = sorted(state.carrying_layers.intersection(layers))
    if carrying:
        raise ValueError(
            f"{name}: layer {carrying[0]} carries a state and attends to nothing; layers {sorted(state.carrying_layers)} do"
        )


def _check_layers(layers: Iterable[int], available: int) -> tuple[int, ...]:
    wanted = tuple(layers)
    bad = [layer for layer in wanted if not -available <= layer < available]
    if bad or not wanted:
        raise ValueError(f"record_attention: layers must name some of the model's {available} layers, got {list(wanted)}")
    return tuple(layer % available for layer in wanted)
