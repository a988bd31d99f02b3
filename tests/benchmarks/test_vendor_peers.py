"""Peers of vendors that need a GPU: what they are given, with plain PyTorch in their places, and why they cannot run here."""

from __future__ import annotations

import importlib.metadata
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from trees import random_tree_end

from benchmarks.kernels import registry
from benchmarks.kernels.case import CannotServe, NotOfThisCase
from benchmarks.kernels.peers import cudnn
from mmdpo_kernels.tree_mask import visible


def seen_by(mask: Tensor, batch: int, length: int) -> Tensor:
    """(B, S, S) of what `create_mask_plan` reads in its endpoints, after the checks that its kernels make."""
    heads, count, queries = mask.shape
    assert (heads, count % 2, queries, mask.dtype) == (1, 1, batch * length, torch.int32) and mask.is_contiguous()
    ends = torch.cat([mask.new_zeros(1, queries), mask[0]])
    assert ((ends >= 0) & (ends <= length)).all() and (ends.diff(dim=0) >= 0).all()
    keys = torch.arange(length)
    first, last = ends[0::2, :, None], ends[1::2, :, None]
    return ((keys >= first) & (keys < last)).any(0).view(batch, length, length)


@pytest.mark.parametrize("seed", range(8))
def test_intervals_are_the_trees_rule(seed: int) -> None:
    tree_end = random_tree_end(3, 41, seed)
    assert torch.equal(seen_by(cudnn.intervals(tree_end), 3, 41), visible(tree_end))


def test_intervals_of_a_pair_and_of_padding() -> None:
    pair = torch.tensor([[6, 6, 4, 4, 6, 6]], dtype=torch.int32)
    assert cudnn.intervals(pair).tolist() == [[[1, 2, 3, 4, 2, 2], [1, 2, 3, 4, 4, 4], [1, 2, 3, 4, 5, 6]]]
    padded = torch.tensor([[0, 1, 4, 4]], dtype=torch.int32)
    assert torch.equal(seen_by(cudnn.intervals(padded), 1, 4), visible(padded))


def flex_module() -> ModuleType:
    """`cudnn.flex_attention` in plain PyTorch, by its documentation."""
    module: Any = ModuleType(cudnn.ATTENTION)

    def create_mask_plan(mask_func: Tensor, q: Tensor, k: Tensor, v: Tensor, *, build_backward: bool | None = None) -> Tensor:
        return seen_by(mask_func, q.shape[0], q.shape[1])

    def flex_attn_func(q: Tensor, k: Tensor, v: Tensor, *, mask_plan: Tensor, softmax_scale: float | None = None) -> Tensor:
        query, key, value = (tensor.transpose(1, 2) for tensor in (q, k, v))
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
        scores = (query @ key.mT * softmax_scale).masked_fill(~mask_plan[:, None], float("-inf"))
        return (scores.softmax(-1) @ value).transpose(1, 2)

    module.create_mask_plan, module.flex_attn_func = create_mask_plan, flex_attn_func
    return module


def scores_module() -> ModuleType:
    """`cudnn.deepseek_sparse_attention`'s dense scores in plain PyTorch, by their documentation."""
    module: Any = ModuleType(cudnn.SCORES)

    def wrapper(
        q: Tensor, k: Tensor, lse: Tensor, softmax_scale: float, qhead_per_kv_head: int, q_causal_offsets: Tensor
    ) -> dict[str, Tensor]:
        assert q_causal_offsets.dtype == torch.int32 and q.shape[2] == qhead_per_kv_head and k.shape[2] == 1
        scores = torch.einsum("bqhd,btd->bqht", q, k[:, :, 0]) * softmax_scale
        out = torch.exp(scores - lse[..., None]).sum(2)
        last = q_causal_offsets[:, None] + torch.arange(q.shape[1])
        hidden = torch.arange(k.shape[1]) > last[..., None]
        return {"out": out.masked_fill(hidden, float("-inf")), "denom": out.masked_fill(hidden, 0).sum(-1)}

    module.dense_attn_score_recompute_wrapper = wrapper
    return module


@pytest.mark.parametrize("name", ["pair", "triple", "questions", "recorded", "causal_8k_backward"])
def test_attention_over_intervals_is_right(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Output and gradients as the harness compares them, of the cases in small."""
    monkeypatch.setitem(sys.modules, cudnn.ATTENTION, flex_module())
    [case] = registry.cases(["tree_attention"], [name])
    compared(case, cudnn.CONTESTANTS["tree_attention"][0], {"output"})


def test_scores_of_all_heads_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, cudnn.SCORES, scores_module())
    [contestant] = cudnn.CONTESTANTS["attention_mass"]
    cases = {case.name: case for case in registry.cases(["attention_mass"])}
    compared(cases["mean"], contestant, {"mass"})
    for name, error in (("rows_lse", NotOfThisCase), ("backward", NotOfThisCase), ("tokens", CannotServe)):
        with pytest.raises(error):
            contestant.prepare(cases[name].make(cases[name].sizes["small"], torch.device("cpu"), torch.float32))


def compared(case: Any, contestant: Any, names: set[str]) -> None:
    problem = case.make(case.sizes["small"], torch.device("cpu"), torch.float32)
    run, truth = contestant.prepare(problem), case.truth(problem)
    found = run.results(run.call())
    assert names <= set(found) and all(name in truth for name in found)
    for name, tensor in found.items():
        torch.testing.assert_close(tensor.double(), truth[name], rtol=1e-4, atol=1e-5)


def test_why_they_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    [attention], [scores] = (cudnn.CONTESTANTS[op] for op in ("tree_attention", "attention_mass"))
    assert attention.unavailable_reason("cpu", torch.bfloat16) == "it runs on cuda only"
    assert scores.unavailable_reason("cuda", torch.float16) == "it takes bfloat16, not torch.float16"
    monkeypatch.setattr(cudnn, "version", missing)
    assert attention.unavailable_reason("cuda", torch.bfloat16) == "nvidia-cudnn-frontend is not installed"
    monkeypatch.setattr(cudnn, "version", lambda name: "1.14.0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert "compute capability 9.0, 10.0, 10.3, this GPU has 8.0" in str(attention.unavailable_reason("cuda", torch.bfloat16))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setitem(sys.modules, cudnn.ATTENTION, ModuleType(cudnn.ATTENTION))
    assert attention.unavailable_reason("cuda", torch.bfloat16) == (
        "nvidia-cudnn-frontend 1.14.0 has no create_mask_plan, flex_attn_func; take 1.32 or newer"
    )
    monkeypatch.setitem(sys.modules, cudnn.ATTENTION, None)
    assert "cannot be imported" in str(attention.unavailable_reason("cuda", torch.bfloat16))


def missing(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)
