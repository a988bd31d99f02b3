"""The rows of the table of versions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Files and options of pytest, below a copy of tests/; three minutes at most each on a quiet machine.
SUITES = {
    "core": [
        "tests/kernels/test_patch.py",
        "tests/kernels/test_preference_loss_backends.py",
        "tests/trainers/test_preference_trainer.py",
        "tests/trainers/test_score.py",
        "tests/trainers/test_generate.py",
        "tests/trainers/test_every_family.py",
        "-m",
        "smoke",
    ],
    "native": [
        "tests/kernels/test_native.py",
        "-k",
        "extension or errors or error or reference_s or exactly or float64_is or nan",
    ],
    "triton": ["tests/kernels/test_triton_tree_attention.py", "tests/kernels/test_triton_attention_mass.py"],
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One environment, and what is run in it."""

    name: str
    suite: str = ""
    """A name in SUITES; "load": the wheel and NumPy alone, as `without_torch` tries them; empty with a reason."""
    python: str = "3.11"
    pins: Mapping[str, str] = field(default_factory=dict)
    """Versions in the place of those of constraints.txt."""
    constraints: tuple[str, ...] = ()
    """Further files of constraints."""
    cuda: bool = False
    """Whether the wheel is the CUDA one."""
    reason: str = ""
    """Why it is not run here."""
