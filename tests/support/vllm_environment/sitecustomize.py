"""torchvision's wheel beside a CPU build of torch, for `make test-vllm`: its folder goes in front of the path.

The wheel's compiled half does not load there, and torchvision then cannot be imported, as it says more about two ops that only that half
defines. Without them it works: transformers' image processors ask for neither.
"""

from __future__ import annotations

import sys
from importlib.abc import MetaPathFinder
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_ARGUMENTS = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"


class _Schemas(MetaPathFinder):
    """Defines the two ops when torchvision is first imported, and finds nothing."""

    library: Any = None

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> None:
        if fullname != "torchvision":
            return
        sys.meta_path.remove(self)
        import torch

        package = find_spec("torchvision")
        compiled = None if package is None or package.origin is None else Path(package.origin).with_name("_C.so")
        if compiled is None or not compiled.is_file():
            return
        try:
            torch.ops.load_library(compiled)
        except OSError:
            # They last as long as the library's object does.
            _Schemas.library = torch.library.Library("torchvision", "DEF")
            for name in ("nms", "qnms"):
                _Schemas.library.define(name + _ARGUMENTS)


sys.meta_path.insert(0, _Schemas())
