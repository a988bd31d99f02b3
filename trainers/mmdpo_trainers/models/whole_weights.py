"""Reading a model whole in a process in which there are settings with ZeRO-3, and without transformers' own progress bars."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from transformers.utils import logging


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


@contextlib.contextmanager
def without_bars() -> Iterator[None]:
    """While it lasts, transformers shows no progress bars of its own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
