"""Seeds that depend on what they are for, and on nothing that ran before."""

from __future__ import annotations

import hashlib


def batch_seed(*parts: int | str) -> int:
    """A 63-bit seed of its own for everything that must not depend on what ran before it."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
