"""attention_mass: reference against the rule, gradients, reductions, errors. Native has its own file."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from trees import random_tree_end, with_reach

from mmdpo_kernels import attention_mass, tree_attention


def case(seed: int, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Two batch rows, grouped heads, an unused row, an odd number of keys."""
    torch.manual_seed(seed)
    tree_end = random_tree_end(2, 19, seed, padding=False)
    return {
        "query": torch.randn(2, 4, 19, 8, dtype=dtype),
        "key": torch.randn(2, 2, 19, 8, dtype=dtype),
        "segments": torch.randint(-1, 3, (2, 19), dtype=torch.int32),
        "row_positions": torch.tensor([[3, 18, 7], [11, -1, 0]]),
        "tree_end": tree_end,
    }


def rows_of(c: dict[str, Tensor]) -> Tensor:
    index = c["row_positions"].clamp(min=0)[:, None, :, None].expand(-1, 4, -1, 8)
    return c["query"].gather(2, index)


def call(c: dict[str, Tensor], query_rows: Tensor, key: Tensor, **options: object) -> Tensor:
    return attention_mass(
        query_rows,
        key,
        c["segments"],
        row_positions=c["row_positions"],
        num_segments=3,
        tree_end=c["tree_end"],
        backend="reference",
        **{"reach": c.get("reach"), **options},  # type: ignore[arg-type]
    )


def looking_ahead(c: dict[str, Tensor]) -> dict[str, Tensor]:
    """By packed index of the token: the rows' places are 3, 18, 7, 11 and 0."""
    tree_end, reach = with_reach(c["tree_end"], 0, kind="pictures")
    return {**c, "tree_end": tree_end, "reach": reach}


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_equals_the_mass_of_tree_attention(seed: int, ahead: bool) -> None:
    c = looking_ahead(case(seed)) if ahead else case(seed)
    whole = tree_attention(
        c["query"],
        c["key"],
        c["key"],
        c["tree_end"],
        reach=c.get("reach"),
        segments=c["segments"],
        num_segments=3,
        backend="reference",
    )
    index = c["row_positions"].clamp(min=0)[:, None, :, None].expand(-1, 4, -1, 3)
    used = (c["row_positions"] >= 0)[:, None, :, None]
    want = whole.mass.gather(2, index) * used
    got = call(c, rows_of(c), c["key"])
    torch.testing.assert_close(got, want)
    lse = whole.lse.gather(2, index[..., 0])
    torch.testing.assert_close(call(c, rows_of(c), c["key"], lse=lse), want)
    mean = want.sum((1, 2)) / (4 * used.sum((1, 2, 3)))[:, None]
    torch.testing.assert_close(call(c, rows_of(c), c["key"], reduce="mean"), mean)
    heat = call(c, rows_of(c), c["key"], reduce="tokens")
    torch.testing.assert_close(heat.sum(1), torch.ones(2, dtype=heat.dtype))
    per_segment = torch.stack([(heat * (c["segments"] == n)).sum(1) for n in range(3)], 1)
    torch.testing.assert_close(per_segment, mean)


@pytest.mark.parametrize("reduce", [None, "mean", "tokens"])
@pytest.mark.parametrize("options", [{}, {"softcap": 1.5}, {"window": 4}])
def test_gradcheck(reduce: str | None, options: dict[str, float]) -> None:
    c = looking_ahead(case(0)) if "window" in options else case(0)
    rows, key = rows_of(c).requires_grad_(), c["key"].requires_grad_()
    assert torch.autograd.gradcheck(lambda q, k: call(c, q, k, reduce=reduce, **options), (rows, key))


def test_rows_that_see_nothing_are_zero() -> None:
    c = case(0)
    c["tree_end"] = torch.arange(19, dtype=torch.int32).expand(2, -1)
    for reduce in (None, "mean", "tokens"):
        assert (call(c, rows_of(c), c["key"], reduce=reduce) == 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": "sum"}, "reduce must be"),
        ({"lse": torch.zeros(2, 4, 1)}, "lse must have shape"),
        ({"softcap": -1.0}, "softcap must be above 0"),
        ({"reach": torch.ones(2, 3, dtype=torch.int32)}, r"reach must have shape \(2, 19\), got \(2, 3\)"),
    ],
)
def test_errors_name_the_argument(options: dict[str, object], message: str) -> None:
    c = case(0)
    with pytest.raises(ValueError, match=message):
        call(c, rows_of(c), c["key"], **options)


@pytest.mark.parametrize("name", ["segments", "row_positions", "tree_end", "reach", "lse"])
def test_a_tensor_on_another_device_is_refused(name: str) -> None:
    c = case(0)
    given = {**c, "lse": torch.zeros(2, 4, 3), "reach": torch.arange(1, 20).expand(2, -1)}
    given[name] = given[name].to("meta")
    with pytest.raises(ValueError, match=f"{name} must be on the query's device cpu, got meta"):
        call(given, rows_of(c), given["key"], lse=given["lse"])
