"""The rows of the table of versions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

# Files and options of pytest, below a copy of tests/; a minute or two each on a quiet machine.
SUITES = {
    "core": [
        "tests/kernels/test_patch.py",
        "tests/trainers/test_preference_trainer.py",
        "tests/trainers/test_score.py",
        "tests/trainers/test_generate.py",
        "tests/trainers/test_every_family.py",
        "-m",
        "smoke",
    ],
    "native": ["tests/kernels/test_native.py", "tests/kernels/test_native_tree_attention.py"],
    "trainer": ["tests/trainers/test_preference_trainer.py"],
    "triton": ["tests/kernels/test_triton_attention_mass.py", "tests/kernels/test_triton_linear_logprobs.py"],
    "load": [],
}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One environment, and what is run in it."""

    name: str
    suites: tuple[str, ...] = ()
    """Names in SUITES; "load": the wheel and NumPy alone, as `without_torch` tries them; none with a reason."""
    python: str = "3.11"
    pins: Mapping[str, str] = field(default_factory=dict)
    """Versions in the place of those of constraints.txt."""
    constraints: tuple[str, ...] = ()
    """Further files of constraints."""
    cuda: bool = False
    """Whether the wheel is the CUDA one."""
    reason: str = ""
    """Why it is not run here."""


OLDEST = {"peft": "0.18.0", "accelerate": "1.6.0"}
"""The floors of [train]: peft 0.16 and 0.17 do not import beside transformers 5; accelerate 1.4 cannot prepare a model for FSDP 2, 1.5 was
not tried."""

NO_CPU_BUILD = "no CPU build of it at hand; its CUDA build alone is several gigabytes"

ROWS = (
    Row(name="as in constraints.txt", suites=("core", "native")),
    Row(name="transformers 5.17", suites=("core",), pins={"transformers": "5.17.0"}, constraints=("constraints-oldest.txt",)),
    Row(name="peft 0.18", suites=("core", "trainer"), pins={"peft": OLDEST["peft"]}),
    Row(name="accelerate 1.6", suites=("core", "trainer"), pins={"accelerate": OLDEST["accelerate"]}),
    Row(
        name="all oldest",
        suites=("core",),
        pins={"transformers": "5.17.0", "triton": "3.6.0", **OLDEST},
        constraints=("constraints-oldest.txt",),
    ),
    # Its interpreter, not its compiler, makes scalars of arrays in a way that numpy 2.4 has no more.
    Row(name="triton 3.6, numpy 2.3", suites=("triton",), pins={"triton": "3.6.0", "numpy": "2.3.5"}),
    Row(name="triton 3.7", suites=("triton",), pins={"triton": "3.7.1"}),
    Row(name="triton 3.8", suites=("triton",), pins={"triton": "3.8.0"}),
    Row(name="triton 3.9", suites=("triton",), pins={"triton": "3.9.0"}),
    Row(name="CUDA wheel, no GPU", suites=("core", "native"), cuda=True),
    Row(name="Python 3.12", suites=("load",), python="3.12"),
    Row(name="Python 3.13", suites=("load",), python="3.13"),
    Row(name="Python 3.12, CUDA wheel", suites=("load",), python="3.12", cuda=True),
    Row(name="Python 3.13, CUDA wheel", suites=("load",), python="3.13", cuda=True),
    Row(name="Python 3.12, 3.13 with torch", python="3.12", reason="no CPU build of torch 2.13 for them at hand"),
    Row(name="Python 3.14", python="3.14", reason="no such Python here"),
    Row(name="torch 2.11", reason=NO_CPU_BUILD),
    Row(name="torch 2.12, 2.14, 2.15", reason=NO_CPU_BUILD),
    Row(name="CUDA wheel, GPU", cuda=True, reason="no GPU here"),
)
