"""One variant of a laid out repository: how `kernels` imports it, and how it hashes its files. Imports nothing of the package."""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType


def digest(contents: bytes) -> str:
    """As metadata has it of each file."""
    return base64.b64encode(hashlib.sha256(contents).digest()).decode()


def load(variant: Path) -> ModuleType:
    """Import a variant's folder as `kernels` does: by the `id` in its metadata; once a process."""
    name = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))["id"]
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]
