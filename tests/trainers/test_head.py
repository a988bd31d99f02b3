"""`through_head`: a head used through its module, alone and where its weight is sharded over two processes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from launches import launch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from mmdpo_kernels import linear_logprobs, through_head

VOCABULARY = 37


def logps_of(head: nn.Module, rows: Tensor, targets: Tensor, kept_bytes: int = 1 << 30) -> Tensor:
    def compute(weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
        return linear_logprobs(rows, weight, targets, bias=bias, kept_bytes=kept_bytes).logps

    return through_head(head, compute, rows)


def test_forward_is_put_back_and_hooks_run() -> None:
    head, seen = nn.Linear(16, VOCABULARY), []
    head.register_forward_pre_hook(lambda module, inputs: seen.append("before"))
    head.register_forward_hook(lambda module, inputs, output: seen.append(output.shape))
    rows, targets = torch.randn(5, 16), torch.randint(VOCABULARY, (5,))
    found = logps_of(head, rows, targets)
    assert seen == ["before", (5,)] and "forward" not in head.__dict__
    torch.testing.assert_close(found, head(rows).log_softmax(-1).gather(1, targets[:, None])[:, 0])
    with pytest.raises(ValueError, match="targets must be in"):
        logps_of(head, rows, targets + VOCABULARY)
    assert "forward" not in head.__dict__


def test_a_forward_of_its_own_comes_back() -> None:
    head = nn.Linear(16, VOCABULARY)
    own = head.forward = lambda rows: rows  # type: ignore[method-assign,assignment]
    logps_of(head, torch.randn(5, 16), torch.randint(VOCABULARY, (5,)))
    assert head.forward is own


@pytest.mark.parametrize("kept_bytes", [1 << 30, 0])
@pytest.mark.parametrize("frozen", [True, False])
def test_weight_that_is_there_only_between_hooks(frozen: bool, kept_bytes: int) -> None:
    """As ZeRO-3 does it: the parameter's data is swapped in before forward and before backward, and out after each."""
    torch.manual_seed(0)
    head = nn.Linear(16, VOCABULARY).requires_grad_(not frozen)
    rows, targets = torch.randn(5, 16, requires_grad=True), torch.randint(VOCABULARY, (5,))
    leaves = [rows, *([] if frozen else head.parameters())]
    expected = torch.autograd.grad(logps_of(head, rows, targets).sum(), leaves)
    whole = {name: parameter.data.clone() for name, parameter in head.named_parameters()}
    gathered = 0

    def gather(*unused: object) -> None:
        nonlocal gathered
        gathered += 1
        for name, parameter in head.named_parameters():
            parameter.data = whole[name]

    def release(*unused: object) -> None:
        for parameter in head.parameters():
            parameter.data = torch.empty(0)

    release()
    head.register_forward_pre_hook(gather)
    head.register_forward_hook(release)
    logps = logps_of(head, rows, targets, kept_bytes)
    if not frozen:
        logps.register_hook(gather)
    found = torch.autograd.grad(logps.sum(), leaves)
    torch.testing.assert_close(found, expected)
    assert gathered == (1 if frozen else 2), "a frozen head is gathered for forward alone"


@contextmanager
def _process_group(rank: int) -> Iterator[None]:
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        yield
    finally:
        dist.destroy_process_group()


def _sharded(rank: int) -> None:
    """Gradients of a sharded body and head are those of an unsharded pair, averaged over the processes."""
    with _process_group(rank):
        mesh = init_device_mesh("cpu", (2,))
        for frozen, kept_bytes in ((True, 1 << 30), (False, 1 << 30), (False, 0)):
            torch.manual_seed(0)
            modules = nn.Linear(8, 16), nn.Linear(16, VOCABULARY).requires_grad_(not frozen)
            torch.manual_seed(0)
            whole = nn.Linear(8, 16), nn.Linear(16, VOCABULARY)
            inputs, targets = torch.randn(2, 5, 8)[rank], torch.randint(VOCABULARY, (2, 5))[rank]
            for module in modules:
                fully_shard(module, mesh=mesh)
            body, head = modules
            logps_of(head, body(inputs), targets, kept_bytes).mean().backward()
            logits = whole[1](whole[0](inputs))
            logits.log_softmax(-1).gather(1, targets[:, None]).mean().backward()
            for module, alone in zip(modules, whole, strict=True):
                for parameter, other in zip(module.parameters(), alone.parameters(), strict=True):
                    dist.all_reduce(other.grad)
                    if parameter.requires_grad:
                        torch.testing.assert_close(parameter.grad.full_tensor(), other.grad / 2)
                    else:
                        assert parameter.grad is None


def test_under_fsdp2() -> None:
    assert launch(2, _sharded) == [0, 0]
