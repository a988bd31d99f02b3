"""MLPs in chunks of rows under gradient checkpointing: the same numbers, no forward more, less memory, and left alone where that is not so."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from training_cases import Gradients, config, preference_records, tiny, warm_adapter
from transformers import Gemma2Config, Gemma2Model, LlamaConfig, LlamaModel, Qwen3MoeConfig, Qwen3MoeModel
from transformers.models.llama.modeling_llama import LlamaMLP

from mmdpo_trainers.training.mlp_chunks import Chunked, chunk_mlps
from mmdpo_trainers.training.trainer import PreferenceTrainer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("model")


@pytest.fixture
def rows_of_mlps(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of every call of an MLP's own forward."""
    seen: list[int] = []
    forward = LlamaMLP.forward

    def counted(self: LlamaMLP, x: Tensor) -> Tensor:
        seen.append(x.shape[:-1].numel())
        return forward(self, x)

    monkeypatch.setattr(LlamaMLP, "forward", counted)
    yield seen


def step(folder: Path, output: Path, rows: list[int], **options: Any) -> tuple[float, dict[str, Tensor], list[int]]:
    """Loss and gradients of one step in float64, and of that step alone what `rows` counts."""
    loaded, gradients = tiny(folder), Gradients()
    trainer = PreferenceTrainer(
        loaded.model,
        config(output, gradient_checkpointing=True, **options),
        processing_class=loaded.processor,
        train_dataset=preference_records(4),
        callbacks=[gradients],
    )
    warm_adapter(trainer)
    rows.clear()
    trainer.train()
    return trainer.state.log_history[0]["loss"], gradients.steps[0], list(rows)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "options",
    [{}, {"full_finetune": True, "freeze_vision": False}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}],
    ids=["adapter", "weights", "accumulated"],
)
def test_a_step_is_the_same_and_no_mlp_runs_more_often(
    folder: Path, tmp_path: Path, rows_of_mlps: list[int], options: dict[str, Any]
) -> None:
    loss, expected, whole = step(folder, tmp_path, rows_of_mlps, mlp_chunk_rows=0, **options)
    found, gradients, chunks = step(folder, tmp_path, rows_of_mlps, mlp_chunk_rows=16, **options)
    assert max(chunks) <= 16 < max(whole) and sum(chunks) == sum(whole)
    assert found == pytest.approx(loss, rel=1e-9) and gradients.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-9, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}"
        )


def llama() -> LlamaModel:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    return LlamaModel(LlamaConfig(vocab_size=32, **sizes))


def with_decoder(model: nn.Module) -> Any:
    model.get_decoder = lambda: model
    return model


def settings(**changes: Any) -> Any:
    defaults = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": None, "mlp_chunk_rows": 8}
    return SimpleNamespace(**{**defaults, "torch_compile": False, "full_finetune": False, **changes})


@pytest.mark.parametrize("outer", [True, False], ids=["checkpointed layer", "plain layer"])
def test_noise_is_drawn_again_as_it_was(outer: bool) -> None:
    """A trainer refuses dropout; the chunks' backward has the noise of their forward all the same, and gradients add up over backwards."""
    torch.manual_seed(0)
    mlp, hidden = LlamaMLP(llama().config).double(), torch.randn(2, 9, 16, dtype=torch.double, requires_grad=True)
    drawn: list[Tensor] = []
    mlp.act_fn.register_forward_hook(lambda module, args, output: drawn.append(torch.rand_like(output)) or output * drawn[-1])
    mlp.forward = Chunked(mlp, 4)
    run: Callable[..., Any] = (lambda *args: checkpoint(*args, use_reentrant=False)) if outer else lambda f, x: f(x)
    output = run(lambda x: x + mlp(x.sin()), hidden)
    noise = torch.cat(drawn)
    for _ in range(2):
        output.square().sum().backward(retain_graph=True)
    found = [hidden.grad, *(parameter.grad for parameter in mlp.parameters())]

    again = hidden.detach().requires_grad_()
    x = again.sin().flatten(0, 1)
    inner = torch.nn.functional.silu(mlp.gate_proj(x)) * noise * mlp.up_proj(x)
    plain = again + mlp.down_proj(inner).view(2, 9, 16)
    expected = torch.autograd.grad(plain.square().sum() * 2, [again, *mlp.parameters()])
    torch.testing.assert_close(output, plain)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


