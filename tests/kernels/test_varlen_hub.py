"""Flash attention of the Hub: what is asked of the `kernels` package, and the operators of such a build called by their names."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from trees import random_tree_end
from varlen_oracle import oracle_backward, oracle_forward

from mmdpo_kernels import tree_attention
from mmdpo_kernels.backends.varlen import from_hub, libraries
from mmdpo_kernels.backends.varlen.library import Options
from mmdpo_kernels.backends.varlen.plan import Call

HOPPER, AMPERE = (9, 0), (8, 0)


def call_of(
    starts: tuple[Tensor, Tensor], longest: tuple[int, int], scale: float, causal: bool, window: tuple[int, int], softcap: float
) -> tuple[Call, Options]:
    """What the operators' arguments say."""
    assert all(tensor.dtype == torch.int32 for tensor in starts)
    assert window[1] == (0 if causal else -1)
    call = Call(causal, None, None, *starts, *longest, ())
    return call, Options(scale=scale, softcap=softcap or None, window=None if window[0] < 0 else window[0] + 1)


# The operators with the arguments of the builds; those that no call of ours names are left out.


@torch.library.custom_op("mmdpo_test_flash_3::_flash_attn_forward", mutates_args=())
def forward_3(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None,
    max_seqlen_q: int | None = None, max_seqlen_k: int | None = None, softmax_scale: float | None = None, causal: bool = False,
    window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    starts, longest, window = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), (window_size_left, window_size_right)
    output, lse = oracle_forward(q, k, v, *call_of(starts, longest, softmax_scale, causal, window, softcap))
    return output, lse, q.new_empty(0), q.new_empty(0)


@torch.library.custom_op("mmdpo_test_flash_3::_flash_attn_backward", mutates_args=("dq", "dk", "dv"))
def backward_3(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, cu_seqlens_q: Tensor | None = None,
    cu_seqlens_k: Tensor | None = None, max_seqlen_q: int | None = None, max_seqlen_k: int | None = None,
    dq: Tensor | None = None, dk: Tensor | None = None, dv: Tensor | None = None, softmax_scale: float | None = None,
    is_causal: bool = False, window_size_left: int = -1, window_size_right: int = -1, softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:  # fmt: skip
    starts, longest, window = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), (window_size_left, window_size_right)
    call = call_of(starts, longest, softmax_scale, is_causal, window, softcap)
    for grad, found in zip((dq, dk, dv), oracle_backward(dout, q, k, v, out, softmax_lse, *call), strict=True):
        grad.copy_(found)
    return q.new_empty(0)


@torch.library.custom_op("mmdpo_test_flash_2::_flash_attn_varlen_forward", mutates_args=())
def forward_2(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    dropout_p: float, softmax_scale: float, causal: bool, window_size_left: int = -1, window_size_right: int = -1,
    softcap: float = 0.0, alibi_slopes: Tensor | None = None, return_softmax: bool = False, block_table: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    assert dropout_p == 0.0
    starts, longest, window = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), (window_size_left, window_size_right)
    output, lse = oracle_forward(q, k, v, *call_of(starts, longest, softmax_scale, causal, window, softcap))
    return output, lse, q.new_empty(0), q.new_empty(0)


@torch.library.custom_op("mmdpo_test_flash_2::_flash_attn_varlen_backward", mutates_args=("dq", "dk", "dv"))
def backward_2(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, softmax_lse: Tensor, dq: Tensor | None, dk: Tensor | None,
    dv: Tensor | None, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int, dropout_p: float,
    softmax_scale: float, causal: bool, window_size_left: int, window_size_right: int, softcap: float,
    alibi_slopes: Tensor | None, deterministic: bool,
) -> Tensor:  # fmt: skip
    starts, longest, window = (cu_seqlens_q, cu_seqlens_k), (max_seqlen_q, max_seqlen_k), (window_size_left, window_size_right)
    call = call_of(starts, longest, softmax_scale, causal, window, softcap)
    for grad, found in zip((dq, dk, dv), oracle_backward(dout, q, k, v, out, softmax_lse, *call), strict=True):
        grad.copy_(found)
    return q.new_empty(0)


