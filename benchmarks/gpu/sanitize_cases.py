"""Every kernel written here once, forward and backward, on tiny inputs: what compute-sanitizer watches.

    compute-sanitizer --tool memcheck python -m benchmarks.gpu.sanitize_cases

Without the sanitizer it shows that the cases run. PyTorch's own allocator is turned off, whose large blocks would hide a stray access.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, field
from typing import Any

os.environ["PYTORCH_NO_CUDA_MEMORY_CACHING"] = "1"

import torch  # noqa: E402

from mmdpo_kernels import TokenLogps, attention_mass, linear_logprobs, preference_loss, tree_attention  # noqa: E402
from mmdpo_kernels.backends.ops_table import OPS  # noqa: E402
from mmdpo_kernels.losses import ANCHORS, LOSSES, values_of  # noqa: E402

# The others call kernels of libraries.
WRITTEN_HERE = ("triton", "native")
# Tree of 37 tokens, which is no multiple of any tile: a prompt, two responses, one of them with a branch, and three of padding.
TREE_END = [34] * 17 + [24] * 7 + [34] * 6 + [34] * 4 + [34, 35, 36]


@dataclass(frozen=True, kw_only=True)
class Small:
    """One call. Few of them between them take every branch, since each costs a compilation."""

    op: str
    dtype: torch.dtype
    dim: int
    """Of a head of attention, or of the hidden states."""
    mass: bool = False
    reduce: str | None = None
    options: dict[str, Any] = field(default_factory=dict)


CASES = {
    "tree, mass": Small(op="tree_attention", dtype=torch.bfloat16, dim=80, mass=True),
    "tree, softcap, window": Small(op="tree_attention", dtype=torch.float32, dim=32, options={"softcap": 20.0, "window": 9}),
    "mass": Small(op="attention_mass", dtype=torch.bfloat16, dim=80),
    "mass, mean, softcap, window": Small(
        op="attention_mass", dtype=torch.float32, dim=32, reduce="mean", options={"softcap": 20.0, "window": 9}
    ),
    "mass, tokens": Small(op="attention_mass", dtype=torch.float32, dim=64, reduce="tokens"),
    "head": Small(op="linear_logprobs", dtype=torch.bfloat16, dim=64, options={"stats": ("is_top1",)}),
    "head, softcap, statistics": Small(
        op="linear_logprobs",
        dtype=torch.float32,
        dim=32,
        options={"softcap": 3.0, "stats": ("entropy", "max_logp", "mean_logit")},
    ),
    "loss": Small(op="preference_loss", dtype=torch.float32, dim=0),
}


def inputs(device: torch.device, dtype: torch.dtype, dim: int) -> list[torch.Tensor]:
    """Query of four heads, key and value of two."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 4, len(TREE_END), dim), (2, 2, len(TREE_END), dim), (2, 2, len(TREE_END), dim)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def run_tree_attention(case: Small, backend: str, device: torch.device) -> None:
    query, key, value = inputs(device, case.dtype, case.dim)
    tree_end = torch.tensor([TREE_END] * 2, dtype=torch.int32, device=device)
    segments = torch.arange(len(TREE_END), device=device).remainder(4).sub(1).expand(2, -1)
    asked = {"segments": segments, "num_segments": 3} if case.mass else {}
    found = tree_attention(query, key, value, tree_end, backend=backend, **asked, **case.options)
    loss = found.output.float().sum() + found.lse[..., :30].sum() + found.mass.square().sum()
    torch.autograd.grad(loss, (query, key, value))


def run_attention_mass(case: Small, backend: str, device: torch.device) -> None:
    query, key, _ = inputs(device, case.dtype, case.dim)
    positions = torch.tensor([[20, 23, -1, 33, 8], [16, -1, -1, 29, 0]], device=device)
    rows = query[:, :, :5].detach().requires_grad_()
    found = attention_mass(
        rows,
        key,
        torch.arange(len(TREE_END), device=device).remainder(4).sub(1).expand(2, -1),
        row_positions=positions,
        num_segments=3,
        tree_end=torch.tensor([TREE_END] * 2, dtype=torch.int32, device=device),
        reduce=case.reduce,
        backend=backend,
        **case.options,
    )
    torch.autograd.grad(found.square().sum(), (rows, key))


def run_linear_logprobs(case: Small, backend: str, device: torch.device) -> None:
    """9 rows of 16,411 logits, which no vector divides and several blocks share: a frozen head beside a reference, and a trained one."""
    generator = torch.Generator().manual_seed(0)
    hidden, other = (torch.randn(9, case.dim, generator=generator).to(device, case.dtype).requires_grad_() for _ in range(2))
    weight = torch.randn(16411, case.dim, generator=generator).to(device, case.dtype)
    targets = torch.tensor([0, 16410, -100, 7, 8200, -100, 3, 3, 16409], device=device)
    for trained in (False, True):
        weight.requires_grad_(trained)
        for kept_bytes in (1 << 20, 0) if trained else (0,):
            beside = {} if trained else {"reference_hidden": other.detach()}
            found = linear_logprobs(hidden, weight, targets, kept_bytes=kept_bytes, backend=backend, **beside, **case.options)
            torch.autograd.grad(found.logps.sum(), (hidden, weight) if trained else (hidden,))


def run_preference_loss(case: Small, backend: str, device: torch.device) -> None:
    """Seven triples with responses of no to 70 tokens, every loss of them at once."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 70, (7, 3), generator=generator)
    tokens, before = (-torch.rand(int(lengths.sum()), generator=generator).to(device, case.dtype) for _ in range(2))
    policy, reference = (TokenLogps(logps=logps, lengths=lengths.to(device), branches=ANCHORS) for logps in (tokens, before))
    tokens.requires_grad_()
    names = tuple(name for name in LOSSES if {value.branch for value in values_of(name)} <= set(ANCHORS))
    found = preference_loss(policy, reference, loss_type=names, anchors=ANCHORS, backend=backend)
    torch.autograd.grad(found.loss, tokens)


RUN = {
    "tree_attention": run_tree_attention,
    "attention_mass": run_attention_mass,
    "linear_logprobs": run_linear_logprobs,
    "preference_loss": run_preference_loss,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", choices=CASES, action="append", help="this one only; may be repeated")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    failures = 0
    for name in arguments.case or CASES:
        case = CASES[name]
        for backend in (backend for backend in OPS[case.op].backends if backend in WRITTEN_HERE):
            try:
                RUN[case.op](case, backend, device)
                print(f"{name}, {backend}: ran")
            except ValueError as error:
                if "cannot serve this call" not in str(error):
                    raise
                print(f"{name}, {backend}: left out, {str(error).split('cannot serve this call: ')[-1]}")
            except Exception as error:  # noqa: BLE001 - the rest is still worth watching
                failures += 1
                print(f"{name}, {backend}: FAILED, {type(error).__name__}: {error}")
    if device.type == "cuda":
        torch.cuda.synchronize()
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
