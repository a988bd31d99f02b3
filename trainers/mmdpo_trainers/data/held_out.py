"""Which pictures are kept for evaluation: whole ones, whatever the order of the records."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

from mmdpo_trainers.errors import ConfigError
from mmdpo_trainers.files.fingerprint import content_hash


def hold_out(pictures: Collection[str], share: float, root: Path) -> set[str]:
    """Those of the pictures (absolute paths) that are kept for evaluation; with one all its copies, under whatever names they go.

    share: 0 to 1; above 0, at least one picture is held out.
    """
    if not 0 <= share <= 1:
        raise ConfigError(f"data.holdout: expected a share from 0 to 1, got {share}")
    below = os.path.join(root, "")
    names = {path: path.removeprefix(below) if path.startswith(below) else os.path.basename(path) for path in pictures}
    copies: dict[object, list[str]] = {}
    for path, content in _contents(sorted(pictures, key=lambda path: (names[path], path.split(os.sep)))).items():
        copies.setdefault(content, []).append(path)
    ranked = sorted(copies.values(), key=lambda same: hashlib.sha256(f"holdout|{names[same[0]]}".encode()).hexdigest())
    return {path for same in ranked[: max(int(share > 0), round(share * len(ranked)))] for path in same}


def _contents(paths: Sequence[str]) -> dict[str, object]:
    """Path -> a key equal for files of equal bytes. Only files of equal size are read: there may be millions."""
    sizes = {path: os.stat(path).st_size for path in paths}
    files = Counter(sizes.values())
    return {path: content_hash(path) if files[size] > 1 else size for path, size in sizes.items()}
