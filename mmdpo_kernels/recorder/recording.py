"""`AttentionRecorder`: which rows of a running model count, which tokens their keys are, and the sums of their masses."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..ops.attention_mass import prepare_attention_mass
from .masks import cross_calls, positions_of, tree_calls
from .plan import LayerCall, Part, Plan
from .steps import Taken, WaitingSteps


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
        self._row_positions = None if rows is None else positions_of(rows)
        # Tokens that the model had read before its present forward and has read with it, and which of them is the first of `segments`.
        self._past = self._read = self._first = 0
        self.ticket = torch.empty(0)
        """What compiled code knows the recorder by, see `recorder_ops`."""
        self._input_ids: Tensor | None = None
        self._in_generate = self._prompt_begun = self._ends_are_fixed = False
        self._seen = Seen()
        self._end_tokens = torch.empty(0, dtype=torch.long)
        self._finished: Tensor | None = None
        self._steps = WaitingSteps(num_segments, reduce)
        self._plans: list[Plan] = []
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
        self._add_all(self._steps.take())
        if self.reduce is None:
            return {layer: torch.cat(parts, dim=2) for layer, parts in self._rows.items()}
        return {layer: total / self._counted[layer].clamp(min=1)[:, None] for layer, total in self._sums.items()}

    @property
    def counts(self) -> dict[int, Tensor]:
        """Per layer (B,): rows counted so far. Empty with `reduce=None`."""
        self._add_all(self._steps.take())
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
        self._add_all(self._steps.take())
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
        self._add_all(self._steps.take())
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
        if self._steps.keeps_keys(layer, key) and self._can_wait(plan, query, key, call):
            self._add_all(self._steps.wait(layer, plan, query, key, call))
            return
        self._add_all(self._steps.take(layer))
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

    def _can_wait(self, plan: Plan, query: Tensor, key: Tensor, call: LayerCall) -> bool:
        """Whether it is a decoding step whose keys are all tokens that were read: those of later steps hold them too."""
        step = self._row_positions is None and query.shape[2] == 1 and not plan.crosses
        return step and call.window is None and key.shape[2] == self._read

    def _plan(self, crosses: bool, query: Tensor, key: Tensor, call: LayerCall) -> Plan:
        """What this call and others like it in the same forward have in common."""
        rows = self._counted_rows(query)
        plan = Plan(crosses, query, key, call)
        if rows is None:
            return plan
        plan.index = rows.clamp(min=0)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
        parts: Iterable[tuple[slice, Tensor | None, Tensor]]
        if crosses:
            plan.segments, plan.num_keys = self._segments_of_images(key), key.shape[2]
            parts = cross_calls(call.mask, rows, key.shape[2])
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
        plan.parts = [Part(where, tree_end, places.int(), (places >= 0).sum(1)) for where, tree_end, places in parts]
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

    def _add_all(self, taken: Iterable[Taken]) -> None:
        for layer, found, counted in taken:
            self._add(layer, found, counted)

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
