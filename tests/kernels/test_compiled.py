"""Patched models under `torch.compile` and `torch.export`: the numbers of the model as it is, in one graph, made once."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TINY, _widen
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from training_cases import config, preference_records, tiny
from transformers import AutoModelForCausalLM, Gemma2Config, LlamaConfig

from mmdpo_kernels import AttentionRecorder, TokenTree, patch_model, record_attention, tree_attention, unpatch_model
from mmdpo_trainers.checks.inputs import answers, prompt_records
from mmdpo_trainers.checks.segments import segments_of_images
from mmdpo_trainers.models.encode import encode_prompts
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.training.trainer import PreferenceTrainer

LAYERS, LENGTH = 3, 11
SMALL: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip
CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SMALL),
    "softcap, every other layer slides": lambda: Gemma2Config(
        **SMALL, head_dim=8, sliding_window=5, query_pre_attn_scalar=8, attn_logit_softcapping=2.0
    ),
}


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(name: str = "llama", **options: Any) -> Any:
    model = AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float64).eval()
    _widen(model)
    return patch_model(model, **options)


def padded() -> dict[str, Any]:
    ids = torch.randint(5, 50, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask, "use_cache": False}


def packed() -> dict[str, Any]:
    tree = TokenTree.from_sequences([[5, 6, 7, 8, 9], [5, 6, 7, 10], [5, 6, 7, 11, 12, 13, 14]], prompt_lengths=[3] * 3)
    positions = tree.position_ids[None]
    return {
        "input_ids": tree.input_ids[None], "attention_mask": tree.attention_mask, "position_ids": positions, "use_cache": False,
    }  # fmt: skip


def results(model: Any, call: Any, inputs: dict[str, Any], real: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of the real tokens, and the gradients of a loss of them that are not zero: compiled, what takes no part has zeros, else none.

    call: the model, or what it was compiled to.
    """
    model.zero_grad()
    logits = call(**inputs).logits[real]
    logits.log_softmax(-1).amax(-1).mean().backward()
    return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def recorded(
    model: Any, call: Any, inputs: dict[str, Any], layers: tuple[int, ...] = (0, 2), reduce: str | None = "mean"
) -> AttentionRecorder:
    segments = torch.arange(inputs["input_ids"].numel()).view(inputs["input_ids"].shape) % 3
    rows = segments != 1
    with record_attention(model, segments, rows, layers=layers, reduce=reduce) as recorder:
        call(**inputs)
    return recorder


def same(got: Any, want: Any, near: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=near, atol=near)


def counting(backend: str = "aot_eager") -> CompileCounterWithBackend:
    return CompileCounterWithBackend(backend)


@pytest.mark.parametrize(
    ("name", "batch"),
    [
        pytest.param("llama", padded, marks=pytest.mark.nightly),
        ("llama", packed),
        pytest.param("softcap, every other layer slides", packed, marks=pytest.mark.nightly),
    ],
)
def test_one_graph_with_the_numbers_of_the_model_as_it_is(name: str, batch: Callable[[], dict[str, Any]]) -> None:
    model, inputs = build(name), batch()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    real = inputs["attention_mask"].bool() if batch is padded else torch.ones_like(inputs["input_ids"], dtype=torch.bool)
    same(results(model, compiled, inputs, real), results(model, model, inputs, real))
    for reduce in ("mean", None, "tokens"):
        want, got = recorded(model, model, inputs, reduce=reduce), recorded(model, compiled, inputs, reduce=reduce)
        assert sorted(got.mass) == [0, 2]
        assert not torch.allclose(want.mass[0], want.mass[2])
        same(got.mass, want.mass)


@pytest.mark.nightly
def test_a_graph_is_made_once_whatever_becomes_of_other_models() -> None:
    """Two graphs in all, one of which has the recorder's operators: for every recorder, and none for another model's sake."""
    model, other, inputs, graphs = build(), build(), padded(), counting()
    compiled = torch.compile(model, backend=graphs, fullgraph=True)
    compiled(**inputs)
    assert graphs.frame_count == 1
    first = recorded(model, compiled, inputs)
    assert graphs.frame_count == 2
    graphs.clear()
    torch._dynamo.utils.counters.clear()
    third = build(backend="reference")
    recorded(third, third, inputs)
    unpatch_model(other)
    del other, third
    gc.collect()
    compiled(**inputs)
    for layers in ((0, 2), (1,)):
        again = recorded(model, compiled, inputs, layers=layers)
        same(again.mass, recorded(model, model, inputs, layers=layers).mass)
        compiled(**inputs)
    same(first.mass, recorded(model, compiled, inputs).mass)
    assert graphs.frame_count == 0 and not torch._dynamo.utils.counters["stats"]["unique_graphs"]


