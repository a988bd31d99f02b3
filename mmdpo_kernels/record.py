"""`record_attention`: attention mass per picture from a patched model's own forwards, at the layers asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .ops.attention_mass import attention_mass
from .patch import language_tower, patch_state


class _ForwardStopped(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward after the last wanted layer. Escapes only where a part of the recorded model is called by itself."""

    def __str__(self) -> str:
        return "record_attention(stop_early=True) ended this forward; call the model that was given to it, not one of its parts"


class AttentionRecorder:
    """What `record_attention` yields; read `.mass[layer]` inside or after the `with` block."""

    def __init__(
        self,
        segments: Tensor,
        rows: Tensor | None,
        layers: tuple[int, ...],
        num_segments: int,
        reduce: str | None,
        stop_early: bool,
        eos_token_ids: tuple[int, ...],
    ) -> None:
        self.segments = segments.to(torch.int32)
        self.layers = layers
        self.num_segments = num_segments
        self.reduce = reduce
        self._stop_after = max(layers) if stop_early else None
        self._row_positions = None if rows is None else _positions(rows)
        self._eos = torch.tensor(eos_token_ids, dtype=torch.long)
        self._finished: Tensor | None = None
        self._tokens: Tensor | None = None
        self._sums: dict[int, Tensor] = {}
        self._counts: dict[int, Tensor] = {}
        self._rows: dict[int, list[Tensor]] = {}

    @property
    def mass(self) -> dict[int, Tensor]:
        """Per layer: (B, N) mean over heads and counted rows, (B, S) per key, or (B, Hq, R, N), as `reduce` says."""
        if self.reduce is None:
            return {layer: torch.cat(parts, dim=2) for layer, parts in self._rows.items()}
        return {layer: total / self._counts[layer].clamp(min=1)[:, None] for layer, total in self._sums.items()}

    @property
    def counts(self) -> dict[int, Tensor]:
        """Per layer (B,): rows counted so far. Empty with `reduce=None`."""
        return self._counts

    def watch_tokens(self, input_ids: Tensor) -> None:
        """Follow which rows of a `generate` batch have ended: a row that reads an end token emits nothing more."""
        before, self._tokens = self._tokens, input_ids
        # Without a cache each step reads the whole sequence again, one token longer.
        longer = before is not None and input_ids.shape[1] == before.shape[1] + 1 and torch.equal(input_ids[:, :-1], before)
        if self._finished is None or (input_ids.shape[1] > 1 and not longer):
            self.begin(input_ids)
        else:
            self._finished |= torch.isin(input_ids[:, -1], self._eos.to(input_ids.device))

    def begin(self, prompt: Tensor) -> None:
        """A `generate` begins with this prompt, ids or embeddings (B, ...): no row has ended."""
        self._finished = torch.zeros(prompt.shape[0], dtype=torch.bool, device=prompt.device)

    @torch.no_grad()
    def observe(
        self,
        module: nn.Module,
        query: Tensor,  # (B, Hq, R, D)
        key: Tensor,  # (B, Hkv, S, D)
        *,
        tree_end: Tensor | None,  # (B, S)
        mask: Tensor | None,  # (B, 1, R, S) bool or additive
        scale: float | None,
        softcap: float | None,
        window: int | None,
        backend: str,
    ) -> None:
        """Add one attention call of the model. Raises `_ForwardStopped` after the last wanted layer of an early-stopping recorder."""
        layer = int(module.layer_idx)  # type: ignore[arg-type]
        # A checkpointed layer runs again inside backward; its rows are counted already.
        if layer not in self.layers or torch._C._current_graph_task_id() != -1:
            return
        positions = self._positions_for(query, key)
        index = positions.clamp(min=0).long()
        queries = query.gather(2, index[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))
        if tree_end is None and mask is not None:
            tree_end, positions = _tree_of(mask, positions, key.shape[2])
        elif query.shape[2] == 1:
            # Decoding; a longer query over a larger static cache stands at the cache's start.
            positions = positions.masked_fill(positions >= 0, key.shape[2] - 1)
        found = attention_mass(
            queries,
            key,
            self._segments_for(key),
            row_positions=positions,
            num_segments=self.num_segments,
            tree_end=tree_end,
            scale=scale,
            softcap=softcap,
            window=window,
            reduce=self.reduce,
            backend=backend,
        )
        self._add(layer, found, (positions >= 0).sum(1))
        if layer == self._stop_after:
            raise _ForwardStopped

    def _positions_for(self, query: Tensor, key: Tensor) -> Tensor:
        """(B, R) rows of `query` to count, -1 = unused."""
        if query.shape[0] != self.segments.shape[0]:
            raise ValueError(
                f"record_attention: segments and rows are for a batch of {self.segments.shape[0]}, the model was called with {query.shape[0]}"
            )
        if self._row_positions is None:
            last = torch.full((query.shape[0], 1), query.shape[2] - 1, device=query.device)
            return last if self._finished is None else last.masked_fill(self._finished[:, None], -1)
        if query.shape[2] != self.segments.shape[1]:
            raise ValueError(
                f"record_attention: rows cover {self.segments.shape[1]} tokens, the model was called with {query.shape[2]}; "
                "use rows=None in generate"
            )
        return self._row_positions.to(query.device)

    def _segments_for(self, key: Tensor) -> Tensor:
        """Segments padded with -1 for the keys that decoding appended."""
        missing = key.shape[2] - self.segments.shape[1]
        if missing < 0:
            raise ValueError(
                f"record_attention: {key.shape[2]} keys for {self.segments.shape[1]} segments; a sliding cache has dropped keys, use a full one"
            )
        return torch.nn.functional.pad(self.segments.to(key.device), (0, missing), value=-1)

    def _add(self, layer: int, found: Tensor, counted: Tensor) -> None:
        if self.reduce is None:
            self._rows.setdefault(layer, []).append(found)
            return
        found = found * counted[:, None]
        total = self._sums.get(layer)
        if total is None:
            self._sums[layer], self._counts[layer] = found, counted
            return
        longer = max(total.shape[1], found.shape[1])
        pad = torch.nn.functional.pad
        self._sums[layer] = pad(total, (0, longer - total.shape[1])) + pad(found, (0, longer - found.shape[1]))
        self._counts[layer] = self._counts[layer] + counted


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
) -> Iterator[AttentionRecorder]:
    """Record how much attention query rows put on each segment, while a patched model runs.

    Equivalent to a forward with eager attention and `output_attentions=True`, then
    `attentions[layer].mean(1)[rows] @ one_hot(segments)`, without the S x S maps. One `with` may span several forwards: masses are then
    averages over all counted rows. Recomputation of checkpointed layers is not counted. No gradient.

    Args:
        model: a patched model, or a PEFT model around one.
        segments: (B, S) integer; segment of each token, -1 = none. See `image_segments`.
        rows: (B, S) bool; query rows that count (a row predicts the next token). None, in `generate`: every row that emits a token.
        layers: decoder layers, 0-based; negative counts from the end.
        num_segments: number of segments N, default `segments.max() + 1`.
        reduce: "mean" -> (B, N), None -> (B, Hq, R, N), "tokens" -> (B, S): each key's probability, a heat map.
        stop_early: end each forward after the last wanted layer; it then returns an empty `ModelOutput`. Not for `generate`.
        eos_token_ids: end tokens of `generate`, default the model's generation configuration.

    Yields:
        `AttentionRecorder` with `.mass[layer]`.

    Raises:
        ValueError: a model that is not patched, layers it does not have, shapes that do not fit, or a recorder that is already active.
    """
    state = patch_state(model)
    if state.recorder is not None:
        raise ValueError("record_attention: the model is already being recorded; recorders do not nest")
    wanted = _check_layers(layers, int(language_tower(model).config.num_hidden_layers))
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
    count = int(segments.max()) + 1 if num_segments is None else num_segments
    ends = _eos_token_ids(model) if eos_token_ids is None else tuple(eos_token_ids)
    recorder = AttentionRecorder(segments, rows, wanted, count, reduce, stop_early, ends)
    watched = _with_base(model) if rows is None else []
    hooks = [module.register_forward_pre_hook(_watch(recorder), with_kwargs=True) for module in watched]
    state.recorder = recorder
    try:
        with _stoppable(model) if stop_early else _nothing():
            yield recorder
    finally:
        state.recorder = None
        for hook in hooks:
            hook.remove()


