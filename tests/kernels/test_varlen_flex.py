"""The varlen and flex backends on the CPU: everything around the libraries' kernels, and FlexAttention uncompiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import flex_attention as torch_flex
from trees import random_tree_end, with_reach
from varlen_oracle import oracle_backward, oracle_forward

from mmdpo_kernels import tree_attention
from mmdpo_kernels.backends.calls import TreeAttentionCall
from mmdpo_kernels.backends.flex import tree_attention as flex
from mmdpo_kernels.backends.reference import tree_attention as reference
from mmdpo_kernels.backends.varlen import libraries
from mmdpo_kernels.backends.varlen import tree_attention as varlen
from mmdpo_kernels.backends.varlen.library import Library, Options
from mmdpo_kernels.backends.varlen.plan import plan
from mmdpo_kernels.tree_mask import visible

# One token; an odd length with grouped heads.
SHAPES = [(1, 1, 1, 1, 8), (3, 4, 2, 37, 16)]
# A hidden token inside a node, hidden tokens at both ends, a row where nothing is seen.
HIDDEN = torch.tensor([[0, 9, 9, 3, 4, 9, 7, 7, 9], [9, 9, 5, 3, 5, 9, 9, 7, 8], [0, 1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.int32)


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    batch, heads, kv, length, dim = shape
    return [torch.randn(batch, length, h, dim, dtype=dtype).transpose(1, 2).requires_grad_() for h in (heads, kv, kv)]


@pytest.fixture
def oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    """A library in plain PyTorch in the place of those that need a GPU."""
    library = Library(name="oracle", unavailable_reason=lambda *call: None, forward=oracle_forward, backward=oracle_backward)
    monkeypatch.setattr(libraries, "LIBRARIES", (library,))


def results(backend: str, qkv: list[Tensor], tree_end: Tensor | None, through_lse: bool, **options: Any) -> list[Tensor]:
    """Output, lse, gradients."""
    out = tree_attention(*qkv, tree_end, backend=backend, **options)
    torch.manual_seed(1)
    total = (out.output * torch.randn(out.output.shape, dtype=out.output.dtype)).sum()
    if through_lse:
        total = total + out.lse.masked_fill(out.lse.isinf(), 0.0).sin().sum()
    return [out.output, out.lse, *torch.autograd.grad(total, qkv)]


OPTIONS = [{}, {"window": 3}, {"softcap": 2.0, "scale": 0.3}, {"window": 1, "softcap": 1.5}]


@pytest.mark.usefixtures("oracle")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("seed", [None, 0, 1])
def test_varlen_equals_the_reference(seed: int | None, shape: tuple[int, ...], options: dict[str, float]) -> None:
    qkv = inputs(shape)
    tree_end = None if seed is None else random_tree_end(shape[0], shape[3], seed)
    for ours, truth in zip(*(results(name, qkv, tree_end, False, **options) for name in ("varlen", "reference")), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.usefixtures("oracle")
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_varlen_with_hidden_tokens_and_through_lse(options: dict[str, float]) -> None:
    qkv = inputs((3, 2, 1, 9, 8))
    for ours, truth in zip(*(results(name, qkv, HIDDEN, True, **options) for name in ("varlen", "reference")), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


def pair(prompt: int, response: int) -> Tensor:
    length = prompt + 2 * response
    tree_end = torch.full((1, length), length, dtype=torch.int32)
    tree_end[0, prompt : prompt + response] = prompt + response
    return tree_end


def test_a_pair_is_two_sequences() -> None:
    (call,) = plan(pair(5, 2), 1, 9, None, torch.device("cpu"))
    assert call.rows is None  # every query once, in order
    assert call.query_starts.tolist() == [0, 7, 9]
    assert call.key_starts.tolist() == [0, 7, 14]
    assert call.keys is not None and call.keys.tolist() == [*range(7), *range(5), 7, 8]
    assert [tokens.tolist() for _, tokens in call.copies] == [[*range(9)], [*range(5)]]


def test_causal_examples_are_not_gathered() -> None:
    packed = torch.tensor([[4, 4, 4, 4, 6, 6]], dtype=torch.int32)
    for tree_end in (None, packed):
        (call,) = plan(tree_end, 1, 6, None, torch.device("cpu"))
        assert call.rows is None and call.keys is None and call.copies == ()


def test_the_plan_is_made_once_a_tensor_and_window() -> None:
    tree_end = pair(5, 2)
    first = plan(tree_end, 1, 9, None, tree_end.device)
    assert plan(tree_end[:, None][:, 0], 1, 9, None, tree_end.device) is first
    assert plan(tree_end, 1, 9, 4, tree_end.device) is not first
    tree_end[0, 5:7] = 9
    assert plan(tree_end, 1, 9, None, tree_end.device) is not first


@pytest.mark.usefixtures("oracle")
def test_the_sum_over_copies_is_in_float32() -> None:
    """Sixty-four branches of one token: their shares of a prompt key's gradient, added up in float16, would be rounded each time."""
    length = 70
    tree_end = torch.arange(1, length + 1, dtype=torch.int32)[None].clone()
    tree_end[0, :6] = length
    qkv = [t.detach().half().requires_grad_() for t in inputs((1, 1, 1, length, 8))]
    up = torch.ones(1, 1, length, 8)
    ours, truth = (
        torch.autograd.grad(tree_attention(*leaves, tree_end, backend=name).output, leaves, up.to(leaves[0].dtype))
        for name, leaves in (("varlen", qkv), ("reference", [t.detach().double().requires_grad_() for t in qkv]))
    )
    assert (ours[2].double() - truth[2])[:, :, :6].abs().max() <= 1e-3 * truth[2].abs().max()