def test_layers_compiled_by_themselves_share_their_graphs() -> None:
    """What is recorded of a layer is told apart by data: all layers have one code."""
    model, inputs, graphs = build(), padded(), counting()
    want = recorded(model, model, inputs)
    for layer in model.model.layers:
        layer.compile(backend=graphs, fullgraph=True)
    same(recorded(model, model, inputs).mass, want.mass)
    assert graphs.frame_count == 1


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable.*:FutureWarning")
@pytest.mark.nightly
def test_checkpointed_layers_count_once() -> None:
    model, inputs = build().train(), padded()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled, real = torch.compile(model, backend="aot_eager"), inputs["attention_mask"].bool()
    same(results(model, compiled, inputs, real), results(model, model, inputs, real))
    segments = inputs["input_ids"] % 3
    found = []
    for call in (compiled, model):
        with record_attention(model, segments, real, layers=[0, 2]) as recorder:
            results(model, call, inputs, real)
        assert recorder.counts[2].tolist() == real.sum(1).tolist()
        found.append(recorder.mass)
    same(*found)


def test_a_recorder_that_stops_early() -> None:
    model, inputs = build(), padded()
    compiled, segments, rows = torch.compile(model, backend="aot_eager"), inputs["input_ids"] % 3, inputs["input_ids"] > 0
    want = recorded(model, model, inputs, layers=(1,)).mass
    for given in (model, compiled):
        with record_attention(given, segments, rows, layers=[1], stop_early=True) as recorder:
            assert not compiled(**inputs).keys()
        with record_attention(model, segments, rows, layers=[1]) as whole:
            model(**inputs)
        same(recorder.mass, whole.mass)
        assert list(recorder._seen.layers) == [0, 1]
    assert list(want) == [1] and compiled(**inputs).logits.shape == (2, LENGTH, 50)


def test_generate_with_a_compiled_forward() -> None:
    """Steps of a compiled forward read what steps of the model itself do."""
    model, inputs = build(), {name: value for name, value in padded().items() if name != "use_cache"}
    segments = inputs["input_ids"] % 3
    found = []
    for compiled in (False, True):
        if compiled:
            model.model.compile(backend="aot_eager")
        with record_attention(model, segments, None, layers=[0, 2]) as recorder:
            model.generate(**inputs, max_new_tokens=4, do_sample=False)
        assert recorder.counts[2].tolist() == [4, 4]
        found.append(recorder.mass)
    same(*found)


@pytest.mark.nightly
def test_export_of_a_padded_batch() -> None:
    """As the unpatched model is exported: the program takes other padding, too."""
    inputs = padded()
    other = {**inputs, "attention_mask": inputs["attention_mask"].flip(0)}
    model = build()
    real = other["attention_mask"].bool()
    want = model(**other).logits[real].detach()
    programs = [torch.export.export(each(model), (), inputs, strict=True) for each in (unpatch_model, patch_model)]
    for program in programs:
        same(program.module()(**other).logits[real].detach(), want)
    assert [any("mmdpo_kernels" in str(node.target) for node in program.graph.nodes) for program in programs] == [False, True]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.nightly)])