def test_under_autocast() -> None:
    mlp, hidden = LlamaMLP(llama().config), torch.randn(1, 32, 16)
    found = []
    for forward in (Chunked(mlp, 8), mlp.forward):
        mine = hidden.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            output = checkpoint(lambda x, forward=forward: x + forward(x), mine, use_reentrant=False)
        output.square().sum().backward()
        found.append((output, mine.grad))
    torch.testing.assert_close(found[0], found[1], rtol=2e-2, atol=1e-3)


class Peak(TorchDispatchMode):
    """Most bytes that tensors made inside have held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, tuple[StorageWeakRef, int]] = {}
        self.bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in pytree.tree_leaves(found):
            if isinstance(tensor, Tensor):
                storage = StorageWeakRef(tensor.untyped_storage())
                self.held[storage.cdata] = storage, tensor.untyped_storage().nbytes()
        self.held = {name: each for name, each in self.held.items() if not each[0].expired()}
        self.bytes = max(self.bytes, sum(size for _, size in self.held.values()))
        return found


def test_peak_memory_falls() -> None:
    """Of one layer's recompute, whose MLP is much wider than the model."""

    def peak(rows: int) -> int:
        mlp = LlamaMLP(LlamaConfig(hidden_size=16, intermediate_size=512, num_attention_heads=2)).requires_grad_(False)
        mlp.forward = Chunked(mlp, rows)
        hidden = torch.randn(1, 512, 16, requires_grad=True)
        with Peak() as mode:
            checkpoint(lambda x: x + mlp(x.sin()), hidden, use_reentrant=False).sum().backward()
        return mode.bytes

    activations = 512 * 512 * 4
    whole, chunks = peak(512), peak(64)
    assert whole > 4 * activations and chunks < activations


def test_which_mlps() -> None:
    """Experts and 4-bit linears stay whole; a norm behind costs a forward, so it takes an explicit number; settings that do not fit; copies."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 32}
    gemma = with_decoder(Gemma2Model(Gemma2Config(num_hidden_layers=1, head_dim=8, **sizes)))
    assert chunk_mlps(gemma, settings(mlp_chunk_rows=None)) == 0 and chunk_mlps(gemma, settings()) == 1
    experts = Qwen3MoeConfig(moe_intermediate_size=8, num_experts=4, num_hidden_layers=2, mlp_only_layers=[0], **sizes)
    assert chunk_mlps(with_decoder(Qwen3MoeModel(experts)), settings()) == 1
    plain = with_decoder(llama())
    off: list[dict[str, Any]] = [
        {"gradient_checkpointing": False},
        {"mlp_chunk_rows": 0},
        {"gradient_checkpointing_kwargs": {"use_reentrant": True}},
        {"torch_compile": True},
        {"mlp_chunk_rows": None, "full_finetune": True},
    ]
    assert chunk_mlps(plain, settings(mlp_chunk_rows=None)) == 1
    assert [chunk_mlps(plain, settings(**each)) for each in off] == [0] * len(off) and "forward" not in vars(plain.layers[0].mlp)
    for options, count in (({}, 1), ({"use_dora": True}, 0)):
        adapted = get_peft_model(with_decoder(llama()), LoraConfig(r=2, target_modules=["down_proj"], **options))
        adapted.get_base_model().get_decoder = lambda adapted=adapted: adapted.base_model.model
        assert chunk_mlps(adapted, settings()) == count
    chunk_mlps(plain, settings())
    twin = copy.deepcopy(plain)
    assert twin.layers[0].mlp.forward.mlp is twin.layers[0].mlp