BUILDS = {
    from_hub.FLASH_3.name: SimpleNamespace(_flash_attn_forward=forward_3, _flash_attn_backward=backward_3),
    from_hub.FLASH_2.name: SimpleNamespace(_flash_attn_varlen_forward=forward_2, _flash_attn_varlen_backward=backward_2),
}


class Kernels:
    """A `kernels` package whose cache has these builds."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.builds = dict(BUILDS)

    def get_kernel(self, repo_id: str, *, version: int) -> SimpleNamespace:
        self.asked.append((repo_id, version))
        if repo_id not in self.builds:
            raise FileNotFoundError(f"Cannot find a build variant for this system in {repo_id}")
        return SimpleNamespace(flash_attn_interface=self.builds[repo_id])


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """The package in the place of the one that would ask the Hub, on a GPU that flash attention 3 is made for."""
    stand_in = Kernels()
    monkeypatch.setitem(sys.modules, "kernels", stand_in)
    monkeypatch.setenv(from_hub.VARIABLE, "1")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: HOPPER)
    from_hub._load.cache_clear()
    yield stand_in
    from_hub._load.cache_clear()


def chosen(**options: bool) -> str:
    found = libraries.choose("cuda", torch.bfloat16, 64, options.get("softcap", False))
    return found if isinstance(found, str) else found.name


@pytest.mark.parametrize(
    ("number", "options"),
    [(3, {}), (3, {"window": 3, "softcap": 2.0, "scale": 0.3}), (2, {}), (2, {"window": 3, "softcap": 2.0, "scale": 0.3})],
    ids=str,
)
@pytest.mark.usefixtures("kernels")
def test_its_operators_equal_the_reference(number: int, options: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    library = next(library for library in libraries.LIBRARIES if library.name == f"flash-attn {number} of the Hub")
    monkeypatch.setattr(libraries, "choose", lambda *call: library)
    torch.manual_seed(0)
    leaves = [torch.randn(3, heads, 37, 16, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)]
    tree_end = random_tree_end(3, 37, 1)
    found = {}
    for backend in ("varlen", "reference"):
        result = tree_attention(*leaves, tree_end, backend=backend, **options)
        torch.manual_seed(1)
        total = (result.output * torch.randn(result.output.shape, dtype=torch.float64)).sum()
        found[backend] = [result.output, result.lse, *torch.autograd.grad(total, leaves)]
    for ours, truth in zip(found["varlen"], found["reference"], strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


def test_nothing_is_looked_up_unless_it_is_asked_for(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(from_hub.VARIABLE)
    reason = chosen(softcap=True)
    assert "flash-attn 3 of the Hub: is taken from the Hub only where MMDPO_HUB_KERNELS=1 asks for it" in reason
    assert "kernels-community/flash-attn3, version 1" in reason
    assert chosen() == "PyTorch"
    assert kernels.asked == []


def test_the_one_for_the_gpu_is_taken_and_loaded_once(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [chosen(), chosen(softcap=True)] == ["flash-attn 3 of the Hub"] * 2
    assert kernels.asked == [("kernels-community/flash-attn3", 1)]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: AMPERE)
    assert chosen() == "flash-attn 2 of the Hub"
    assert kernels.asked[1:] == [("kernels-community/flash-attn2", 4)]


def test_why_it_cannot_be_used(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels.builds.clear()
    assert "flash-attn 3 of the Hub: cannot be loaded by `kernels` (Cannot find a build variant" in chosen(softcap=True)
    with pytest.raises(RuntimeError, match="kernels-community/flash-attn3 cannot be loaded by `kernels`"):
        from_hub.interface(from_hub.FLASH_3)
    # A build from before its functions were operators.
    kernels.builds[from_hub.FLASH_3.name] = SimpleNamespace(_flash_attn_forward=forward_3, _flash_attn_backward=print)
    from_hub._load.cache_clear()
    assert "flash-attn 3 of the Hub: has no operator _flash_attn_backward in this build" in chosen(softcap=True)
    monkeypatch.setitem(sys.modules, "kernels", None)
    from_hub._load.cache_clear()
    assert "needs the `kernels` package, which cannot be imported" in chosen(softcap=True)