@pytest.mark.parametrize("ahead", [False, True])
def test_the_op_by_itself_with_every_output(backend: str, ahead: bool) -> None:
    """With masses and their gradients; a tree and a reach that the compiled code makes itself, twice."""
    shape = (2, 4, LENGTH, 8)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    ends = torch.randint(0, LENGTH, (2, LENGTH), dtype=torch.int32)
    segments = torch.randint(-1, 3, (2, LENGTH))

    def loss(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        total = query.new_zeros(())
        for step in (1, 5):
            tree = torch.maximum((ends + step).clamp(max=LENGTH), torch.arange(LENGTH, dtype=torch.int32))
            reach = None
            if ahead:
                index = torch.arange(LENGTH)
                tree = torch.where(tree > index, tree, 0)
                reach = torch.where(index < step, step, index + 1).expand(2, -1)
            found = tree_attention(query, key, value, tree, reach=reach, segments=segments, num_segments=3, softcap=3.0)
            total = total + found.output.square().sum() + found.mass.square().sum() + found.lse.exp().nan_to_num().sum()
        return total

    compiled = torch.compile(loss, backend=backend, fullgraph=True)
    want, got = loss(*inputs), compiled(*inputs)
    same(got, want)
    same(torch.autograd.grad(got, inputs), torch.autograd.grad(want, inputs))


def test_compiled_code_that_looks_ahead_too_little_is_refused() -> None:
    """As values are not known while it is traced, when it runs."""
    query, ends = torch.randn(1, 1, 4, 8), torch.full((1, 4), 4)
    compiled = torch.compile(lambda reach: tree_attention(query, query, query, ends, reach=reach).output, backend="aot_eager")
    with pytest.raises(ValueError, match=r"reach\[0, 2\] must be in \[3, 4\], got 2"):
        compiled(torch.tensor([[1, 2, 2, 4]]))


def family(name: str, folder: Path) -> LoadedModel:
    return load_model(TINY[name](folder / "model"), dtype=torch.float64, device="cpu")


def check_family(loaded: LoadedModel, backend: str, near: float | None) -> None:
    """Logits, gradients and recorded masses at two layers, compiled and not.

    near: None: as near as the unpatched model is, compiled and not, whose float32 parts (norms, rotary positions) inductor fuses.
    """
    encoded = encode_prompts(loaded, prompt_records(), padding_side="right", answers=answers())
    inputs, real = {**encoded.inputs, "use_cache": False}, encoded.inputs["attention_mask"].bool()

    def both(model: Any) -> tuple[Any, list[Any]]:
        compiled = torch.compile(model, backend=backend)
        return compiled, [results(model, call, inputs, real) for call in (compiled, model)]

    plain = both(unpatch_model(loaded.model))[1] if near is None else []
    model = patch_model(loaded.model)
    compiled, found = both(model)
    if near is None:
        assert all(ours <= 2 * plains + 1e-9 for ours, plains in zip(apart(*found), apart(*plain), strict=True))
    else:
        same(*found, near)
    layers = sorted({loaded.image_layers[0], loaded.image_layers[-1]})
    tokens = segments_of_images(loaded, encoded)
    if encoded.cross_segments is not None:
        tokens = torch.full_like(encoded.inputs["input_ids"], -1)
    masses = []
    for call in (compiled, model):
        with record_attention(
            model, tokens, real, layers=layers, num_segments=4, cross_segments=encoded.cross_segments
        ) as recorder:
            call(**inputs)
        masses.append(recorder.mass)
        assert sorted(recorder.mass) == layers
    same(*masses, 1e-6 if near is None else near)
    assert bool(masses[0][layers[0]].sum() > 0)


def apart(got: Any, want: Any) -> tuple[float, float]:
    """How far logits, and all gradients together, are from each other, as a share of their size."""
    names = sorted(want[1])
    assert names == sorted(got[1])
    pairs = [(got[0], want[0]), tuple(torch.cat([each[1][name].flatten() for name in names]) for each in (got, want))]
    return tuple(float((one - other).norm() / other.norm()) for one, other in pairs)  # type: ignore[return-value]


@pytest.mark.parametrize("name", ["llava", *(pytest.param(name, marks=pytest.mark.nightly) for name in TINY if name != "llava")])
def test_families(name: str, tmp_path: Path) -> None:
    check_family(family(name, tmp_path), "aot_eager", 1e-9)


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_families_in_compiled_code(name: str, tmp_path: Path) -> None:
    check_family(family(name, tmp_path), "inductor", None)


def test_the_trainer_logs_the_same(tmp_path: Path) -> None:
    """Losses, rewards and attention ratios of three steps, compiled and not."""
    logs = []
    for compiled in (False, True):
        loaded = tiny(tmp_path / "model")
        torch._dynamo.utils.counters.clear()
        options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if compiled else {}
        trainer = PreferenceTrainer(
            loaded.model,
            config(tmp_path / "out", max_steps=3, attention_layer=1, **options),
            processing_class=loaded.processor,
            train_dataset=preference_records(4),
        )
        trainer.train()
        logs.append(
            [{k: v for k, v in entry.items() if "/" in k or k in ("loss", "nll_loss")} for entry in trainer.state.log_history]
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert {"loss", "attn/ratio_sequence", "attn/ratio_grid"} <= logs[0][0].keys()
    for got, want in zip(logs[1], logs[0], strict=True):
        assert got == pytest.approx(want, rel=1e-6)
