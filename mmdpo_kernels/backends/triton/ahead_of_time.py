"""Compile the shipped kernels for GPUs that are not here, and report registers, spills and shared memory.

    python -m mmdpo_kernels.backends.triton.ahead_of_time [--all] [--only TEXT] [--target 90] [--json FILE]

Exits with 1 where a kernel spills registers or needs more shared memory than the target has.
"""

from __future__ import annotations

import argparse
import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ..ops_table import OPS
from .runtime import INTERPRETED, Specialization

TARGETS = (80, 90, 100)
"""A100, H100 and H200, B200."""

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
"""Bytes of shared memory that one block may have."""

TENSOR_COLUMNS = 512


@dataclass(frozen=True, kw_only=True)
class Row:
    """What one kernel takes on one target."""

    label: str
    target: int
    num_warps: int
    num_stages: int
    registers: int
    """A thread."""
    spilled: int
    """Bytes of stack and local memory a thread."""
    shared: int
    """Bytes a block."""
    tensor_columns: int = 0
    """Of tensor memory, which Blackwell has. Of a kernel that needs too many, the compiler leaves nothing but a trap."""

    @property
    def problem(self) -> str | None:
        if self.spilled:
            return f"spills {self.spilled} bytes"
        if self.tensor_columns > TENSOR_COLUMNS:
            return f"needs {self.tensor_columns} columns of tensor memory, there are {TENSOR_COLUMNS}"
        limit = SHARED_LIMIT[self.target]
        return f"needs {self.shared} bytes of shared memory, sm_{self.target} has {limit}" if self.shared > limit else None


def modules() -> list[str]:
    """Modules of this folder with a function `specializations(capability)` and REPRESENTATIVE, texts in the labels of a few of its forms."""
    return [name for op in OPS.values() for name in op.ahead_of_time]


def specializations(target: int, *, everything: bool = True) -> list[Specialization]:
    """The forms that the launchers of `modules` ask for on a GPU of this capability; all, or those each module calls representative."""
    found = []
    for name in modules():
        module = importlib.import_module(f".{name}", __package__)
        texts = ("",) if everything else module.REPRESENTATIVE
        found += [form for form in module.specializations(target) if any(text in form.label for text in texts)]
    return found


def compile_all(targets: Sequence[int] = TARGETS, which: Sequence[str] = ("",), *, everything: bool = True) -> Iterator[Row]:
    """Compile the forms whose label holds one of the texts `which`, for each target.

    Raises:
        RuntimeError: Triton was imported with TRITON_INTERPRET=1, so there is nothing to compile.
    """
    require_compiler()
    for target in targets:
        for form in specializations(target, everything=everything):
            if any(text in form.label for text in which):
                yield compile_one(form, target)


def require_compiler() -> None:
    if INTERPRETED:
        raise RuntimeError(
            "ahead-of-time compilation needs TRITON_INTERPRET unset when triton is imported: interpreted kernels have no code"
        )


def compile_form(form: Specialization, target: int) -> Any:
    """What Triton makes of it.

    A signature type that ends in ":16" says that the address or number is a multiple of 16, as Triton's launcher would find.
    """
    kinds = {name: form.signature.get(name, "constexpr") for name in form.kernel.arg_names}
    source = ASTSource(
        form.kernel,
        {name: kind.removesuffix(":16") if isinstance(kind, str) else kind for name, kind in kinds.items()},
        constexprs={name: form.constants[name] for name, kind in kinds.items() if kind == "constexpr"},
        attrs={
            (at,): [["tt.divisibility", 16]]
            for at, kind in enumerate(kinds.values())
            if isinstance(kind, str) and kind.endswith(":16")
        },
    )
    options = {"num_warps": form.num_warps, "num_stages": form.num_stages, "maxnreg": form.maxnreg}
    return triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)


def compile_one(form: Specialization, target: int) -> Row:
    """What it takes."""
    compiled = compile_form(form, target)
    usage = resource_usage(compiled.asm["cubin"])
    return Row(
        label=form.label,
        target=target,
        num_warps=form.num_warps,
        num_stages=form.num_stages,
        registers=usage["REG"],
        spilled=usage["STACK"] + usage["LOCAL"],
        shared=compiled.metadata.shared,
        tensor_columns=getattr(compiled.metadata, "tmem_size", None) or 0,
    )


def resource_usage(cubin: bytes) -> dict[str, int]:
    """REG, STACK, LOCAL and more of the one kernel in `cubin`."""
    program = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run([program, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if "REG:" in line)
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", line)}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="ahead_of_time", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every shipped form, not a representative few")
    parser.add_argument(
        "--only", action="append", metavar="TEXT", help="forms whose label holds this text, of all forms; may be repeated"
    )
    parser.add_argument("--target", type=int, action="append", choices=TARGETS, help="compute capability; may be repeated")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file too")
    options = parser.parse_args(arguments)
    try:
        require_compiler()
    except RuntimeError as error:
        parser.error(str(error))
    rows = []
    for row in compile_all(options.target or TARGETS, options.only or ("",), everything=bool(options.all or options.only)):
        rows.append(row)
        print(
            f"sm_{row.target:<4} {row.registers:>4} registers {row.spilled:>5} spilled {row.shared:>7} shared "
            f"{row.num_warps} warps {row.num_stages} stages  {row.label}{'  <- ' + row.problem if row.problem else ''}",
            flush=True,
        )
    if options.json:
        forms = [asdict(row) | {"problem": row.problem} for row in rows]
        options.json.write_text(json.dumps({"triton": triton.__version__, "forms": forms}, indent=1) + "\n")
    problems = sum(row.problem is not None for row in rows)
    print(f"{len(rows)} compiled, {problems} with problems")
    return 1 if problems or not rows else 0


if __name__ == "__main__":
    sys.exit(main())
