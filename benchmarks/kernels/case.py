"""What a benchmark is made of: a case of an op, the least work it needs, and what a contestant hands to the harness."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

FORWARD, BACKWARD, BOTH = "forward", "backward", "forward + backward"
WITHOUT_MASS = ", no mass"
"""Ends the name of a backend that leaves the ratios or the mass of a case out, to tell what they cost."""
WITH_STATISTICS = ", trainer's statistics"
"""Ends the name of a head that also gives what a trainer logs: entropy, mean logit, whether the target is the likeliest token."""
Named = dict[str, Tensor]


def multiplies_bfloat16() -> bool:
    """Whether PyTorch's products of bfloat16 on the CPU use instructions for them: AVX-512-BF16, which every CPU with AMX has too."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported() and torch.cpu._is_avx512_bf16_supported())


class CannotServe(Exception):  # noqa: N818 - an answer, not an error
    """A contestant has no way to do a case; the message says why."""


class NotOfThisCase(Exception):  # noqa: N818 - an answer, not an error
    """A contestant would repeat another one here, or is of another kind of case; its table leaves it out."""


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """What the machine at hand reaches, measured by the harness."""

    flops_per_second: float
    """Of a large matrix product in the dtype of the run."""
    bytes_per_second: float
    """Of a large copy, bytes read plus bytes written."""


@dataclass(frozen=True, kw_only=True)
class Work:
    """The least that any implementation of a case must do."""

    flops: float
    bytes: float
    """Each input read once, each output written once."""

    def floor(self, ceilings: Ceilings) -> float:
        """Seconds that no implementation can be much below."""
        return max(self.flops / ceilings.flops_per_second, self.bytes / ceilings.bytes_per_second)

    def bound(self, ceilings: Ceilings) -> str:
        """Which of the two ceilings the floor comes from."""
        compute = self.flops / ceilings.flops_per_second >= self.bytes / ceilings.bytes_per_second
        return "arithmetic" if compute else "memory"


@dataclass(frozen=True, kw_only=True)
class Case:
    """One set of inputs of an op, in up to three sizes."""

    op: str
    name: str
    why: str
    """What the case stands for."""
    sizes: Mapping[str, Mapping[str, int]]
    """By device type, and "small" for tests; a device that is not here does not run the case."""
    make: Callable[[Mapping[str, int], torch.device, torch.dtype], Any]
    """Sizes, device and dtype -> the problem: the inputs, always the same ones."""
    work: Callable[[Any], Work]
    truth: Callable[[Any], Named]
    """The results in float64, by name."""
    timed: str = FORWARD
    dtype: torch.dtype | None = None
    """None: the dtype of the run."""
    unfit: Callable[[torch.device], str | None] = lambda device: None
    """Device -> why the case is not for it, or None."""


def without_products(device: torch.device) -> str | None:
    """`Case.unfit` of a case in bfloat16 whose other contestants are PyTorch's products."""
    if device.type != "cpu" or multiplies_bfloat16():
        return None
    return "this CPU has no instructions for products of bfloat16, and without them PyTorch's take minutes"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A contestant with its inputs in hand."""

    call: Callable[[], Named]
    """What is timed."""
    results: Callable[[Named], Named]
    """What `call` returned, named and laid out as the truth is. Names that are left out are not compared."""


@dataclass(frozen=True, kw_only=True)
class Contestant:
    """Something that can do cases of one op."""

    name: str
    ours: bool
    prepare: Callable[[Any], Run]
    """Problem -> run; layouts and masks made here are not timed. Raises `CannotServe`."""
    unavailable_reason: Callable[[str, torch.dtype], str | None]
    """Device type and dtype -> why it cannot run here, or None."""
    package: str | None = None
    """The distribution whose version stands beside its figures."""


def timed_run(
    timed: str,
    forward: Callable[[], Named],
    leaves: Named,
    upstream: Named,
    results: Callable[[Named], Named] = lambda found: found,
) -> Run:
    """The run of a differentiable forward: it alone, its backward alone, or both.

    Args:
        leaves: inputs to differentiate in; the gradient of `x` is found as `grad_x`.
        upstream: gradients of what `forward` returns under the same names.
    """

    def gradients(found: Named, keep: bool) -> Named:
        outputs = [found[name] for name in upstream]
        found_grads = torch.autograd.grad(outputs, list(leaves.values()), list(upstream.values()), retain_graph=keep)
        return {f"grad_{name}": grad for name, grad in zip(leaves, found_grads, strict=True)}

    def both() -> Named:
        found = forward()
        return found | gradients(found, keep=False)

    if timed == FORWARD:
        return Run(call=torch.no_grad()(forward), results=results)
    if timed == BOTH:
        return Run(call=both, results=results)
    found = forward()
    return Run(call=lambda: found | gradients(found, keep=True), results=results)
