"""setup.py's functions, without running it."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]


def setup_functions() -> ModuleType:
    source = (ROOT / "setup.py").read_text().partition("\nsetup(\n")[0]
    module = ModuleType("setup_of_the_package")
    module.__file__ = str(ROOT / "setup.py")
    sys.modules[module.__name__] = module
    exec(compile(source, module.__file__, "exec"), module.__dict__)
    return module
