"""What a stage's result depends on, as hashes that can be compared and named parts that can be explained."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdpo_trainers.errors import RunFolderError

_WHOLE_HASH_LIMIT = 64 * 2**20
_EDGE = 2**20


def content_hash(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's content, or of a folder's files (names and contents, hidden ones left out).

    Of a file above 64 MiB the size and the first and last MiB are hashed: reading a 14 GB checkpoint at every start would cost
    more than it protects.
    """
    path = Path(path)
    digest = hashlib.sha256()
    if path.is_dir():
        for part in sorted(p for p in path.rglob("*") if p.is_file() and not p.name.startswith(".")):
            digest.update(f"{part.relative_to(path).as_posix()}\0{content_hash(part)}\n".encode())
        return digest.hexdigest()
    if not path.is_file():
        raise RunFolderError(f"{path} does not exist: run the stage that writes it first, or give your own file with --input")
    size = path.stat().st_size
    with path.open("rb") as file:
        if size <= _WHOLE_HASH_LIMIT:
            while block := file.read(_EDGE):
                digest.update(block)
        else:
            digest.update(str(size).encode() + file.read(_EDGE))
            file.seek(-_EDGE, os.SEEK_END)
            digest.update(file.read(_EDGE))
    return digest.hexdigest()


@dataclass(frozen=True)
class Fingerprint:
    """What a stage's result depends on: named parts (configuration values, hashes of inputs, the model, the seed)."""

    parts: Mapping[str, Any]
    at_default: frozenset[str] = frozenset()
    """Names of parts that are settings with their default value."""

    def matches(self, digest: str, recorded: Mapping[str, Any]) -> bool:
        """Whether what was recorded is the same thing. recorded: its parts; settings at their default may be newer than these."""
        return digest in (self.digest, Fingerprint(self._known_to(recorded)).digest)

    def _known_to(self, recorded: Mapping[str, Any]) -> dict[str, Any]:
        newer = self.at_default.difference(recorded)
        return {name: value for name, value in self.parts.items() if name not in newer}

    @property
    def digest(self) -> str:
        """SHA-256 over the parts, order-free."""
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True, default=str).encode()).hexdigest()

    def differences(self, recorded: Mapping[str, Any]) -> list[str]:
        """One phrase for each part that is not as it was recorded."""
        return _differences(dict(recorded), json.loads(json.dumps(self._known_to(recorded), default=str)))


def _differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    phrases = []
    for key in sorted(old.keys() | new.keys()):
        was, now, name = old.get(key), new.get(key), f"{prefix}{key}"
        if isinstance(was, dict) and isinstance(now, dict):
            phrases += _differences(was, now, f"{name}.")
        elif was != now:
            phrases.append(f"{name}: was {_short(was)}, is {_short(now)}")
    return phrases


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
