"""Token trees through layers that carry a state: every sequence of a tree against itself alone through the unpatched model."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from tiny_models import _widen
from torch import Tensor
from transformers import AutoModelForCausalLM, Cache, Qwen3_5TextConfig
from wide_kernels import widen_kernels

from mmdpo_kernels import TokenTree, decoder_layers, patch_model, record_attention, recurrent, tree_refusal, unpatch_model
from mmdpo_kernels.patched import language_tower

needs_carrying = pytest.mark.skipif(
    not hasattr(Cache, "get_conv_state"), reason="transformers before 5.22 keeps states under other names: trees are refused"
)
KINDS = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]
ROUNDING = 2e-6
"""Of a log-probability on the scale of the largest, where transformers' kernels compute in float32."""


def small(**options: Any) -> Any:
    settings: dict[str, Any] = {
        "vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "pad_token_id": 0, "eos_token_id": None, "layer_types": KINDS,
        "rope_parameters": {
            "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]
        },
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = AutoModelForCausalLM.from_config(Qwen3_5TextConfig(**settings | options)).double().eval()
        _widen(model)
    return model


def text(length: int, seed: int) -> list[int]:
    return torch.randint(5, 50, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def sequences() -> list[list[int]]:
    """Roots of 64, 70 and one token; nodes of one token inside and at the end, one below another; ends on and beside a block of 64."""
    root, a, b, block = text(70, 1), text(9, 2), text(58, 3), text(64, 4)
    return [
        *([*root, *a, 1, *text(4, 5)], [*root, *a, 1, 2, 3], [*root, *a, 1, 2, 4, 4], [*root, *a, 2], [*root, *a]),
        *([*root, *b, *text(5, 6)], [*root, *b, *text(70, 7)], [*root, 4]),
        *([*block, 1, *text(62, 8)], [*block, 2, *text(64, 9)], [*block, 1]),
        *([3, 1, 1], [3, 2]),
    ]


def packed(rows: list[list[int]]) -> tuple[TokenTree, dict[str, Tensor]]:
    tree = TokenTree.from_sequences(rows, prompt_lengths=[1] * len(rows))
    return tree, {
        "input_ids": tree.input_ids[None],
        "attention_mask": tree.attention_mask,
        "position_ids": tree.position_ids[None],
    }


def logps(logits: Tensor, ids: list[int]) -> Tensor:
    return logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids)[1:, None])[:, 0]


def weighted(found: list[Tensor]) -> Tensor:
    return sum((each * torch.linspace(1, 2, len(each), dtype=each.dtype)).sum() for each in found)  # type: ignore[return-value]


def alone(model: Any, rows: list[list[int]]) -> list[Tensor]:
    return [logps(model(input_ids=torch.tensor([row]), use_cache=False).logits[0], row) for row in rows]


def together(model: Any, rows: list[list[int]]) -> list[Tensor]:
    tree, inputs = packed(rows)
    logits = model(**inputs, use_cache=False).logits[0]
    return [logps(logits[path], row) for path, row in zip(tree.paths, rows, strict=True)]


def gradients(model: Any) -> dict[str, Tensor]:
    found = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    return found


@needs_carrying
def test_trees_equal_separate_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    """Log-probabilities and all gradients in float64, with gradient checkpointing of both kinds too."""
    widen_kernels(monkeypatch, "qwen3_5")
    model, rows = small(), sequences()
    expected = alone(model, rows)
    weighted(expected).backward()
    wanted = gradients(model)
    assert all(bool(gradient.abs().max() > 0) for gradient in wanted.values())
    patch_model(model).train()
    for reentrant in (None, True, False):
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found = together(model, rows)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
        weighted(found).backward()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, wanted[name], rtol=1e-9, atol=1e-9 * float(wanted[name].abs().max()), msg=name)


@needs_carrying
def test_kernels_of_transformers_own_precision() -> None:
    model, rows = small(), sequences()
    with torch.no_grad():
        expected, found = alone(model, rows), together(patch_model(model), rows)
    scale = max(float(each.abs().max()) for each in expected)
    assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) < ROUNDING * scale


