"""`AttentionRecorder`: which rows of a running model count, which tokens their keys are, and the sums of their masses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .ops.attention_mass import PreparedMass, attention_mass, prepare_attention_mass
from .tree_mask import visible_rows


class LayerCall(NamedTuple):
    """One attention call of a model, beside its query (B, Hq, L, D) and key (B, Hkv, K, D)."""

    tree_end: Tensor | None
    """(B, K); None: `mask`, or causal."""
    mask: Tensor | None
    """(B or 1, 1, L, K) bool, or 0 and -inf."""
    scale: float | None
    softcap: float | None
    window: int | None
    backend: str
    """Of `attention_mass`."""
    reach: Tensor | None = None
    """(B, K), beside `tree_end`; None: no row looks ahead."""


@dataclass
class _Part:
    """Counted rows that one call of `attention_mass` serves."""

    rows: slice
    tree_end: Tensor | None
    """(B, K)"""
    positions: Tensor
    """(B, R), -1 = unused."""
    counted: Tensor
    """(B,)"""
    mass: PreparedMass | None = None
    joined: tuple[Tensor | None, Tensor | None] | None = None
    """Of a decoding step: what `_Waiting.seen` was before it, and is with it; None: not known, or they do not go together."""


_STEPS_TOGETHER = 16
"""Decoding steps whose rows are one call: reading the keys is what a row costs, and on a CPU eight rows cost no more than one."""


@dataclass
class _Waiting:
    """Decoding steps of a layer whose masses are still to be taken, from keys that hold those of every step."""

    queries: list[Tensor]
    """(B, Hq, 1, D) a step."""
    positions: list[Tensor]
    """(B, 1) a step."""
    key: Tensor
    """Of the last step, as the rest."""
    seen: Tensor | None
    """(B, K) bool: the keys that rows see which come after them; None: all."""
    segments: Tensor
    call: LayerCall


class _Plan:
    """What attention calls of one forward that differ in their numbers alone have in common: most layers of most models."""

    def __init__(self, crosses: bool, query: Tensor, key: Tensor, call: LayerCall) -> None:
        self.crosses = crosses
        self.index: Tensor | None = None
        """(B, Hq, R, D) of the counted rows, for `gather`; None where no row counts."""
        self.segments = torch.empty(0)
        """(B, K)"""
        self.first_key = self.num_keys = 0
        """The token that the first key is of, and keys that are there from it on."""
        self.parts: list[_Part] = []
        self._call, self._kind = call, _kind(query, key, call)

    def serves(self, crosses: bool, query: Tensor, key: Tensor, call: LayerCall) -> bool:
        """Whether another call is like this one."""
        alike = crosses == self.crosses and _kind(query, key, call) == self._kind
        mine = self._call
        return alike and all(map(_same, (call.tree_end, call.reach, call.mask), (mine.tree_end, mine.reach, mine.mask)))


def _goes_with(part: _Part, waiting: _Waiting, length: int) -> bool:
    """Whether a decoding step sees what the waiting ones see and one token more; a window, for one, moves on. Sets `part.joined`."""
    if length != waiting.key.shape[2] + 1 or (part.tree_end is None) != (waiting.seen is None):
        return False
    if part.joined is not None and part.joined[0] is waiting.seen:
        return True  # as in the layer before
    if part.tree_end is None or waiting.seen is None:
        part.joined = None, None
        return True
    # A row that has ended sees nothing any more, and its earlier steps what they saw.
    used, seen = part.positions >= 0, part.tree_end >= length
    before = pad(waiting.seen, (0, 1))
    if not bool(((seen == before)[:, :-1] | ~used).all()):
        return False
    part.joined = waiting.seen, torch.where(used, seen, before)
    return True


def _kind(query: Tensor, key: Tensor, call: LayerCall) -> tuple[object, ...]:
    sizes = query.shape, key.shape, query.dtype, key.dtype, query.device, key.device
    return *sizes, call.scale, call.softcap, call.window, call.backend


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether they are one memory: layers are given views of one mask."""
    if one is None or other is None or one is other:
        return one is other
    return one.data_ptr() == other.data_ptr() and one.shape == other.shape and one.stride() == other.stride()


