"""Held-out pairs record by record: what pictures are worth to each arm, with intervals, and how much arms differ on the same pairs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.methods.held_out import ALL, BASE, arm_folders

from .intervals import Estimate, Proportion, mean_estimate, paired_difference

Values = dict[str, float]
"""Pair id -> a number."""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """Log-probabilities of held-out pairs. pairs: arm -> id -> its record, with `kind` and `logps`; beta: arm -> of its rewards."""

    pairs: Mapping[str, Mapping[str, Mapping[str, Any]]]
    beta: Mapping[str, float]

    @classmethod
    def read(cls, folder: Path, arms: Mapping[str, Mapping[str, Any]], main: str) -> HeldOut:
        """Of a run folder; arms that have none are absent. arms: the other arms' and the main one's figures by name."""
        folders = {
            arm: path / "evaluate" / "after" for arm, path in arm_folders(folder, (a for a in arms if a != main), main).items()
        }
        files = {arm: path / "held_out.jsonl" for arm, path in {BASE: folder / "evaluate" / "before", **folders}.items()}
        pairs = {arm: {str(record["id"]): record for record in read_jsonl(file)} for arm, file in files.items() if file.is_file()}
        return cls(
            pairs={arm: found for arm, found in pairs.items() if found}, beta={a: f.get("beta") or 0.1 for a, f in arms.items()}
        )

    def kinds(self) -> list[str]:
        """Kinds of pairs, all of them last and only where there is more than one kind, or none."""
        found = sorted({str(pair["kind"]) for pairs in self.pairs.values() for pair in pairs.values() if pair.get("kind")})
        return [*found, ALL] if len(found) != 1 else found

    def gaps(self, arm: str, kind: str, corruption: str) -> Values:
        """log p(chosen | picture) - log p(chosen | corrupted picture), in nats."""
        return {name: logps["chosen"] - logps[corruption] for name, logps in self._logps(arm, kind).items()}

    def rewards(self, arm: str, kind: str, side: str) -> Values:
        """beta (log p - log p of the base); empty for the base itself."""
        base = {} if arm == BASE else self._logps(BASE, kind)
        beta = self.beta.get(arm, 0.1)
        return {name: beta * (logps[side] - base[name][side]) for name, logps in self._logps(arm, kind).items() if name in base}

    def chosen(self, arm: str, kind: str) -> Values:
        """log p(chosen)."""
        return {name: logps["chosen"] for name, logps in self._logps(arm, kind).items()}

    def preferred(self, arm: str, kind: str) -> Proportion | None:
        """Share of pairs whose chosen response is likelier than the rejected one."""
        found = [logps["chosen"] > logps["rejected"] for logps in self._logps(arm, kind).values()]
        return Proportion(sum(found), len(found)) if found else None

    def gap(self, arm: str, kind: str, corruption: str) -> Estimate | None:
        """The mean gap."""
        return mean_estimate(list(self.gaps(arm, kind, corruption).values()))

    def gap_difference(self, first: str, second: str, kind: str, corruption: str) -> Estimate | None:
        """The gap of arm `second` minus that of `first`, paired by record."""
        return paired_difference(self.gaps(first, kind, corruption), self.gaps(second, kind, corruption))

    def _logps(self, arm: str, kind: str) -> dict[str, Mapping[str, float]]:
        pairs = self.pairs.get(arm, {})
        return {name: pair["logps"] for name, pair in pairs.items() if kind in (ALL, pair.get("kind"))}
