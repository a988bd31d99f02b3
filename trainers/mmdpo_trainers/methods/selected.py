"""Which of the score records become pairs: by their place in the file, with some bytes of each, as there may be millions."""

from __future__ import annotations

import math
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from mmdpo_trainers.data.seeds import batch_seed
from mmdpo_trainers.methods.selection import RULES, Ratios, SelectionRules

Record = Mapping[str, Any]
Failing = Callable[[Record], Sequence[str]]

_BIT = {rule: 1 << place for place, rule in enumerate(RULES)}


@dataclass
class Facts:
    """What selection goes by, of records in their order."""

    kinds: list[tuple[str, int]] = field(default_factory=list)
    """(format, number of pictures) that there are."""
    kind: array[int] = field(default_factory=lambda: array("H"))
    """Of each record the place of its kind in `kinds`."""
    ratio: array[float] = field(default_factory=lambda: array("d"))
    """Attention ratios; nan: none."""
    failed: dict[str, array[int]] = field(default_factory=dict)
    """By name of a set of rules, the rules that each record fails, as bits in the order of `RULES`."""

    @classmethod
    def of(cls, records: Iterable[Record], failing: Mapping[str, Failing]) -> Facts:
        """Of some records, by the sets of rules."""
        facts = cls(failed={name: array("H") for name in failing})
        for record in records:
            facts.kind.append(facts._place((record["format"], record["num_images"])))
            facts.ratio.append(math.nan if record.get("ratio") is None else record["ratio"])
            for name, rules in failing.items():
                facts.failed[name].append(bits_of(rules(record)))
        return facts

    def extend(self, other: Facts) -> None:
        """Add the records that follow."""
        places = [self._place(kind) for kind in other.kinds]
        self.kind.extend(array("H", [places[kind] for kind in other.kind]))
        self.ratio.extend(other.ratio)
        for name, bits in other.failed.items():
            self.failed.setdefault(name, array("H")).extend(bits)

    def _place(self, kind: tuple[str, int]) -> int:
        if kind not in self.kinds:
            self.kinds.append(kind)
        return self.kinds.index(kind)

    def __len__(self) -> int:
        return len(self.kind)

    def formats(self) -> dict[str, int]:
        """Records by format."""
        return self._by_format(np.asarray(self.kind))

    def _by_format(self, kind: np.ndarray) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for (name, _), count in zip(self.kinds, np.bincount(kind, minlength=len(self.kinds)).tolist(), strict=True):
            counts[name] += count
        return dict(counts)

    def ratios(self, rules: str) -> Ratios:
        """The ratios by kind; rules: the set that says what is right and what is wrong."""
        kind, ratio, failed = np.asarray(self.kind), np.asarray(self.ratio), np.asarray(self.failed[rules])
        told = ~np.isnan(ratio)
        silent = _has(failed, "no_truth", "empty_response")
        right, wrong = _has(failed, "answer") & ~silent, ~_has(failed, "answer", "unclear") & ~silent
        return {
            each: (ratio[its], ratio[its & right], ratio[its & wrong])
            for place, each in enumerate(self.kinds)
            if (its := told & (kind == place)).any()
        }

    def by_attention(self, rules: SelectionRules, failed: str) -> Selection:
        """MIA-DPO's selection: by the attention, and by what `failed` says of the other rules."""
        bits = array("H", self.failed[failed])
        for place, (kind, ratio) in enumerate(zip(self.kind, self.ratio, strict=True)):
            if reason := rules.attention_reason(*self.kinds[kind], None if math.isnan(ratio) else ratio):
                bits[place] |= _BIT[reason]
        return Selection(self, np.asarray(bits))

    def by(self, failed: str) -> Selection:
        """By a set of rules alone."""
        return Selection(self, np.array(self.failed[failed]))


@dataclass
class Selection:
    """Outcome over all records: those without a bit are pairs."""

    facts: Facts
    failed: np.ndarray
    """(N,) of each record the rules that it fails, as bits in the order of `RULES`; after a draw also `not_drawn`."""

    @property
    def pairs(self) -> np.ndarray:
        """Places of the records that become pairs."""
        return np.flatnonzero(self.failed == 0)

    def draw(self, most: int | None, seed: int) -> Selection:
        """At most so many pairs."""
        pairs = self.pairs
        if most is None or len(pairs) <= most:
            return self
        drawn = random.Random(batch_seed(seed, "max_pairs")).sample(range(len(pairs)), most)
        return self._keep(pairs[drawn])

    def match_mix(self, mix: Mapping[tuple[str, int], int], *, seed: int) -> Selection:
        """As many pairs of each (format, number of pictures) as `mix` says, or all where there are fewer."""
        pairs, kind = self.pairs, np.asarray(self.facts.kind)
        drawn = [np.zeros(0, dtype=np.int64)]
        for place, group in sorted(enumerate(self.facts.kinds), key=lambda each: each[1]):
            its = pairs[kind[pairs] == place]
            if len(its):
                count = min(mix.get(group, 0), len(its))
                drawn.append(its[random.Random(batch_seed(seed, "mix", *group)).sample(range(len(its)), count)])
        return self._keep(np.concatenate(drawn))

    def _keep(self, drawn: np.ndarray) -> Selection:
        failed = self.failed.copy()
        left = np.setdiff1d(self.pairs, drawn)
        failed[left] |= _BIT["not_drawn"]
        return replace(self, failed=failed)

    def mix(self) -> dict[tuple[str, int], int]:
        """Pairs by (format, number of pictures)."""
        counts = np.bincount(np.asarray(self.facts.kind)[self.pairs], minlength=len(self.facts.kinds)).tolist()
        return {kind: count for kind, count in zip(self.facts.kinds, counts, strict=True) if count}

    def formats(self) -> dict[str, int]:
        """Pairs by format, of all formats that there are records of."""
        return self.facts._by_format(np.asarray(self.facts.kind)[self.pairs])

    def dropped_by(self, *, first: bool) -> dict[str, int]:
        """Rule -> records it dropped: as their first failing rule (adds up to all that are dropped), or among any of their failing rules."""
        failed, counts = self.failed, {}
        for rule, bit in _BIT.items():
            # Its first rule is the lowest bit of a record.
            counts[rule] = int(((failed & -failed.astype(np.int32) if first else failed) & bit > 0).sum())
        return {rule: count for rule, count in counts.items() if count}


def bits_of(failed: Iterable[str]) -> int:
    """Rules as bits."""
    return sum(_BIT[rule] for rule in set(failed))


def rules_of(bits: int) -> list[str]:
    """The rules that bits stand for, in the order of `RULES`."""
    return [rule for rule, bit in _BIT.items() if bits & bit]


def _has(failed: np.ndarray, *rules: str) -> np.ndarray:
    return failed & bits_of(rules) > 0
