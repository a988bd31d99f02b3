"""The repository for the `kernels` package: its rules hold, and it lives in one process with the package. `make hub` has `kernels` load it."""

from __future__ import annotations

import json
import runpy
import shutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import mmdpo_kernels
from mmdpo_kernels.backends.ops_table import OPS
from mmdpo_kernels.op_names import NAMESPACE
from tools.hub import layout
from tools.hub.rules import namespaces, violations
from tools.hub.sources import fits
from tools.hub.variant import load

TREE = torch.tensor([[6] * 3 + [4, 6, 6]], dtype=torch.int32)


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "repository"
    layout.write(folder)
    return folder


@pytest.fixture(scope="module")
def copy(repository: Path) -> ModuleType:
    return load(repository / "build" / "torch-cpu")


def test_the_rules_hold(repository: Path, copy: ModuleType) -> None:
    assert violations(repository) == []
    assert [path.name for path in sorted((repository / "build").iterdir())] == ["torch-cpu", "torch-cuda"]
    assert set(OPS) <= set(copy.__all__) == set(layout.OFFERED) < set(mmdpo_kernels.__all__)
    with pytest.raises(ValueError, match="expected a repository that was laid out before, or nothing"):
        layout.write(Path(__file__).parent)


def test_it_is_imported_where_neither_numpy_nor_the_package_is(repository: Path, copy: ModuleType) -> None:
    assert namespaces(repository / "build" / "torch-cpu") == [copy.__name__]


def written(name: str, text: str) -> Callable[[Path], None]:
    def write(variant: Path) -> None:
        with (variant / name).open("a") as file:
            file.write(text)

    return write


def renamed(**values: object) -> Callable[[Path], None]:
    def rename(variant: Path) -> None:
        file = variant / "metadata.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **values}))

    return rename


@pytest.mark.parametrize(
    ("breaks", "said"),
    [
        (written("tree_mask.py", "def f():\n    import numpy\n"), "tree_mask.py: imports numpy"),
        (written("ops/flat.py", "from mmdpo_kernels import tree\n"), "flat.py: imports mmdpo_kernels"),
        (written("ops/flat.py", "import importlib\nimportlib.import_module('einops')\n"), "flat.py: imports einops"),
        (
            written("ops/flat.py", "import importlib\nimportlib.import_module('.._native', __package__)\n"),
            "imports .._native, which",
        ),
        (
            written("losses.py", "from ..elsewhere import x\n"),
            "losses.py: imports ..elsewhere.x, which the variant does not have",
        ),
        (
            written("losses.py", "import torch\ntorch.library.custom_op('m::f', mutates_args=())\n"),
            "expected add_op_namespace_prefix",
        ),
        (written("segments.py", "# edited\n"), "digest: expected that of the files as they are"),
        (renamed(id="mmdpo_kernels"), "id 'mmdpo_kernels': expected a Python identifier that is this build's alone"),
        (renamed(name="mmdpo_kernels"), "expected lower-case letters, digits and dashes"),
        (renamed(backend={"type": "cuda"}), "backend 'cuda': expected the folder's"),
        (lambda variant: (variant / "mmdpo_kernels" / "__init__.py").unlink(), "mmdpo_kernels/__init__.py: missing"),
    ],
)
def test_a_broken_rule_is_said(repository: Path, tmp_path: Path, breaks: Callable[[Path], None], said: str) -> None:
    variant = tmp_path / "build" / "torch-cpu"
    shutil.copytree(repository / "build" / "torch-cpu", variant)
    breaks(variant)
    assert any(said in line for line in violations(tmp_path)), violations(tmp_path)


def test_what_breaks_them_is_not_laid_out() -> None:
    """numpy, transformers, a compiled module; and what imports it at any remove."""
    package = Path(mmdpo_kernels.__file__).parent
    for name in ("tree", "patch", "record", "backends/varlen/tree_attention", "backends/native/tree_attention"):
        assert not fits(package / f"{name}.py"), name
    assert fits(package / "ops" / "tree_attention.py")


def test_both_copies_live_in_one_process(repository: Path, copy: ModuleType) -> None:
    """Operators and classes of each are its own, numbers and gradients the same, with `torch.compile` too."""
    assert copy is not mmdpo_kernels and copy.SharedRows is not mmdpo_kernels.SharedRows
    for namespace in (NAMESPACE, copy.__name__):
        assert hasattr(getattr(torch.ops, namespace), "tree_attention")
    older = runpy.run_path(str(repository / "build" / "torch-cpu" / "mmdpo_kernels" / "__init__.py"))
    assert all(older[name] is getattr(copy, name) for name in copy.__all__)

    def loss_of(package: ModuleType, query: torch.Tensor) -> torch.Tensor:
        rows = package.tree_attention(query, query, query, TREE, backend="reference").output[0, 0]
        logps = package.linear_logprobs(rows, query[0, 1], torch.arange(6), backend="chunked").logps
        given = package.SequenceLogps(chosen=logps[:2], rejected=logps[2:4])
        frozen = package.SequenceLogps(chosen=torch.full((2,), -3.0), rejected=torch.full((2,), -2.0))
        return package.preference_loss(given, frozen, backend="reference").loss

    query = torch.randn(1, 2, 6, 8, dtype=torch.float64)
    found = []
    for package, run in (
        (mmdpo_kernels, loss_of),
        (copy, loss_of),
        (copy, torch.compile(loss_of, backend="eager", fullgraph=True)),
    ):
        leaf = query.clone().requires_grad_()
        loss = run(package, leaf)
        found.append((loss.detach(), *torch.autograd.grad(loss, leaf)))
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-12, atol=1e-12)
    mass = {
        package: package.attention_mass(
            query, query, TREE * 0, row_positions=torch.arange(6)[None], num_segments=1, tree_end=TREE
        )
        for package in (mmdpo_kernels, copy)
    }
    torch.testing.assert_close(mass[copy], mass[mmdpo_kernels], rtol=1e-12, atol=1e-12)


def test_a_copy_says_which_backends_it_comes_without(copy: ModuleType) -> None:
    reasons = copy.backends()["tree_attention"]
    assert reasons["native"] == reasons["varlen"] == "this copy of the package comes without it"
    assert reasons["reference"] is None and reasons["sdpa"] is None
    query = torch.randn(1, 2, 6, 8)
    with pytest.raises(ValueError, match="backend 'varlen' cannot serve this call: this copy of the package comes without it"):
        copy.tree_attention(query, query, query, TREE, backend="varlen")
