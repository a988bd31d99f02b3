"""Reading a model whole in a process in which there are settings with ZeRO-3."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def whole_weights() -> Iterator[None]:
    """While it lasts, `from_pretrained` reads whole weights: once there are settings with ZeRO-3, transformers has it read shards."""
    # Where nobody has imported it, nobody can have set it.
    integration: Any = sys.modules.get("transformers.integrations.deepspeed")
    if integration is None:
        yield
        return
    kept = integration._hf_deepspeed_config_weak_ref
    integration.unset_hf_deepspeed_config()
    try:
        yield
    finally:
        integration._hf_deepspeed_config_weak_ref = kept
