"""Pixtral's processor, of Mistral3 and of LLaVA with Pixtral's tower, without torchvision."""

from __future__ import annotations

import importlib
import sys
from typing import Any

from transformers.utils import is_torchvision_available


def pixtral_processor(name: str | None) -> Any:
    """The class of this name where it is Pixtral's and transformers' own import of it would fail, else None.

    Of the module that needs torchvision, Pixtral's processor takes one function, which its Pillow twin has too.
    """
    if name != "PixtralProcessor" or is_torchvision_available():
        return None
    package = "transformers.models.pixtral"
    twin = importlib.import_module(f"{package}.image_processing_pil_pixtral")
    sys.modules.setdefault(f"{package}.image_processing_pixtral", twin)
    return importlib.import_module(f"{package}.processing_pixtral").PixtralProcessor