@contextmanager
def _stoppable(model: nn.Module) -> Iterator[None]:
    """Make `model(...)` return an empty output where a recorder ends the forward."""
    from transformers.modeling_outputs import BaseModelOutput

    had_own = "forward" in model.__dict__
    original = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except _ForwardStopped:
            return BaseModelOutput()

    model.forward = forward
    try:
        yield
    finally:
        if had_own:
            model.forward = original
        else:
            del model.forward


@contextmanager
def _nothing() -> Iterator[None]:
    yield


def _watch(recorder: AttentionRecorder) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is not None:
            recorder.watch_tokens(ids)
        elif kwargs.get("inputs_embeds") is not None:
            recorder.begin(kwargs["inputs_embeds"])

    return hook


def _with_base(model: nn.Module) -> list[nn.Module]:
    """The model and, under PEFT, the model inside: a PEFT model's `generate` calls only that one."""
    if not hasattr(model, "get_base_model"):
        return [model]
    return [model, model.get_base_model()]  # type: ignore[operator]


def _eos_token_ids(model: nn.Module) -> tuple[int, ...]:
    config = getattr(model, "generation_config", None)
    found = getattr(config, "eos_token_id", None)
    if found is None:
        return ()
    return (found,) if isinstance(found, int) else tuple(found)


def _check_layers(layers: Iterable[int], available: int) -> tuple[int, ...]:
    wanted = tuple(layers)
    bad = [layer for layer in wanted if not -available <= layer < available]
    if bad or not wanted:
        raise ValueError(f"record_attention: layers must name some of the model's {available} layers, got {list(wanted)}")
    return tuple(layer % available for layer in wanted)


def _positions(rows: Tensor) -> Tensor:
    """(B, S) bool -> (B, R) indices of the true entries, in order, padded with -1."""
    longest = max(1, int(rows.sum(1).max())) if rows.numel() else 1
    # A stable sort of "not wanted" brings the wanted indices to the front in order.
    order = torch.argsort(~rows, dim=1, stable=True)[:, :longest]
    return order.masked_fill(~rows.gather(1, order), -1)


def _tree_of(mask: Tensor, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """A one-row mask (decoding) as `tree_end` and row positions: visible keys last to the end, the row stands at the last key."""
    if positions.shape[1] != 1:
        raise ValueError(
            "record_attention: attention masks other than causal with padding can be recorded for one query row a forward only; "
            f"got {positions.shape[1]} rows"
        )
    row = mask[:, 0].gather(1, positions.clamp(min=0).long()[:, :, None].expand(-1, -1, mask.shape[-1]))[:, 0, :length]
    seen = row if row.dtype == torch.bool else row == 0
    index = torch.arange(length, dtype=torch.int32, device=mask.device)
    return torch.where(seen, length, index).to(torch.int32), positions.masked_fill(positions >= 0, length - 1)