class ForwardStopped(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward after the last wanted layer. Escapes only where a part of the recorded model is called by itself."""

    def __str__(self) -> str:
        return "record_attention(stop_early=True) ended this forward; call the model that was given to it, not one of its parts"


class Seen:
    """What a recorder saw of its model, in words for its errors."""

    def __init__(self) -> None:
        self.forwards = 0
        self.layers: Counter[int] = Counter()
        """How often each layer's attention ran."""
        self._last = 0, 0
        self._most = 0

    def forward(self, past: int, length: int) -> None:
        """A forward of the decoder, of `length` tokens after `past` in its cache."""
        self.forwards, self._last, self._most = self.forwards + 1, (past, length), max(self._most, length)

    def __str__(self) -> str:
        past, length = self._last
        calls = ", ".join(f"{layer}: {count}" for layer, count in sorted(self.layers.items()))
        return f"{self.forwards} forwards of at most {self._most} tokens, the last of {length} after {past} in its cache; " + (
            f"attention of layers (times) {calls}" if calls else "the attention function was never reached"
        )


class AttentionRecorder:
    """What `record_attention` yields; read `.mass[layer]` inside or after the `with` block."""

    def __init__(
        self,
        segments: Tensor,  # (B, S)
        rows: Tensor | None,  # (B, S)
        layers: tuple[int, ...],
        num_segments: int,
        reduce: str | None,
        stop_early: bool,
        cross_segments: Tensor | None = None,  # (B, K)
        cross_layers: frozenset[int] = frozenset(),
    ) -> None:
        self.cross_segments = None if cross_segments is None else cross_segments.to(torch.int32)
        self._cross_layers = cross_layers
        self.segments = segments.to(torch.int32)
        self.layers = layers
        self.num_segments = num_segments
        self.reduce = reduce
        self._wanted = frozenset(layers)
        self._stop_after = max(layers) if stop_early else None
        self._row_positions = None if rows is None else _positions(rows)
        # Tokens that the model had read before its present forward and has read with it, and which of them is the first of `segments`.
        self._past = self._read = self._first = 0
        self.ticket = torch.empty(0)
        """What compiled code knows the recorder by, see `recorder_ops`."""
        self._input_ids: Tensor | None = None
        self._in_generate = self._prompt_begun = self._ends_are_fixed = False
        self._seen = Seen()
        self._end_tokens = torch.empty(0, dtype=torch.long)
        self._finished: Tensor | None = None
        self._waiting: dict[int, _Waiting] = {}
        self._addresses: dict[int, int] = {}
        """Where each layer's keys were in its last call that counted rows."""
        self._plans: list[_Plan] = []
        """Of the present forward."""
        self._sums: dict[int, Tensor] = {}
        self._rows: dict[int, list[Tensor]] = {}
        self._counted: dict[int, Tensor] = {}
        """Per layer (B,): rows counted so far, whatever `reduce` is."""

    @property
    def mass(self) -> dict[int, Tensor]:
        """Per layer: (B, N) mean over heads and counted rows, (B, S) per key, or (B, Hq, R, N), as `reduce` says.

        Column t of a per-key map is the t-th token that the model has read, so `generate` appends columns.
        """
        self._take_waiting()
        if self.reduce is None:
            return {layer: torch.cat(parts, dim=2) for layer, parts in self._rows.items()}
        return {layer: total / self._counted[layer].clamp(min=1)[:, None] for layer, total in self._sums.items()}

    @property
    def counts(self) -> dict[int, Tensor]:
        """Per layer (B,): rows counted so far. Empty with `reduce=None`."""
        self._take_waiting()
        return {} if self.reduce is None else self._counted

    @property
    def prompt_is_read(self) -> bool:
        """Whether the model has read as many tokens as `segments` cover."""
        return self._read >= self._first + self.segments.shape[1]

    def end_with(self, token_ids: tuple[int, ...], *, fixed: bool) -> None:
        """End tokens of the `generate` calls to come; `fixed`: whatever these themselves end with."""
        self._end_tokens = torch.tensor(token_ids, dtype=torch.long)
        self._ends_are_fixed = fixed

    def begin_generate(self, end_tokens: tuple[int, ...]) -> None:
        """A call of `generate` begins, which ends rows with these tokens."""
        if not self._ends_are_fixed:
            self._end_tokens = torch.tensor(end_tokens, dtype=torch.long)
        self._in_generate, self._prompt_begun = True, False

    def end_generate(self) -> None:
        """It has ended. Raises ValueError where its prompt was not read as far as `segments` cover it."""
        self._in_generate = False
        self._check_prompt()

    def before_model(self, input_ids: Tensor | None) -> None:
        """The model is called with these ids (B, L), or with embeddings."""
        self._input_ids = input_ids

    def before_decoder(self, past: int, length: int) -> None:
        """The decoder is about to read `length` tokens, after `past` tokens that its cache knows.

        Raises:
            ValueError: in `generate`, a prompt longer than `segments`, or a forward that does not go on where the last one ended.
        """
        self._seen.forward(past, length)
        self._plans.clear()
        if self._row_positions is not None:
            self._first = past
        elif self.prompt_is_read and past + length == self._read + 1 and not self._awaits_prompt:
            self._read_emitted_token()
        elif self._in_generate and self._prompt_begun and (self.prompt_is_read or past != self._read):
            raise ValueError(
                f"record_attention: a forward of generate read {length} tokens after {past} in its cache, {self._read} were read before it: "
                f"expected {'one more in all' if self.prompt_is_read else 'the next piece of the prompt'}; is the decoder given its cache, "
                "an object with get_seq_length(), and this as long as what was read?"
            )
        elif self._awaits_prompt or past == 0 or past != self._read or self.prompt_is_read:  # not the next chunk of one prompt
            self._begin_prompt(past, length)
        self._prompt_begun = True
        self._past, self._read = past, past + length

    @property
    def _awaits_prompt(self) -> bool:
        """Whether a `generate` has begun that has read nothing yet."""
        return self._in_generate and not self._prompt_begun

    def _read_emitted_token(self) -> None:
        """A row that has emitted an end token emits nothing more."""
        if self._input_ids is not None and self._finished is not None:
            ended = torch.isin(self._input_ids[:, -1], self._end_tokens.to(self._input_ids.device))
            self._finished |= ended.to(self._finished.device)

    def _begin_prompt(self, past: int, length: int) -> None:
        self._take_waiting()
        # A cache may begin with tokens that `segments` leave out, such as a tuned prefix or an earlier turn.
        self._first = max(0, past + length - self.segments.shape[1])
        if self._first > past:
            raise ValueError(f"record_attention: segments cover {self.segments.shape[1]} tokens, the prompt has {length}")
        self._finished = torch.zeros(self.segments.shape[0], dtype=torch.bool, device=self.segments.device)

    def observe(
        self,
        layer: int,
        query: Tensor,  # (B, Hq, L, D)
        key: Tensor,  # (B, Hkv, K, D)
        call: LayerCall,
    ) -> None:
        """Add one attention call of the model. Raises `ForwardStopped` after the last wanted layer of an early-stopping recorder."""
        # A checkpointed layer runs again inside backward; its rows are counted already.
        if torch._C._current_graph_task_id() != -1:
            return
        self._seen.layers[layer] += 1
        if layer not in self._wanted:
            return
        self._observe(layer, query, key, call)
        if layer == self._stop_after:
            raise ForwardStopped

    def check(self) -> None:
        """At the end of a recording: that it counted what it was asked for, in every layer the same rows. Raises ValueError."""
        self._plans.clear()
        self._take_waiting()
        if not self._seen.forwards and not self._seen.layers:
            raise ValueError(
                "record_attention: no forward of the recorded model was seen, so nothing was counted; run the model that was given to it, "
                "not a copy or another one, inside the block"
            )
        if self._row_positions is None:
            self._check_prompt()
        missing = [layer for layer in sorted(self._wanted) if layer not in self._counted]
        if missing:
            raise ValueError(f"record_attention: layers {missing} were asked for and counted nothing; seen: {self._seen}")
        rows = {layer: counted.tolist() for layer, counted in sorted(self._counted.items())}
        if len({tuple(each) for each in rows.values()}) > 1:
            raise ValueError(f"record_attention: layers counted different numbers of rows, {rows}; seen: {self._seen}")

    def _check_prompt(self) -> None:
        if self._seen.forwards and not self.prompt_is_read:
            raise ValueError(
                f"record_attention: segments cover {self.segments.shape[1]} tokens and the model read {self._read - self._first}, so no row "
                f"that emits a token was counted; seen: {self._seen}"
            )

    @torch.no_grad()
    def _observe(self, layer: int, query: Tensor, key: Tensor, call: LayerCall) -> None:
        plan = next((plan for plan in self._plans if plan.serves(layer in self._cross_layers, query, key, call)), None)
        if plan is None:
            plan = self._plan(layer in self._cross_layers, query, key, call)
            self._plans.append(plan)
        if plan.index is None:
            return
        # A cache that grows gives new memory each time; one of fixed size writes over what earlier steps saw.
        address, self._addresses[layer] = self._addresses.get(layer), key.data_ptr()
        if address not in (None, key.data_ptr()) and self._can_wait(plan, query, key, call):
            self._wait(layer, plan, query, key, call)
            return
        self._take_waiting(layer)
        # A decoding step has no other row than the one that counts.
        queries = query if query.shape[2] == 1 else query.gather(2, plan.index)
        for part in plan.parts:
            if part.mass is None:
                part.mass = prepare_attention_mass(
                    queries[:, :, part.rows],
                    key,
                    plan.segments,
                    row_positions=part.positions,
                    num_segments=self.num_segments,
                    tree_end=part.tree_end,
                    reach=call.reach,
                    scale=call.scale,
                    softcap=call.softcap,
                    window=None if plan.crosses else call.window,
                    reduce=self.reduce,
                    backend=call.backend,
                )
            found = part.mass(queries[:, :, part.rows], key)
            if self.reduce == "tokens":
                found = pad(found[:, : plan.num_keys], (plan.first_key, 0))
            self._add(layer, found, part.counted)

    def _can_wait(self, plan: _Plan, query: Tensor, key: Tensor, call: LayerCall) -> bool:
        """Whether it is a decoding step whose keys are all tokens that were read: those of later steps hold them too."""
        step = self._row_positions is None and query.shape[2] == 1 and not plan.crosses
        return step and call.window is None and key.shape[2] == self._read

    def _wait(self, layer: int, plan: _Plan, query: Tensor, key: Tensor, call: LayerCall) -> None:
        [part] = plan.parts
        waiting = self._waiting.get(layer)
        if waiting is not None and not _goes_with(part, waiting, key.shape[2]):
            self._take_waiting(layer)
            waiting = None
        if waiting is None:
            seen = None if part.tree_end is None else part.tree_end >= key.shape[2]
            waiting = self._waiting[layer] = _Waiting([], [], key, seen, plan.segments, call)
        elif part.joined is not None:
            waiting.seen = part.joined[1]
        # Of these only the newest are needed, and older keys would be kept from being freed.
        waiting.key, waiting.segments = key.detach(), plan.segments
        waiting.queries.append(query.clone())
        waiting.positions.append(part.positions)
        if len(waiting.queries) == _STEPS_TOGETHER:
            self._take_waiting(layer)

    @torch.no_grad()
    def _take_waiting(self, *layers: int) -> None:
        """Add the masses of steps that wait, of some layers or all."""
        for layer in layers or tuple(self._waiting):
            waiting = self._waiting.pop(layer, None)
            if waiting is None:
                continue
            positions, call = torch.cat(waiting.positions, dim=1), waiting.call
            tree_end = None
            if waiting.seen is not None:
                index = torch.arange(waiting.key.shape[2], dtype=torch.int32, device=waiting.key.device)
                tree_end = torch.where(waiting.seen, waiting.key.shape[2], index).to(torch.int32)
            found = attention_mass(
                torch.cat(waiting.queries, dim=2),
                waiting.key,
                waiting.segments,
                row_positions=positions,
                num_segments=self.num_segments,
                tree_end=tree_end,
                scale=call.scale,
                softcap=call.softcap,
                reduce=self.reduce,
                backend=call.backend,
            )
            self._add(layer, found, (positions >= 0).sum(1))

    def _plan(self, crosses: bool, query: Tensor, key: Tensor, call: LayerCall) -> _Plan:
        """What this call and others like it in the same forward have in common."""
        rows = self._counted_rows(query)
        plan = _Plan(crosses, query, key, call)
        if rows is None:
            return plan
        plan.index = rows.clamp(min=0)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        parts: Iterable[tuple[slice, Tensor | None, Tensor]]
        if crosses:
            plan.segments, plan.num_keys = self._segments_of_images(key), key.shape[2]
            parts = _cross_calls(call.mask, rows, key.shape[2])
        else:
            # A sliding cache gives its last keys in order; one of fixed size has empty slots after the last token.
            plan.first_key = max(0, self._read - key.shape[2])
            plan.num_keys = self._read - plan.first_key
            positions = (rows + self._read - query.shape[2] - plan.first_key).masked_fill(rows < 0, -1)
            plan.segments = self._segments_of_keys(key, plan.first_key)
            parts = [(slice(None), call.tree_end, positions)]
            if call.mask is not None:
                parts = tree_calls(call.mask, rows, positions, key.shape[2])
        # As kernels take them: what is made here once is not made for each layer.
        plan.parts = [_Part(where, tree_end, places.int(), (places >= 0).sum(1)) for where, tree_end, places in parts]
        return plan

    def _counted_rows(self, query: Tensor) -> Tensor | None:
        """(B, R) int64 rows of `query` to count, -1 = unused; None where the forward emits no token."""
        batch, length = query.shape[0], query.shape[2]
        if batch != self.segments.shape[0]:
            raise ValueError(
                f"record_attention: segments and rows are for a batch of {self.segments.shape[0]}, the model was called with {batch}"
            )
        # In generate, layers that take keys of earlier layers may be left with the last row alone.
        if length != self._read - self._past and (length > 1 or not self._in_generate):
            raise ValueError("record_attention: call the model that was given to it, not one of its parts")
        if self._row_positions is not None:
            if length != self.segments.shape[1]:
                raise ValueError(
                    f"record_attention: rows cover {self.segments.shape[1]} tokens, the model was called with {length}; "
                    "use rows=None in generate"
                )
            return self._row_positions.to(query.device)
        if not self.prompt_is_read:
            return None
        last = torch.full((batch, 1), length - 1, device=query.device)
        return last if self._finished is None else last.masked_fill(self._finished[:, None].to(query.device), -1)

    def _segments_of_keys(self, key: Tensor, first_key: int) -> Tensor:
        """(B, K): the segments of the tokens from `first_key` on, -1 where a key is before or after the segments' tokens."""
        shift = first_key - self._first
        segments = self.segments[:, max(0, shift) :].to(key.device)
        before = max(0, -shift)
        return pad(segments, (before, key.shape[2] - before - segments.shape[1]), value=-1)

    def _segments_of_images(self, key: Tensor) -> Tensor:
        """(B, K): the segments of a cross-attention layer's keys."""
        if self.cross_segments is None or self.cross_segments.shape[1] != key.shape[2]:
            given = "none" if self.cross_segments is None else f"those of {self.cross_segments.shape[1]}"
            raise ValueError(
                f"record_attention: cross_segments must cover the {key.shape[2]} keys of a cross-attention layer, got {given}"
            )
        return self.cross_segments.to(key.device)

    def _add(self, layer: int, found: Tensor, counted: Tensor) -> None:
        self._counted[layer] = self._counted.get(layer, 0) + counted
        if self.reduce is None:
            self._rows.setdefault(layer, []).append(found)
            return
        found = found * counted[:, None]
        total = self._sums.get(layer)
        if total is None:
            self._sums[layer] = found
            return
        longer = max(total.shape[1], found.shape[1])
        self._sums[layer] = pad(total, (0, longer - total.shape[1])) + pad(found, (0, longer - found.shape[1]))


def _positions(rows: Tensor) -> Tensor:
    """(B, S) bool -> (B, R) indices of the true entries, in order, padded with -1."""
    longest = max(1, int(rows.sum(1).max())) if rows.numel() else 1
    # A stable sort of "not wanted" brings the wanted indices to the front in order.
    order = torch.argsort(~rows, dim=1, stable=True)[:, :longest]
    return order.masked_fill(~rows.gather(1, order), -1)


def tree_calls(
    mask: Tensor,  # (B or 1, 1, L, >= K)
    rows: Tensor,  # (B, R)
    positions: Tensor,  # (B, R)
    length: int,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """The counted rows of a mask as calls of `attention_mass`: rows, their `tree_end` (B, K), their positions.

    Padding, windows and packed sequences follow the tree rule, each key being seen up to one row: one call. Other masks, such as
    pictures that see themselves both ways, take a call a row.
    """
    seen = _seen(mask, rows, length)
    index = torch.arange(length, dtype=torch.int32, device=mask.device)
    if rows.shape[1] > 1:
        last = torch.where(seen, positions[:, :, None], -1).amax(1)
        tree_end = torch.maximum(last + 1, index).to(torch.int32)
        if torch.equal(visible_rows(positions, tree_end), seen):
            yield slice(None), tree_end, positions
            return
    for row in range(rows.shape[1]):
        # A row alone stands after all keys and sees those that are not ended.
        its_positions = torch.where(positions[:, row : row + 1] >= 0, length - 1, -1)
        yield slice(row, row + 1), torch.where(seen[:, row], length, index).to(torch.int32), its_positions


def _cross_calls(
    mask: Tensor | None,  # (B or 1, 1, L, K)
    rows: Tensor,  # (B, R)
    length: int,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """As `tree_calls`, for keys without an order: all rows that see the same keys, as those behind the last picture do, in one call."""
    used = rows >= 0
    seen = used[:, :, None].expand(-1, -1, length) if mask is None else _seen(mask, rows, length)
    index = torch.arange(length, dtype=torch.int32, device=rows.device)
    either = seen.any(1, keepdim=True)
    alike = bool((seen == (either & used[:, :, None])).all())
    for part in [slice(None)] if alike else [slice(row, row + 1) for row in range(rows.shape[1])]:
        visible = seen[:, part].any(1)
        yield part, torch.where(visible, length, index).to(torch.int32), torch.where(used[:, part], length - 1, -1)


def _seen(mask: Tensor, rows: Tensor, length: int) -> Tensor:
    """(B, R, K) bool: which keys each counted row sees; none where the row is unused."""
    if mask.shape[1] != 1:
        raise ValueError(f"record_attention: an attention mask of one head is needed, got {tuple(mask.shape)}")
    chosen = mask[:, 0, :, :length].expand(rows.shape[0], -1, -1)
    chosen = chosen.gather(1, rows.clamp(min=0)[:, :, None].expand(-1, -1, length))
    if chosen.dtype != torch.bool:
        lowest = torch.finfo(chosen.dtype).min / 2
        if not bool(((chosen == 0) | (chosen < lowest)).all()):
            raise ValueError(
                "record_attention: an additive attention mask must hold 0 and the lowest number only, got other values"
            )
        chosen = chosen == 0
    return chosen & (rows >= 0)[:, :, None]
