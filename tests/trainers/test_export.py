"""`mmdpo export`: the names of weights, a model that old and new transformers read alike, its card, and what is refused or undone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exported_run import make_adapter, make_run
from hub_double import Hub
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors import safe_open
from tiny_models import TINY, sample_pictures
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.errors import MmdpoError
from mmdpo_trainers.models import published
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.report.intervals import paired_change
from mmdpo_trainers.run.export import hub, verify, write
from mmdpo_trainers.run.export.scrub import scrubbed

ROOT = Path(__file__).resolve().parents[2]
OLDEST = ROOT / "build" / "transformers-oldest"
TOWER = "vision_tower.vision_model."

_GREEDY = """
import json, sys
import transformers
from transformers import AutoProcessor, LlavaForConditionalGeneration
from PIL import Image
folder, picture = sys.argv[1:]
model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
inputs = AutoProcessor.from_pretrained(folder)(text="USER: <image>\\nwhat colour ? ASSISTANT:", images=Image.open(picture), return_tensors="pt")
ids = model.generate(**inputs, max_new_tokens=12, do_sample=False, eos_token_id=None)[0].tolist()
print(json.dumps({"version": transformers.__version__, "ids": ids, "info": {k: sorted(map(str, v)) for k, v in info.items()}}))
"""


@pytest.fixture(scope="module")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("runs") / "tiny", base)


@pytest.fixture(scope="module")
def exported(base: Path, adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "model"
    assert cli.main(["export", str(adapter), str(out), "--base", str(base), "--max-shard-size", "100KB"]) == 0
    return out


def names(folder: Path) -> set[str]:
    found: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            found |= set(weights.keys())
    return found


@pytest.mark.smoke
def test_names_are_those_of_published_checkpoints(base: Path, exported: Path, tmp_path: Path) -> None:
    """With the wrapper of CLIP's tower, from names with it or without it; in shards, which vLLM finds by their index."""
    assert not any(name.startswith(TOWER) for name in names(base))
    wrapped = {name.replace("vision_tower.", TOWER) for name in names(base)}
    assert names(exported) == wrapped
    shards = json.loads((exported / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(shards) == wrapped and len(set(shards.values())) > 1
    again = load_model(exported, device="cpu")
    published.write_weights(again.model, tmp_path / "again")
    assert names(tmp_path / "again") == wrapped
    # Nothing of it stays with the model.
    again.model.save_pretrained(tmp_path / "own")
    assert names(tmp_path / "own") == wrapped


def test_experts_have_the_shapes_of_published_checkpoints(tmp_path: Path) -> None:
    """transformers turns them by their shape when it reads, and writes them turned; vLLM knows the published ones only."""
    model = load_model(TINY["qwen3_vl_moe"](tmp_path / "own", width=48), device="cpu").model
    published.write_weights(model, tmp_path / "published")
    shapes = expert_shapes(tmp_path / "published")
    assert shapes == {"down_proj": [4, 48, 32], "gate_up_proj": [4, 32, 96]}
    again = load_model(tmp_path / "published", processor=tmp_path / "own", device="cpu").model
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    published.write_weights(again, tmp_path / "again")
    assert expert_shapes(tmp_path / "again") == shapes
    # Nothing of it stays with the model.
    again.save_pretrained(tmp_path / "transformers")
    assert expert_shapes(tmp_path / "transformers") == expert_shapes(tmp_path / "own")
    # Square ones are read as they are.
    square = load_model(TINY["qwen3_vl_moe"](tmp_path / "square"), device="cpu").model
    published.write_weights(square, tmp_path / "square-published")
    again = load_model(tmp_path / "square-published", processor=tmp_path / "square", device="cpu").model
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in square.state_dict().items())


def expert_shapes(folder: Path) -> dict[str, list[int]]:
    with safe_open(folder / "model.safetensors", "pt") as weights:
        return {
            name.rpartition(".")[2]: weights.get_slice(name).get_shape()
            for name in weights.keys()  # noqa: SIM118
            if "layers.1.mlp.experts" in name
        }


def test_weights_are_the_base_with_the_adapter(base: Path, adapter: Path, exported: Path) -> None:
    """Every weight W + scaling B A, where there is an adapter, and the base's own anywhere else."""
    whole = LlavaForConditionalGeneration.from_pretrained(base)
    expected = PeftModel.from_pretrained(whole, adapter).merge_and_unload().state_dict()
    found, info = LlavaForConditionalGeneration.from_pretrained(exported, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    unchanged = LlavaForConditionalGeneration.from_pretrained(base).state_dict()
    changed = [name for name, value in found.state_dict().items() if not torch.equal(value, unchanged[name])]
    assert all(torch.equal(value, expected[name]) for name, value in found.state_dict().items())
    assert changed and all("language_model" in name and "_proj" in name for name in changed)


def test_processor_and_settings_are_the_bases_own(base: Path, exported: Path) -> None:
    for name in ("tokenizer.json", "processor_config.json", "chat_template.jinja", "generation_config.json", "LICENSE"):
        assert (exported / name).read_bytes() == (base / name).read_bytes()
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, exported))
    assert after == before


