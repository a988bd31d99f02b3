"""Which records are kept for evaluation: whole pictures, whatever the order of the records."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mmdpo_trainers.data.sources import SourceRecord
from mmdpo_trainers.errors import ConfigError
from mmdpo_trainers.files.fingerprint import content_hash


def hold_out(records: Sequence[SourceRecord], share: float, root: Path) -> tuple[list[SourceRecord], list[SourceRecord]]:
    """Split records into (training, evaluation) by picture, so that no picture is in both, under whatever names its copies go.

    share: 0 to 1; above 0, at least one picture is held out.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"data.holdout: expected a share from 0 to 1, got {share}")
    pictures = {record.picture for record in records}
    names = {path: str(path.relative_to(root) if path.is_relative_to(root) else path.name) for path in pictures}
    copies: dict[object, list[Path]] = {}
    for path, content in _contents(sorted(pictures, key=lambda path: (names[path], path))).items():
        copies.setdefault(content, []).append(path)
    ranked = sorted(copies.values(), key=lambda same: hashlib.sha256(f"holdout|{names[same[0]]}".encode()).hexdigest())
    held = {path for same in ranked[: max(int(share > 0), round(share * len(ranked)))] for path in same}
    return [r for r in records if r.picture not in held], [r for r in records if r.picture in held]


def _contents(paths: Sequence[Path]) -> dict[Path, object]:
    """Path -> a key equal for files of equal bytes. Only files of equal size are read: there may be millions."""
    sizes = {path: path.stat().st_size for path in paths}
    files = Counter(sizes.values())
    return {path: content_hash(path) if files[size] > 1 else size for path, size in sizes.items()}