def test_varlen_says_what_it_lacks() -> None:
    reason = varlen.unavailable_reason("cpu", torch.bfloat16)
    assert reason == "variable-length flash attention runs on cuda tensors, got cpu"
    assert (
        varlen.unavailable_reason("cuda", torch.float32)
        == "variable-length flash attention takes float16 and bfloat16, got torch.float32"
    )
    assert "multiples of 8, got 20" in str(varlen.unavailable_reason("cuda", torch.float16, head_dim=20))
    assert "no per-segment mass" in str(varlen.unavailable_reason("cuda", torch.float16, mass=True))
    assert "has no reach" in str(varlen.unavailable_reason("cuda", torch.float16, reach=True))


def test_every_library_says_why_it_cannot_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    reason = str(varlen.unavailable_reason("cuda", torch.bfloat16, softcap=True))
    for name in ("flash-attn 2: ", "flash-attn 3: ", "flash-attn 4: has no softcap", "PyTorch: has no softcap"):
        assert name in reason
    assert libraries.choose("cuda", torch.bfloat16, 128, False).name == "PyTorch"  # type: ignore[union-attr]


def test_pytorchs_operators_take_these_arguments() -> None:
    """The call reaches a kernel of PyTorch's: the arguments fit its schema, and meta tensors get results of the right shapes."""
    options = Options(scale=0.5, softcap=None, window=4)
    (call,) = plan(pair(5, 2), 1, 9, 4, torch.device("cpu"))
    call = call._replace(query_starts=call.query_starts.to("meta"), key_starts=call.key_starts.to("meta"))
    query, key = (torch.empty(size, heads, 16, dtype=torch.bfloat16, device="meta") for size, heads in ((9, 4), (14, 2)))
    output, lse = libraries._torch_forward(query, key, key, call, options)
    assert output.shape == (9, 4, 16) and lse.shape == (4, 9)
    grads = libraries._torch_backward(output, query, key, key, output, lse, call, options)
    assert [grad.shape for grad in grads] == [query.shape, key.shape, key.shape]