def test_older_transformers_reads_it_alike(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The oldest that is supported, where `make test` has put it: no weight missing or left over, and the same greedy tokens."""
    if not OLDEST.is_dir():
        pytest.skip("make test puts the oldest transformers into build/transformers-oldest")
    sample_pictures(1)[0].save(tmp_path / "picture.png")
    arguments = [str(exported), str(tmp_path / "picture.png")]
    monkeypatch.setattr(sys, "argv", ["-c", *arguments])
    exec(_GREEDY, {})  # noqa: S102 - the same lines here and there
    here = capsys.readouterr().out
    environment = {**os.environ, "PYTHONPATH": str(OLDEST)}
    command = [sys.executable, "-W", "ignore", "-c", _GREEDY, *arguments]
    there = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    found = [json.loads(text.splitlines()[-1]) for text in (here, there)]
    new, old = found
    assert old["version"] != new["version"] or str(OLDEST) in sys.path
    assert len(new["ids"]) > 12
    assert new["ids"] == old["ids"]
    for each in found:
        assert not any(values for key, values in each["info"].items() if key.endswith("_keys")), each["info"]


@pytest.mark.nightly
@pytest.mark.parametrize("family", TINY)
def test_every_family_is_written_and_read_back(family: str, tmp_path: Path) -> None:
    base = TINY[family](tmp_path / "base")
    adapter = make_adapter(base, tmp_path / "adapter")
    assert cli.main(["export", str(adapter), str(tmp_path / "out"), "--base", str(base)]) == 0


def test_a_run_has_a_card(run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "my-model"
    assert cli.main(["export", str(run), str(out), "--dtype", "bfloat16", "--base-name", "me/tiny-llava"]) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "weights bit for bit as merged" in said and "2 answers to the run's own evaluation prompts" in said
    config = json.loads((out / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert AutoModelForImageTextToText.from_pretrained(out).dtype == torch.bfloat16
    card = ModelCard.load(out / "README.md")
    head = card.data.to_dict()
    assert head["base_model"] == "me/tiny-llava" and head["library_name"] == "transformers" and "mia-dpo" in head["tags"]
    assert head["license"] == "llama2" and head["license_link"] == "https://example.org/licence"
    # Those of the two questions with two pictures.
    change = paired_change({"q1": False, "q3": False}, {"q1": True, "q3": False})
    assert change is not None
    for sentence in (
        "decoder layer 1, counted from 0",
        "Sequence: 30 pairs; the ratio had to stay under: 2 pictures 0.70",
        f"| Sequence | 4 | 0.250 (0.150 to 0.350) | 0.750 (0.650 to 0.850) | +0.500 ({change.low:+.3f} to {change.high:+.3f}) |",
        "source data: my_data.json",
        "beta: 0.2",
        "Licence of the base: llama2",
        "mmdpo export tiny my-model",
        "the folder has changed since",
        "weights bit for bit as merged",
    ):
        assert sentence in card.text, f"{sentence}\n{card.text}"
    text = "".join(path.read_text() for path in out.iterdir() if path.suffix != ".safetensors")
    assert str(tmp_path.parent) not in text and "secret" not in text and "10.1.2.3" not in text
    assert "my_data.json" in (out / "mmdpo_run.yaml").read_text()


def test_an_arm_and_its_own_use_of_attention(run: Path, tmp_path: Path) -> None:
    assert cli.main(["export", str(run), str(tmp_path / "arm"), "--arm", "chance", "--no-verify"]) == 0
    card = (tmp_path / "arm" / "README.md").read_text()
    assert (
        "Attention was not used to choose the preference pairs of this model: they are those of the rule `random_wrong`" in card
    )
    assert "control arm `chance`" in card and "--arm chance" in card and "not compared with base and adapter" in card
    main, arm = (load_model(folder, device="cpu").model.state_dict() for folder in (run_export(run, tmp_path), tmp_path / "arm"))
    differ = {name for name in main if not torch.equal(main[name], arm[name])}
    assert differ and all(".layers.1." in name or ".layers.2." in name for name in differ)


def run_export(run: Path, folder: Path) -> Path:
    assert cli.main(["export", str(run), str(folder / "main"), "--no-verify"]) == 0
    return folder / "main"


def test_the_adapter_alone(run: Path, base: Path, tmp_path: Path) -> None:
    out = tmp_path / "adapter"
    assert cli.main(["export", str(run), str(out), "--adapter-only", "--base-name", "me/tiny-llava"]) == 0
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "me/tiny-llava"
    assert not (out / "config.json").exists() and (out / "chat_template.jinja").is_file()
    head = ModelCard.load(out / "README.md").data.to_dict()
    assert head["library_name"] == "peft" and head["base_model_relation"] == "adapter"
    assert PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base), out)


def test_a_whole_model_of_a_run(run: Path, base: Path, tmp_path: Path) -> None:
    """Trained without an adapter: its weights, with the names and files of its base."""
    whole = make_run(tmp_path / "whole", base)
    final = whole / "train" / "final"
    for file in final.iterdir():
        file.unlink()
    loaded = load_model(base, device="cpu")
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(0.5)
    loaded.model.save_pretrained(final)
    assert cli.main(["export", str(whole), str(tmp_path / "out")]) == 0
    assert any(name.startswith(TOWER) for name in names(tmp_path / "out"))
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path / "out")
    assert torch.equal(again.lm_head.weight, loaded.model.lm_head.weight)
    assert (tmp_path / "out" / "tokenizer.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (lambda run, base, adapter, tmp: [adapter, tmp / "new"], "--base: expected the folder of the model that the adapter"),
        (lambda run, base, adapter, tmp: [adapter, base, "--base", base], "holds something already"),
        (lambda run, base, adapter, tmp: [adapter, tmp / "new", "--base", base, "--arm", "sft"], "is no run folder"),
        (lambda run, base, adapter, tmp: [run, tmp / "new", "--arm", "none"], "there is no arm 'none'"),
        (lambda run, base, adapter, tmp: [run, tmp / "new", "--dtype", "int8"], "dtype 'int8': expected auto"),
        (lambda run, base, adapter, tmp: [base, tmp / "new", "--adapter-only"], "--adapter-only: .* is a whole model"),
        (lambda run, base, adapter, tmp: [tmp / "none", tmp / "new"], "no such folder; expected a run folder"),
    ],
)
def test_refused_before_any_work(
    run: Path,
    base: Path,
    adapter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: Callable[..., list[Any]],
    message: str,
) -> None:
    # The machine that the adapter was trained on had its base elsewhere.
    moved = tmp_path / "moved"
    moved.mkdir()
    for file in adapter.iterdir():
        text = file.read_bytes()
        (moved / file.name).write_bytes(text.replace(str(base).encode(), b"/gone") if file.suffix == ".json" else text)
    monkeypatch.setattr(write, "load_model", None)
    assert cli.main(["export", *map(str, arguments(run, base, moved, tmp_path))]) == 2
    assert_error(capsys, message)
    assert not (tmp_path / "new").exists()


def assert_error(capsys: pytest.CaptureFixture[str], message: str) -> None:
    import re

    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mmdpo: error:")]
    assert len(lines) == 1 and re.search(message, lines[0]), lines


def test_a_full_disk_and_an_untrained_run(
    run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(write, "free_mib", lambda path: 0)
    assert cli.main(["export", str(run), str(tmp_path / "new")]) == 2
    assert_error(capsys, r"takes about 0 MiB, and 0 MiB are free")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(f"model: {base}\n")
    assert cli.main(["export", str(tmp_path / "run"), str(tmp_path / "new")]) == 2
    assert_error(capsys, "stage train of .* is not done")


def _another_weight(model: Any, folder: Path, **options: Any) -> None:
    with torch.no_grad():
        model.lm_head.weight[3, 3] += 0.01
    published.write_weights(model, folder, **options)


def _another_name(model: Any, folder: Path, **options: Any) -> None:
    state = {name.replace("multi_modal_projector", "projector"): value for name, value in model.state_dict().items()}
    model.save_pretrained(folder, state_dict=state)


def _no_merge(loaded: Any, model: Any) -> Any:
    model.unload()
    return loaded


def _killed(model: Any, folder: Path, **options: Any) -> None:
    published.write_weights(model, folder, **options)
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("name", "fault", "code", "message"),
    [
        ("write_weights", _another_weight, 2, "reads other weights than were written"),
        ("write_weights", _another_name, 2, r"missing keys, such as .*multi_modal_projector"),
        ("merge", _no_merge, 2, r"_proj: merged, its output is off by"),
        ("write_weights", _killed, 130, ""),
    ],
)
def test_what_went_wrong_leaves_nothing(
    adapter: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
    fault: Callable[..., Any],
    code: int,
    message: str,
) -> None:
    monkeypatch.setattr(write, name, fault)
    assert cli.main(["export", str(adapter), str(tmp_path / "out"), "--base", str(base)]) == code
    if message:
        assert_error(capsys, message)
    assert list(tmp_path.iterdir()) == []


def test_what_an_earlier_kill_left_goes(adapter: Path, base: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.exporting"
    left.mkdir()
    (left / "model.safetensors").write_bytes(b"half")
    assert cli.main(["export", str(adapter), str(tmp_path / "out"), "--base", str(base), "--no-verify"]) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert load_model(tmp_path / "out", device="cpu")


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> type[Hub]:
    return Hub.put_in(monkeypatch)


def test_uploaded_to_the_hub(run: Path, tmp_path: Path, stub: type[Hub], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["export", str(run), str(tmp_path / "out"), "--push-to-hub", "me/tiny", "--private", "--no-verify"]
    assert cli.main(arguments) == 0
    assert [name for name, _ in stub.asked] == ["whoami", "create_repo", "upload_folder"]
    assert stub.asked[1][1] == ("me/tiny", {"private": True, "exist_ok": True})
    assert {"README.md", "model.safetensors", "config.json"} <= set(stub.asked[2][1][1])
    captured = capsys.readouterr()
    assert "uploaded to https://example.org/me/tiny" in captured.err
    text = captured.out + captured.err + "".join(path.read_text(errors="replace") for path in (tmp_path / "out").iterdir())
    assert "hf_notforanyone" not in text


@pytest.mark.parametrize(
    ("id", "refused", "message"),
    [
        ("not/a/name", None, "--push-to-hub not/a/name: expected a name such as me/my-model"),
        ("me/tiny", ConnectionError("no route to host"), "the Hub cannot be reached .no route to host.*upload the folder later"),
        ("me/tiny", "offline", "HF_HUB_OFFLINE is set, so nothing can be uploaded"),
        ("me/tiny", "nobody", "nobody is logged in; run `hf auth login`, or set HF_TOKEN"),
    ],
)
def test_without_the_hub_nothing_begins(
    run: Path,
    tmp_path: Path,
    stub: type[Hub],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    id: str,
    refused: Any,
    message: str,
) -> None:
    from huggingface_hub.errors import LocalTokenNotFoundError, OfflineModeIsEnabled

    named = {"offline": OfflineModeIsEnabled("offline"), "nobody": LocalTokenNotFoundError("no token")}
    monkeypatch.setattr(stub, "refused", named.get(refused, refused) if isinstance(refused, str) else refused)
    monkeypatch.setattr(write, "load_model", None)
    assert cli.main(["export", str(run), str(tmp_path / "out"), "--push-to-hub", id]) == 2
    assert_error(capsys, message)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_upload_keeps_the_export(run: Path, tmp_path: Path, stub: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Hub, **options: Any) -> None:
        raise ConnectionError("it broke off")

    monkeypatch.setattr(stub, "upload_folder", refuse)
    with pytest.raises(MmdpoError, match="is whole, but could not be uploaded to me/tiny.*it broke off.*hf upload me/tiny"):
        hub.upload(tmp_path, "me/tiny")


def test_paths_and_addresses_are_taken_out() -> None:
    given = {
        "a": "/home/me/data.json",
        "b": ["~/x/y", "plain", "org/name"],
        "c": {"url": "http://host:1/v1"},
        "d": 3,
        "e": "C:\\me\\z",
    }
    assert scrubbed(given) == {
        "a": "data.json",
        "b": ["y", "plain", "org/name"],
        "c": {"url": "(an address)"},
        "d": 3,
        "e": "z",
    }


def test_a_tie_is_no_fault_and_another_token_is() -> None:
    """Where two tokens are as likely as each other up to rounding, either may be taken."""
    logits = torch.tensor([[4.0, 4.0 + 1e-6, 0.0], [0.0, 1.0, 2.0]])
    one = verify.Answer(torch.tensor([1, 2]), logits)
    differences = verify.Differences(torch.float32)
    assert verify._compare("p", one, one, differences)
    assert not verify._compare("p", one, verify.Answer(torch.tensor([0, 1]), logits.roll(1, 1).roll(-1, 1)), differences)
    with pytest.raises(verify.CheckFailure, match="prompt p, token 0: another greedy token"):
        verify._compare("p", one, verify.Answer(torch.tensor([2, 1]), logits), differences)
