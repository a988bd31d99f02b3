"""Every model family through every check of `mmdpo check`, on a tiny checkpoint in float64; and that the checks find what is broken."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_models import TINY, make_tiny_llava
from wide_kernels import widen_kernels

import mmdpo_kernels.patch
import mmdpo_kernels.recorder.plan
from benchmarks import measure
from benchmarks.runs import families as families_page
from mmdpo_trainers.checks import CHECKS, CheckResult, run_checks
from mmdpo_trainers.checks import segments as segment_checks
from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.models.families import FAMILIES as DECLARED
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.training import head
from mmdpo_trainers.training.batches import examples, views

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")

PICTURES_COLLECTED = ("llava", "llava_next", "llava_onevision")
TREES_REFUSED = {"mllama": "cross-attention layers"}
CARRYING = [name for name in TINY if name.startswith(("qwen3_5", "minicpmv4"))]
"""Layers carry a state, and transformers' kernels for these compute in float32: here they are widened, so that only rounding is left."""
if not hasattr(transformers.Cache, "get_conv_state"):
    TREES_REFUSED |= dict.fromkeys(CARRYING, "go by a cache's methods from transformers 5.22 on")


SMOKE = ("llava", "qwen2_5_vl")
FAMILIES = [pytest.param(name, marks=pytest.mark.smoke) if name in SMOKE else name for name in TINY]


