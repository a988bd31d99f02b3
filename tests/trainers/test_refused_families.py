"""Every family that transformers knows is declared, checked by convention, or refused with the reason; and code from a hub is not run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import TINY
from tiny_models.recipes import BY_RECIPE, RECIPES
from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.utils import is_torchvision_available

from mmdpo_kernels import tree_refusal
from mmdpo_kernels.patched import language_tower
from mmdpo_trainers.checks import run_checks
from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.errors import StageError
from mmdpo_trainers.models.families import CHECKED, FAMILIES, REFUSED, Conventional, family_of, refusal_of
from mmdpo_trainers.models.loading import load_model

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

NO_TREES = {"lfm2_vl": "layers of conv", "lfm3_vl": "layers of conv"}
CHEAP = ("exaone4_5", "hyperclovax_vision_v2", "lfm3_vl", "qwen2_5_omni_thinker")
"""Checked in every run: windows, logits that are multiplied, convolutions, a processor for sound and video too."""


def folder_of(path: Path, **values: Any) -> Path:
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps(values))
    (path / "model.safetensors").write_bytes(b"")
    return path


def test_the_lists_do_not_overlap() -> None:
    assert not set(FAMILIES) & set(REFUSED) and not set(CHECKED) & set(REFUSED) and not set(CHECKED) & set(FAMILIES)
    assert {name for name in BY_RECIPE if name not in FAMILIES} == set(CHECKED)
    # Their towers and processors are timm's and torchvision's: masks and decoders are tested, whole checkpoints are not.
    assert set(FAMILIES) - {*TINY, *BY_RECIPE} == {"gemma3n", "gemma4_unified"}


@pytest.mark.parametrize("kind", sorted(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES))
def test_no_family_is_used_that_was_not_checked(kind: str) -> None:
    """A new one of transformers' fails here: it gets a recipe and a place in `CHECKED`, or a line in `REFUSED`."""
    if kind in FAMILIES or kind in CHECKED:
        return
    # Some have no configuration without those of their parts.
    missing = "has no declaration and does not follow|cannot be instantiated"
    with pytest.raises(ValueError, match="is refused: " if kind in REFUSED else missing):
        family_of(CONFIG_MAPPING[kind]())


@pytest.mark.parametrize("kind", sorted(REFUSED))
def test_a_refused_family_says_why(kind: str, tmp_path: Path) -> None:
    if kind not in CONFIG_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    with pytest.raises(StageError) as found:
        load_model(folder_of(tmp_path / "model", model_type=kind), device="cpu")
    assert f"family {kind!r} is refused: {REFUSED[kind]}" in str(found.value)


REMOTE = {
    "internlmxcomposer2": "the nearest family that is used is 'internvl'",
    "internvl_chat": "the nearest family that is used is 'internvl'",
    "a_new_one": "has no model_type 'a_new_one'",
}


@pytest.mark.parametrize("kind", sorted(REMOTE))
def test_code_from_a_hub_is_not_run(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = folder_of(tmp_path / "model", model_type=kind, auto_map={"AutoConfig": "configuration_own.OwnConfig"})
    (folder / "configuration_own.py").write_text("raise SystemExit('remote code was run')")
    assert cli.main(["check", "--model", str(folder)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert f"has no model_type '{kind}'; its code is on a hub (auto_map in config.json), which is not run" in said
    assert REMOTE[kind] in said


def test_a_family_that_nobody_checked_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = BY_RECIPE["vipllava"](tmp_path / "model")
    load_model(folder, device="cpu")
    assert not [record for record in caplog.records if record.name.startswith("mmdpo")]
    monkeypatch.setattr("mmdpo_trainers.models.families.conventional.CHECKED", ())
    load_model(folder, device="cpu")
    (said,) = [record.getMessage() for record in caplog.records if record.name.startswith("mmdpo")]
    assert "family 'vipllava' is used by transformers' conventions and was never checked" in said and "mmdpo check" in said


@pytest.mark.parametrize(
    "name", [name if name in CHEAP else pytest.param(name, marks=pytest.mark.nightly) for name in BY_RECIPE if name not in TINY]
)
def test_families_by_recipe_are_exact(name: str, tmp_path: Path) -> None:
    refusal = refusal_of({"model_type": name})
    if refusal is not None:
        pytest.skip(refusal)
    if RECIPES[name].needs_torchvision and not is_torchvision_available():
        pytest.skip("transformers has its image processor for torchvision only, which is not installed")
    loaded = load_model(BY_RECIPE[name](tmp_path / "model"), dtype=torch.float64, device="cpu")
    assert isinstance(loaded.family, Conventional) == (name not in FAMILIES)
    for found in run_checks(loaded):
        if found.name == "tree" and name in NO_TREES:
            assert found.verdict.startswith("refused: ") and NO_TREES[name] in found.verdict, found
        else:
            assert found.verdict == "exact", found


def test_what_layers_do_beside_attention_refuses_trees(tmp_path: Path) -> None:
    model = load_model(TINY["llava"](tmp_path / "model"), device="cpu").model
    tower, text = language_tower(model), language_tower(model).config
    assert tree_refusal(model) is None
    tower.layers[1].smoothing = torch.nn.Conv1d(32, 32, 3)
    assert tree_refusal(model) == "there are convolutions from row to row"
    text.attn_temperature_tuning = True
    assert tree_refusal(model) == "attention is scaled by a token's row, which a tree changes"
    text.use_bidirectional_attention = True
    assert tree_refusal(model) == "tokens see those that come after them"
