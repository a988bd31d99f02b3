"""Families without a declaration, and language models of other kinds inside a declared one: exact, or refused with what is missing."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from tiny_models import TINY, make_tiny_llava, make_tiny_llava_next, make_tiny_mistral3, make_tiny_qwen
from tiny_models.parts import random_model, save_model
from transformers import (
    AutoConfig,
    Gemma2Config,
    GptOssConfig,
    Lfm2Config,
    Llama4TextConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
    VipLlavaConfig,
    VipLlavaForConditionalGeneration,
)

from mmdpo_kernels import patch_model, tree_refusal
from mmdpo_trainers.checks import CHECKS, run_checks
from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.errors import StageError
from mmdpo_trainers.models.families import FAMILIES, Conventional, family_of
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.training import model_parts

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")


def load(folder: Path, dtype: torch.dtype = torch.float64) -> LoadedModel:
    return load_model(folder, dtype=dtype, device="cpu")


def assert_exact(loaded: LoadedModel, *checks: str, refused: str | None = None) -> None:
    """All of these checks are; trees are refused with this reason, where there is one, and templates may collect pictures."""
    for found in run_checks(loaded, checks or tuple(CHECKS)):
        if found.name == "tree" and refused is not None:
            assert found.verdict.startswith("refused: ") and refused in found.verdict, found
        elif found.name == "prompts" and found.verdict.startswith("refused: "):
            assert "does not keep pictures in their places between texts" in found.verdict, found
        else:
            assert found.verdict == "exact", found


def make_tiny_vipllava(folder: Path) -> Path:
    """VipLLaVA, which has no declaration: LLaVA with features of several vision layers side by side."""
    make_tiny_llava(folder)
    llava = AutoConfig.from_pretrained(folder)
    config = VipLlavaConfig(
        vision_config=llava.vision_config,
        text_config=llava.text_config,
        image_token_index=llava.image_token_id,
        vision_feature_layers=[-2, -1],
        image_seq_length=16,
        tie_word_embeddings=False,
    )
    text = llava.text_config
    special = {name: getattr(text, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    save_model(folder, random_model(VipLlavaForConditionalGeneration, config, 0), torch.float32, **special)
    return folder


def make_tiny_llava_on(folder: Path, text_class: type[PreTrainedConfig], **options: Any) -> Path:
    """LLaVA on another language model."""
    make_tiny_llava(folder)
    config = AutoConfig.from_pretrained(folder)
    old = config.text_config
    special = {name: getattr(old, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = {
        "vocab_size": old.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 4096,
    }
    config.text_config = text_class(**{**shape, "tie_word_embeddings": False, **special, **options})
    save_model(folder, random_model(LlavaForConditionalGeneration, config, 0), torch.float32, **special)
    return folder


def test_a_family_that_was_never_declared(tmp_path: Path) -> None:
    loaded = load(make_tiny_vipllava(tmp_path / "model"))
    assert isinstance(loaded.family, Conventional) and "vipllava" not in FAMILIES
    assert_exact(loaded)
    named = {id(parameter): name for name, parameter in loaded.model.named_parameters()}
    vision, projector = (
        {named[id(p)] for p in found(loaded.model)} for found in (model_parts.vision_parameters, model_parts.projector_parameters)
    )
    assert {name.split(".")[1] for name in vision} == {"vision_tower"}
    assert {name.split(".")[1] for name in projector} == {"multi_modal_projector"}


@pytest.mark.parametrize("name", ["llava_next", "internvl", "mistral3"])
def test_declared_families_would_do_without(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(FAMILIES, name)
    loaded = load(TINY[name](tmp_path / "model"))
    assert isinstance(loaded.family, Conventional)
    assert_exact(loaded, "parity", "segments", "mass", "tree", "generate", "shared vision")


MISSING = {
    "GlmOcrConfig": r"its positions follow pictures \(get_rope_index\)",
    "FuyuConfig": "its base model has no get_image_features",
}


@pytest.mark.parametrize("name", list(MISSING))
def test_what_a_family_has_not_is_named(name: str) -> None:
    config = getattr(transformers, name, None)
    if config is None:
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    with pytest.raises(ValueError, match=f"family '{config.model_type}' has no declaration .* {MISSING[name]}"):
        family_of(config())


def test_a_folder_of_such_a_family(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "glm_ocr"}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(StageError, match="get_rope_index.* families with a declaration: llava, "):
        load_model(tmp_path, device="cpu")
    assert cli.main(["check", "--model", str(tmp_path)]) == 2
    assert "its positions follow pictures (get_rope_index)" in capsys.readouterr().err


WINDOWED: dict[str, Callable[..., Path]] = {
    "qwen2_5_vl": make_tiny_qwen,
    "mistral3": make_tiny_mistral3,
    "llava_next": make_tiny_llava_next,
}


@pytest.mark.parametrize("name", list(WINDOWED))
def test_sliding_windows_count_along_a_path(name: str, tmp_path: Path) -> None:
    loaded = load(WINDOWED[name](tmp_path / "model", sliding_window=20))
    assert tree_refusal(loaded.model) is None
    assert_exact(loaded, "parity", "mass", "tree", "gradients", "generate")


def test_softcapped_attention_with_windows(tmp_path: Path) -> None:
    folder = make_tiny_llava_on(
        tmp_path / "model",
        Gemma2Config,
        query_pre_attn_scalar=8,
        sliding_window=12,
        attn_logit_softcapping=2.0,
        final_logit_softcapping=None,
    )
    # transformers' eager attention, Gemma2's own, makes NaN of padding in float64.
    assert_exact(load(folder, torch.float32))


def test_softcaps_of_logits_are_the_models_own(tmp_path: Path) -> None:
    """LLaVA's class makes none of what its text configuration says: Gemma2's own would."""
    options: dict[str, Any] = {"query_pre_attn_scalar": 8, "attn_logit_softcapping": None, "final_logit_softcapping": 3.0}
    assert_exact(load(make_tiny_llava_on(tmp_path / "model", Gemma2Config, **options), torch.float32), "heads", "tree")


def test_chunked_layers_have_no_trees(tmp_path: Path) -> None:
    options: dict[str, Any] = {
        "attention_chunk_size": 16,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 64,
        # Pictures reach the answers by the layer between.
        "layer_types": ["chunked_attention", "full_attention", "chunked_attention"],
    }
    loaded = load(make_tiny_llava_on(tmp_path / "model", Llama4TextConfig, **options))
    assert "chunked_attention" in loaded.model.config.text_config.layer_types
    assert_exact(loaded, "parity", "tree", refused="there are layers of chunked_attention")


def test_convolutions_have_no_trees(tmp_path: Path) -> None:
    kinds = ["conv", "full_attention", "conv"]
    loaded = load(make_tiny_llava_on(tmp_path / "model", Lfm2Config, layer_types=kinds, block_auto_adjust_ff_dim=False))
    assert_exact(loaded, "tree", "gradients", refused="there are layers of conv")


def test_attention_sinks_are_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"num_local_experts": 2, "num_experts_per_tok": 1}
    loaded = load(make_tiny_llava_on(tmp_path / "model", GptOssConfig, **options))
    with pytest.raises(ValueError, match="attention argument 's_aux' is not supported by a patched model"):
        patch_model(loaded.model)(input_ids=torch.tensor([[5, 6, 7]]))


@pytest.mark.parametrize("name", ["llava", "qwen3_vl", "mllama"])
def test_lora_on_the_head(name: str, tmp_path: Path) -> None:
    loaded = load(TINY[name](tmp_path / "model"))
    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["lm_head", "q_proj"], init_lora_weights=False)
    adapted = dataclasses.replace(loaded, model=get_peft_model(loaded.model, config).eval())
    assert_exact(adapted, "heads", "tree", refused="cross-attention" if name == "mllama" else None)
