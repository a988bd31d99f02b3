"""What benchmarks of bfloat16 on a CPU are held to: it depends on whether the CPU multiplies it."""

from __future__ import annotations

from contextlib import suppress

import pytest
import torch

from benchmarks.kernels import case as kernels_case
from benchmarks.kernels import goals, registry
from benchmarks.kernels.case import NotOfThisCase
from benchmarks.kernels.peers import bare_products


@pytest.mark.parametrize(("bare", "met"), [("two bare products in float32", False), ("two bare products", True)])
def test_the_goal_of_bfloat16_is_higher_where_a_cpu_emulates_it(bare: str, met: bool) -> None:
    """Four times as fast as TRL is enough where TRL's products are the CPU's own."""
    times = {"auto": 1.0, goals.TRL: 4.0, bare: 1.0}
    contestants = {
        name: {"ours": name == "auto", "median": one, "seconds": [one] * 3, "peak_bytes": 1} for name, one in times.items()
    }
    entry = {"op": "linear_logprobs", "case": "frozen_32k_200_bf16", "contestants": contestants}
    [goal] = [
        goal for goal in goals.GOALS if "200 rows, 32k tokens, bfloat16" in goal.what and "TRL's as its trainer" in goal.what
    ]
    assert goal.find(goals.Result({"cases": [entry]})).met is met


@pytest.mark.parametrize("multiplies", [True, False])
def test_bare_products_of_bfloat16_are_the_cpu_s_own_where_it_has_them(multiplies: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bare_products, "multiplies_bfloat16", lambda: multiplies)
    [case] = registry.cases(["linear_logprobs"], ["frozen_32k_200_bf16"])
    problem = case.make(case.sizes["small"], torch.device("cpu"), torch.bfloat16)
    taking_part = {}
    for contestant in bare_products.CONTESTANTS["linear_logprobs"]:
        with suppress(NotOfThisCase):
            taking_part[contestant.name] = contestant.prepare(problem).call()["_logits"].dtype
    wide = {"two bare products in float32": torch.float32}
    assert taking_part == ({"two bare products": torch.bfloat16} if multiplies else wide)


def test_cases_of_pytorch_s_products_in_bfloat16_are_left_out_where_they_take_minutes(monkeypatch: pytest.MonkeyPatch) -> None:
    [case] = registry.cases(["tree_attention"], ["pair_bf16"])
    monkeypatch.setattr(kernels_case, "multiplies_bfloat16", lambda: False)
    assert "no instructions for products of bfloat16" in str(case.unfit(torch.device("cpu")))
    assert case.unfit(torch.device("cuda")) is None
    monkeypatch.setattr(kernels_case, "multiplies_bfloat16", lambda: True)
    assert case.unfit(torch.device("cpu")) is None