@needs_carrying
def test_several_rows_and_padding_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trees of different lengths as one batch, with tokens that nobody sees between and behind theirs."""
    widen_kernels(monkeypatch, "qwen3_5")
    model = patch_model(small())
    trees = [packed(sequences()), packed(sequences()[7:])]
    width = 5 + max(tree.num_tokens for tree, _ in trees)
    at = 66  # in the middle of a node of the first, and between two of the second
    ids, mask, positions = torch.zeros(2, width, dtype=torch.long), torch.arange(width).repeat(2, 1), torch.zeros(2, width).long()
    places = []
    for row, (tree, _) in enumerate(trees):
        place = torch.arange(tree.num_tokens)
        place[at:] += 2
        ends = tree.tree_end.long()
        ids[row, place], positions[row, place] = tree.input_ids, tree.position_ids
        mask[row, place] = ends + 2 * (ends > at)
        places.append(place)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask.int()[:, None, None], position_ids=positions, use_cache=False).logits
        expected = [model(**inputs, use_cache=False).logits[0] for _, inputs in trees]
    assert bool(logits.isfinite().all())
    for row, place in enumerate(places):
        torch.testing.assert_close(logits[row, place], expected[row], rtol=1e-9, atol=1e-9)


def test_a_plan_runs_every_token_once_and_no_token_alone() -> None:
    tree, _ = packed(sequences())
    plan = recurrent.node_plan(tree.tree_end[None])
    assert plan is recurrent.node_plan(tree.tree_end[None])
    assert all(batch.tokens.shape[1] > 1 for batch in plan.batches if batch.parents is not None)
    rows = torch.cat([batch.tokens.flatten() for batch in plan.batches])
    assert torch.equal(rows[plan.source], torch.arange(tree.num_tokens))
    assert not any((batch.tokens == tree.num_tokens).any() for batch in plan.batches if batch.goes_on)
    empty = recurrent.node_plan(torch.arange(4, dtype=torch.int32)[None])
    assert empty.batches == () and empty.source.tolist() == [0] * 4


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batches_are_the_unpatched_models(side: str) -> None:
    model = small()
    ids = torch.tensor([text(70, 1), text(70, 2)])
    mask = torch.ones_like(ids)
    mask[0, slice(None, 9) if side == "left" else slice(-9, None)] = 0
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits
        drawn = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False)
        found = patch_model(model)(input_ids=ids, attention_mask=mask).logits
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=1e-9, atol=1e-9)
        assert torch.equal(model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=4, do_sample=False), drawn)


@needs_carrying
def test_copies_run_trees_and_unpatching_leaves_nothing() -> None:
    model, rows = small(), sequences()[:4]
    before = [(name, sorted(vars(module))) for name, module in model.named_modules()]
    patch_model(patch_model(model))
    with torch.no_grad():
        expected = together(model, rows)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
        for each in (model, *copies):
            assert [name for name, _ in each.named_modules()] == [name for name, _ in before]
            for parameter in each.model.layers[0].linear_attn.parameters():
                parameter.mul_(1.0 if each is model else 2.0)  # a copy's layers are its own
        torch.testing.assert_close(together(model, rows), expected)
        for each in copies:
            assert not torch.equal(together(each, rows)[0], expected[0])
    for each in (model, *copies):
        unpatch_model(each)
        assert [(name, sorted(vars(module))) for name, module in each.named_modules()] == before
        assert not any(module._forward_pre_hooks or module._forward_pre_hooks_with_kwargs for module in each.modules())


@needs_carrying
def test_what_a_tree_cannot_be_given_with() -> None:
    model = patch_model(small())
    tree, inputs = packed(sequences()[:2])
    with pytest.raises(ValueError, match="leaves no state to decode from; pass use_cache=False"):
        model(**inputs, use_cache=True)
    both = torch.cat([inputs["attention_mask"]] * 2, 2)
    with pytest.raises(ValueError, match=r"expected a tree of shape \(B or 1, 1, 1, S\), got \(1, 1, 2, "):
        model(**{**inputs, "attention_mask": both}, use_cache=False)


def test_versions_with_other_names_and_other_states_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A patched model then runs padded rows, and a tree raises."""
    with monkeypatch.context() as patch:
        patch.setattr(decoder_layers, "_STATES", frozenset({"no_such_state"}))
        model = patch_model(small())
        assert "go by a cache's methods from transformers 5.22 on" in str(tree_refusal(model))
        with pytest.raises(ValueError, match="not exact with this model: there are layers of linear_attention"):
            together(model, sequences()[:2])

    class Shift(torch.nn.Module):
        def forward(self, cache: Any) -> Any:
            return cache.get_conv_state(0)

    other = small()
    other.model.layers[2].shift = Shift()
    assert hasattr(Cache, "get_conv_state") == ("Shift carries a state too" in str(tree_refusal(other)))


def test_decoders_that_do_not_say_that_they_call_the_interface() -> None:
    model = small()
    assert not language_tower(model)._supports_attention_backend
    model.model.layers[2].self_attn = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="cannot be patched: .* whose layers all call ALL_ATTENTION_FUNCTIONS.get_interface"):
        patch_model(model)


@needs_carrying
def test_attention_is_recorded_where_there_is_any() -> None:
    model, rows = patch_model(small()), sequences()[:3]
    none = torch.zeros(1, 4, dtype=torch.long)
    with (
        pytest.raises(ValueError, match=r"layer 1 carries a state and attends to nothing; layers \[0, 1, 3\] do"),
        record_attention(model, none, none == 0, layers=[2, 1]),
    ):
        pass
    tree, inputs = packed(rows)
    segments = inputs["input_ids"] % 3
    for path, row in zip(tree.paths, rows, strict=True):
        counted = torch.zeros_like(segments, dtype=torch.bool)
        counted[0, path[-3:]] = True
        with torch.no_grad(), record_attention(model, segments, counted, layers=[2]) as packed_mass:
            model(**inputs, use_cache=False)
        ids = torch.tensor([row])
        last = torch.arange(len(row))[None] >= len(row) - 3
        with torch.no_grad(), record_attention(model, ids % 3, last, layers=[2], num_segments=3) as own_mass:
            model(input_ids=ids, use_cache=False)
        torch.testing.assert_close(packed_mass.mass[2], own_mass.mass[2], rtol=1e-6, atol=1e-6)


@pytest.mark.nightly
@needs_carrying
def test_trees_break_the_graph_and_padded_batches_do_not() -> None:
    model, rows = patch_model(small()), sequences()[:4]
    torch.compiler.reset()
    with torch.no_grad():
        expected = together(model, rows)
        ids = torch.tensor([text(70, 1)])
        want = model(input_ids=ids, use_cache=False).logits
        language_tower(model).compile(backend="eager", fullgraph=True)
        torch.testing.assert_close(model(input_ids=ids, use_cache=False).logits, want)
        with pytest.raises(Exception, match="(?i)disable"):
            together(model, rows)
        language_tower(model).compile(backend="eager")
        torch.testing.assert_close(together(model, rows), expected)
    torch.compiler.reset()
