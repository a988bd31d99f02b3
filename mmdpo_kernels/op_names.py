"""Names of this package's operators: in a namespace of its own, so that two copies of it live in one process."""

from __future__ import annotations

NAMESPACE = (__package__ or __name__).replace(".", "_")
"""`torch.ops.<NAMESPACE>` has them: the name that the package was imported by."""


def add_op_namespace_prefix(name: str) -> str:
    """The qualified name of an operator. Checks of the `kernels` package look for a function of this name at its registration."""
    return f"{NAMESPACE}::{name}"
