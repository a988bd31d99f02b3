"""Copies of patched models, in this process and in others, and models made from their configurations."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import _widen
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig

from mmdpo_kernels import TokenTree, patch_model, record_attention, tree_refusal, unpatch_model
from mmdpo_kernels.patch import patch_state

SMALL: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
}  # fmt: skip


def _through_torch(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.load": _through_torch,
}


def build(**options: Any) -> Any:
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SMALL), **options).eval()
    _widen(model)
    return model


@pytest.fixture
def model() -> Any:
    return build()


def padded() -> dict[str, Tensor]:
    ids = torch.randint(5, 50, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return {"input_ids": ids, "attention_mask": mask}


def packed() -> dict[str, Tensor]:
    tree = TokenTree.from_sequences([[5, 6, 7, 8], [5, 6, 9]], prompt_lengths=[2, 2])
    return {"input_ids": tree.input_ids[None], "attention_mask": tree.attention_mask, "position_ids": tree.position_ids[None]}


def record(model: Any) -> dict[int, Tensor]:
    inputs = padded()
    with record_attention(model, inputs["input_ids"] % 3, inputs["attention_mask"].bool(), layers=[1]) as recorder:
        model(**inputs)
    return recorder.mass


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_is_patched_like_its_original(model: Any, how: str) -> None:
    before = model.config._attn_implementation
    patch_model(model, backend="reference", mass_backend="reference")
    other = COPIES[how](model)
    mine, its = patch_state(model), patch_state(other)
    assert its is not mine and (its.backend, its.mass_backend, its.tree_refusal) == ("reference", "reference", None)
    for inputs in (padded(), packed()):
        assert torch.equal(other(**inputs).logits, model(**inputs).logits)
    # What happens to one does not happen to the other.
    patch_model(model, backend="sdpa")
    assert its.backend == "reference"
    want = record(model)
    torch.testing.assert_close(record(other), want)
    assert unpatch_model(model).config._attn_implementation == before
    assert patch_state(other) is its and record(other).keys() == want.keys()
    assert unpatch_model(other).config._attn_implementation == before
    for each in (model, other):
        assert not [name for module in each.modules() for name in vars(module) if "mmdpo" in name]


@pytest.mark.parametrize("how", COPIES)
def test_a_copy_refuses_what_its_original_refuses(how: str) -> None:
    """Layers of another kind, a backend that cannot serve the call, what the configuration had before."""
    config = LlamaConfig(**SMALL)
    config.layer_types = ["chunked_attention"] * 3
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    assert tree_refusal(model) is not None
    other = COPIES[how](patch_model(model))
    unpatch_model(model)
    with pytest.raises(ValueError, match="a packed token tree is not exact with this model: there are layers of chunked"):
        other(**packed(), use_cache=False)
    other(**padded(), use_cache=False)
    assert unpatch_model(other).config._attn_implementation == "eager"


def test_a_recorder_is_of_one_model(model: Any) -> None:
    """A copy made in a recording, stopped early or in `generate`, is a patched model that nothing watches."""
    patch_model(model)
    inputs = padded()
    segments = inputs["input_ids"] % 3
    for rows in (segments >= 0, None):
        with record_attention(model, segments, rows, layers=[1], stop_early=True) as recorder:
            model(**inputs)
            seen = recorder.counts[1].clone()
            copies = [make(model) for make in COPIES.values()]
            for other in copies:
                assert patch_state(other).recorder is None
                assert other(**inputs).logits.shape == (2, 9, 50)
                other.generate(**inputs, max_new_tokens=2, do_sample=False)
            assert torch.equal(recorder.counts[1], seen)
        for other in copies:
            assert record(other).keys() == {1}
            unpatch_model(other)
            assert not {"forward", "generate"} & vars(other).keys()
            assert not other._forward_pre_hooks and not other.model._forward_pre_hooks
    assert not {"forward", "generate"} & vars(model).keys()


@pytest.mark.parametrize("make", [copy.deepcopy, copy.copy, lambda config: config, lambda c: pickle.loads(pickle.dumps(c))])
def test_a_model_made_from_a_patched_models_configuration(model: Any, make: Callable[[Any], Any]) -> None:
    """It is not patched: it runs as transformers would, and refuses token trees by name."""
    inputs = padded()
    real = inputs["attention_mask"].bool()
    want = model(**inputs).logits[real].detach()
    patch_model(model)
    other = AutoModelForCausalLM.from_config(make(model.config)).eval()
    other.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="is not patched"):
        patch_state(other)
    if other.config._attn_implementation == "mmdpo_tree":
        with pytest.raises(ValueError, match="a packed token tree came to a model that is not patched.*patch_model"):
            other(**packed())
    torch.testing.assert_close(other(**inputs).logits[real], want)
    whole = {"input_ids": inputs["input_ids"]}
    torch.testing.assert_close(other(**whole).logits, model(**whole).logits)
    assert torch.equal(
        other.generate(**inputs, max_new_tokens=3, do_sample=False), model.generate(**inputs, max_new_tokens=3, do_sample=False)
    )
    assert torch.equal(patch_model(other)(**packed()).logits, model(**packed()).logits)
    unpatch_model(model)
    assert unpatch_model(other).config._attn_implementation == "sdpa"


_LOADS = """
import sys, torch
assert "mmdpo_kernels" not in sys.modules
found = torch.load({file!r}, weights_only=False)
got = found["model"](**found["inputs"]).logits
assert torch.equal(got, found["logits"])
assert torch.equal(found["model"](**found["tree"]).logits, found["tree_logits"])
"""
_PLAIN = """
import sys, torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r})
assert model.config._attn_implementation == "sdpa"
model(torch.ones(1, 4, dtype=torch.long))
assert "mmdpo_kernels" not in sys.modules
"""
_WITHOUT = "import sys, torch\nsys.modules['mmdpo_kernels'] = None\ntorch.load({file!r}, weights_only=False)"


def test_in_other_processes(model: Any, tmp_path: Path) -> None:
    """A pickled model brings its import, or names it; a saved one needs nothing."""
    patch_model(model, backend="reference").save_pretrained(tmp_path / "folder")
    assert "mmdpo" not in "".join(path.read_text() for path in (tmp_path / "folder").glob("*.json"))
    found = {"model": model, "inputs": padded(), "tree": packed()}
    with torch.no_grad():
        found |= {"logits": model(**found["inputs"]).logits, "tree_logits": model(**found["tree"]).logits}
    torch.save(found, tmp_path / "model.pt")
    places = {"file": str(tmp_path / "model.pt"), "folder": str(tmp_path / "folder")}
    scripts = [script.format(**places) for script in (_LOADS, _PLAIN, _WITHOUT)]
    loaded, plain, without = (subprocess.run([sys.executable, "-c", each], capture_output=True, text=True) for each in scripts)
    assert loaded.returncode == 0, loaded.stderr
    assert plain.returncode == 0, plain.stderr
    assert without.returncode != 0 and "ModuleNotFoundError" in without.stderr and "mmdpo_kernels" in without.stderr