@pytest.fixture(scope="module", params=FAMILIES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    _skip_unknown(request.param)
    folder = TINY[request.param](tmp_path_factory.mktemp(request.param) / "model")
    return load_model(folder, dtype=torch.float64, device="cpu")


def _skip_unknown(name: str) -> None:
    if name in DECLARED and not hasattr(transformers, DECLARED[name].model_name):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")


@pytest.fixture(scope="module", params=[name for name in TINY if name != "mllama"])
def tied(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    _skip_unknown(request.param)
    folder = TINY[request.param](tmp_path_factory.mktemp(request.param) / "model", tied=True)
    return load_model(folder, dtype=torch.float64, device="cpu")


def one(loaded: LoadedModel, check: str) -> CheckResult:
    (found,) = run_checks(loaded, [check])
    return found


@pytest.mark.parametrize("check", list(CHECKS))
def test_every_family_is_exact(
    loaded: LoadedModel, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    name = request.node.callspec.params["loaded"]
    if name in CARRYING:
        widen_kernels(monkeypatch, "qwen3_5_moe" if name == "qwen3_5_moe" else "qwen3_5")
    found = one(loaded, check)
    if check == "tree" and name in TREES_REFUSED:
        assert found.verdict.startswith("refused: ") and TREES_REFUSED[name] in found.verdict
    elif check == "prompts" and name in PICTURES_COLLECTED:
        assert "does not keep pictures in their places between texts" in found.verdict and "between)" in found.verdict, found
    else:
        assert found.verdict == "exact", found
    assert found.figure is not None and found.figure <= 1e-6
    assert check != "heads" or "untied" in found.detail


def test_tied_heads_are_exact(tied: LoadedModel, request: pytest.FixtureRequest) -> None:
    found = one(tied, "heads")
    assert found.verdict == "exact" and "untied" not in found.detail, found
    # The rest goes through the same code in every family.
    if request.node.callspec.params["tied"] in ("llava", "qwen3_vl"):
        for check in ("tree", "gradients"):
            assert one(tied, check).verdict == "exact"


@pytest.fixture
def llava(tmp_path: Path) -> LoadedModel:
    return load_model(make_tiny_llava(tmp_path / "llava"), device="cpu")


def test_checks_leave_the_model_as_it_was(llava: LoadedModel) -> None:
    model = llava.model
    trained = [parameter.requires_grad for parameter in model.parameters()]
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    assert [each.name for each in run_checks(llava)] == list(CHECKS)
    assert [parameter.requires_grad for parameter in model.parameters()] == trained
    assert all(parameter.grad is None for parameter in model.parameters())
    assert model.state_dict().keys() == weights.keys() and not model.training
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def _attention_off(patch: pytest.MonkeyPatch, model: Any) -> None:
    right = mmdpo_kernels.patch.tree_attention

    def wrong(*args: Any, **kwargs: Any) -> Any:
        found = right(*args, **kwargs)
        found.output.mul_(1.001)
        return found

    patch.setattr(mmdpo_kernels.patch, "tree_attention", wrong)


def _segments_off(patch: pytest.MonkeyPatch, model: Any) -> None:
    right = segment_checks.image_segments
    patch.setattr(segment_checks, "image_segments", lambda *args, **kwargs: right(*args, **kwargs).roll(1, 1))


def _mass_off(patch: pytest.MonkeyPatch, model: Any) -> None:
    mass = mmdpo_kernels.recorder.plan.PreparedMass
    right = mass.__call__
    patch.setattr(mass, "__call__", lambda *args: right(*args) + 1e-5)


def _positions_off(patch: pytest.MonkeyPatch, model: Any) -> None:
    right = examples.TokenSequence

    def wrong(**values: Any) -> Any:
        rows = values["feature_rows"].copy()
        rows[rows >= 0] = rows[rows >= 0][::-1]
        return right(**{**values, "feature_rows": rows})

    patch.setattr(examples, "TokenSequence", wrong)


def _checkpointing_off(patch: pytest.MonkeyPatch, model: Any) -> None:
    patch.setattr(type(model), "gradient_checkpointing_enable", lambda *args, **kwargs: None)


def _pictures_not_shared(patch: pytest.MonkeyPatch, model: Any) -> None:
    right, count = views.BatchImages.add, iter(range(1000))
    patch.setattr(
        views.BatchImages, "add", lambda self, record, image, digest, alone: right(self, record, image, f"{next(count)}", alone)
    )


def _head_off(patch: pytest.MonkeyPatch, model: Any) -> None:
    right = head.linear_logprobs
    patch.setattr(head, "linear_logprobs", lambda rows, *args, **kwargs: right(rows * 1.001, *args, **kwargs))


def _patch_left(patch: pytest.MonkeyPatch, model: Any) -> None:
    # What a careless patch would leave behind.
    right = mmdpo_kernels.patch.unpatch_model
    patch.setattr("mmdpo_trainers.checks.copies.unpatch_model", lambda m: setattr(right(m).model, "left_behind", 1))


FAULTS: list[tuple[str, Callable[[pytest.MonkeyPatch, Any], None], str]] = [
    ("parity", _attention_off, "of the scale, at most .* is rounding"),
    ("generate", _attention_off, "of the scale|token"),
    ("segments", _segments_off, "expected 16 tokens that change with it, got 16"),
    ("mass", _mass_off, "at most .* is rounding"),
    ("tree", _positions_off, "at most .* is rounding"),
    ("tree", _head_off, "at most .* is rounding"),
    ("gradients", _checkpointing_off, "checkpointing has no effect"),
    ("shared vision", _pictures_not_shared, "expected 8 pictures to be encoded for 21 that are shown, got 11"),
    ("heads", _head_off, "at most .* is rounding"),
    ("unpatch", _patch_left, "model is not as it was before patching"),
]


@pytest.mark.parametrize(
    ("check", "break_it", "message"), FAULTS, ids=[f"{name}-{each.__name__[1:]}" for name, each, _ in FAULTS]
)
def test_a_check_finds_what_is_broken(
    llava: LoadedModel,
    monkeypatch: pytest.MonkeyPatch,
    check: str,
    break_it: Callable[[pytest.MonkeyPatch, Any], None],
    message: str,
) -> None:
    assert not one(llava, check).failed
    break_it(monkeypatch, llava.model)
    found = one(llava, check)
    assert found.failed and re.search(message, found.verdict), found.verdict


def test_a_check_that_raises_is_a_failure(llava: LoadedModel) -> None:
    llava.model.config.image_token_id = 3
    assert one(llava, "segments").verdict.startswith("FAILED: ")


def test_the_command_prints_and_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(make_tiny_llava(tmp_path / "model"))
    assert cli.main(["check", "--model", folder, "--device", "cpu", "--only", "parity, heads", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["family"] == "llava" and found["declared"] and found["dtype"] == "float32"
    assert [(each["name"], each["verdict"]) for each in found["checks"]] == [("parity", "exact"), ("heads", "exact")]
    _head_off(monkeypatch, None)
    assert cli.main(["check", "--model", folder, "--device", "cpu", "--only", "heads"]) == 2
    printed = capsys.readouterr()
    assert "FAILED" in printed.out and "1 of 1 checks failed (heads)" in printed.err
    assert cli.main(["check", "--model", folder, "--only", "tree,bogus"]) == 2
    assert "expected names among prompts, parity" in capsys.readouterr().err


def test_the_table_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All families of a smaller world: one."""
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.setattr(measure, "RESULTS", tmp_path)
    monkeypatch.setattr(families_page, "ROWS", {"mllama": TINY["mllama"], "llava": TINY["llava"]})
    (tmp_path / "families.json").write_text(json.dumps({"families": {"llava": {"checks": [], "seconds": 1.0}}}))
    page = tmp_path / "docs" / "families.md"
    page.parent.mkdir()
    page.write_text("".join(f"<!-- {each}: begin -->\n<!-- {each}: end -->\n" for each in ("families", "family_states")))
    assert families_page.main(["--add", "mllama"]) == 0
    assert "| llava |" in page.read_text()
    (row,) = [line for line in page.read_text().splitlines() if line.startswith("| mllama |")]
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells[families_page.COLUMNS.index("tree")].startswith("refused")
    assert cells[families_page.COLUMNS.index("segments")] == "exact"
    assert "- mllama: tree refused: pictures come in by cross-attention" in page.read_text()
    assert len(json.loads((tmp_path / "families.json").read_text())["families"]["mllama"]["checks"]) == len(CHECKS)


def test_the_pages_table_has_every_family_and_no_failure() -> None:
    found = json.loads((measure.RESULTS / "families.json").read_text(encoding="utf-8"))
    assert list(found["families"]) == list(families_page.ROWS)
    for name, family in found["families"].items():
        assert [check["name"] for check in family["checks"]] == list(CHECKS), name
        assert not any(check["verdict"].startswith("FAILED") for check in family["checks"]), name
    page = (measure.ROOT / "docs" / "families.md").read_text(encoding="utf-8")
    assert families_page.text_of(found) in page, "run python -m benchmarks.runs.families"
    assert families_page.states() in page, "run python -m benchmarks.runs.families"