# FlexAttention: two blocks of 128 and a rest would take long uncompiled; blocks are made smaller where they matter.


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize(("options", "seed"), [({"window": 3, "softcap": 2.0, "scale": 0.3}, 1), ({}, None)], ids=str)
def test_flex_equals_the_reference(
    options: dict[str, Any], seed: int | None, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PyTorch forbids the backward on the CPU, and has it.
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *tensors: None)
    monkeypatch.setattr(flex, "unavailable_reason", lambda *call, **features: None)
    qkv = inputs((2, 4, 2, 37, 16))
    tree_end = None if seed is None else random_tree_end(2, 37, seed)
    if ahead:
        ends, reach = with_reach(torch.full((2, 37), 37) if tree_end is None else tree_end, 5, kind="pictures")
        tree_end, options = None if seed is None else ends, {**options, "reach": reach}
    for ours, truth in zip(*(results(name, qkv, tree_end, True, **options) for name in ("flex", "reference")), strict=True):
        torch.testing.assert_close(ours, truth, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_forward_on_the_cpu() -> None:
    qkv = [t.detach() for t in inputs((3, 2, 1, 9, 8), torch.float32)]
    ours, truth = (tree_attention(*qkv, HIDDEN, backend=name) for name in ("flex", "reference"))
    torch.testing.assert_close(ours.output, truth.output)
    torch.testing.assert_close(ours.lse, truth.lse)
    with pytest.raises(ValueError, match="no backward on the CPU"):
        tree_attention(*inputs((3, 2, 1, 9, 8)), HIDDEN, backend="flex")


@pytest.mark.parametrize("window", [None, 1, 5, 30])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("ahead", [False, True])
def test_flex_blocks_hold_what_the_tree_shows(
    window: int | None, seed: int, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No visible pair in an empty block, no hidden pair in a full one; blocks of 8, ragged at the end."""
    monkeypatch.setattr(flex, "_BLOCK", 8)
    tree_end, reach = random_tree_end(3, 61, seed), None
    if ahead:
        tree_end, reach = with_reach(tree_end, seed)
    mask = flex._block_mask(tree_end, window, reach)
    kinds = torch.zeros(3, 8, 8, dtype=torch.int64)
    for kind, (counts, which) in enumerate(
        ((mask.kv_num_blocks, mask.kv_indices), (mask.full_kv_num_blocks, mask.full_kv_indices)), start=1
    ):
        assert counts is not None and which is not None
        for b in range(3):
            for q in range(8):
                kinds[b, q, which[b, 0, q, : int(counts[b, 0, q])].long()] += kind
    seen = torch.nn.functional.pad(visible(tree_end, window, reach), (0, 3, 0, 3)).unflatten(2, (8, 8)).unflatten(1, (8, 8))
    some, every = seen.any(4).any(2), seen.all(4).all(2)
    assert kinds.max() <= 2
    assert not (some & (kinds == 0)).any()
    assert not (~every & (kinds == 2)).any()
    if window is None and not ahead:
        assert torch.equal(kinds == 2, every)
        assert seed > 2 or (kinds == 0).any()


def test_flex_mask_is_the_rule_and_does_not_hold_the_tensor() -> None:
    import gc
    import weakref

    tree_end = random_tree_end(2, 20, 3)
    mask = flex._tree_mask(tree_end, 4)
    index = torch.arange(20)
    rule = mask.mask_mod(torch.arange(2)[:, None, None], torch.zeros(()), index[:, None], index)
    assert torch.equal(rule, visible(tree_end, 4))
    assert flex._tree_mask(tree_end, 4) is mask
    alive = weakref.ref(tree_end)
    del tree_end
    gc.collect()
    assert alive() is None


@pytest.mark.usefixtures("oracle")
@pytest.mark.parametrize("shape", [(0, 2, 5, 8), (2, 2, 0, 8)])
@pytest.mark.parametrize("with_tree", [True, False])
def test_nothing_to_attend(shape: tuple[int, ...], with_tree: bool) -> None:
    q = torch.zeros(shape, requires_grad=True)
    tree_end = torch.zeros(shape[0], shape[2], dtype=torch.int32) if with_tree else None
    output = tree_attention(q, q, q, tree_end, backend="varlen").output
    output.sum().backward()
    assert output.shape == shape
    call = TreeAttentionCall(tree_end, None, 0, 1.0, None, None)
    assert flex.forward(q, q, q, call)[0].shape == shape
    assert reference.forward(q, q, q, call)[0].shape == shape
