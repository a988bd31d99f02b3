"""Two processes end as one does: DDP, DeepSpeed ZeRO-2 and ZeRO-3, FSDP2, as configs/accelerate sets them up, on the CPU."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env
from distributed import STRATEGIES, fill, launch, needs
from routing import MOE_FAMILIES
from tiny_models import TINY
from training_cases import preference_records

from mmdpo_kernels import patch_model
from mmdpo_trainers.config.shipped import CONFIGS
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.training import head, router_loss
from mmdpo_trainers.training.batches.collator import model_collator
from mmdpo_trainers.training.checkpoints import MARKER, defect

EVALUATED = {"eval_strategy": "steps", "eval_steps": 2}
SAVED = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 5}
FULL = {"full_finetune": True, "freeze_vision": False, "freeze_projector": False, **SAVED, **EVALUATED}
# With the head, whose adapter is gathered with it; a second reference, in shards where the policy is; batches of an odd number.
LORA = {"lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj", "lm_head"]}, "second": True}
# MPO: a reward shift that runs over steps, whatever processes and micro-batches their records are in.
MPO = {"loss_type": ["sigmoid", "bco_pair", "nll"], "loss_weights": [0.8, 0.2, 1.0], "bco_shift": "previous"}
PACKED = {**LORA, **SAVED, **MPO, "max_tokens_per_batch": 150, "accumulation": 2}
# The adapter off as the reference, run before the first step; checkpointed activations on the CPU, MLPs in chunks.
CACHED = {
    "precompute_ref_log_probs": True,
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "activation_offloading": True,
    "mlp_chunk_rows": 16,
    "attention_target": "log_share",
    "attention_target_weight": 0.3,
}
CASES = {
    "full": FULL,
    "packed": PACKED,
    "cached": CACHED,
    "full_again": {**FULL, "output": "full", "resume_after": 2},
    "packed_again": {**PACKED, "output": "packed", "resume_after": 2},
    "spoilt": {**SAVED, "spoilt": True, "logging_steps": 1},
    "still": {"loss_weights": [0.0, 0.0]},
}
# Smaller steps: at 1e-3 a random Qwen3.5 is so steep that one rounding of a weight after the first step moves the second one's gradient norm
# by 1e-5, where with the same weights it is the same to 1e-6.
_EXPERTS = {
    "learning_rate": 2e-4,
    "regions": False,
    "logging_steps": 1,
    "max_steps": 2,
    "accumulation": 2,
    "router_aux_loss_coef": 0.5,
    "attention_layer": None,
}
WITH_EXPERTS = {
    "full": {"full_finetune": True, **_EXPERTS},
    "attention": {"lora": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"]}, **_EXPERTS},
}
# A continued run has means over its own steps.
CLOCK = ("_runtime", "_per_second", "_time", "total_flos", "train_loss")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fill(tmp_path_factory.mktemp("distributed"))


@pytest.fixture(scope="module")
def alone(folder: Path) -> Path:
    launch("alone", folder, folder / "alone", {name: CASES[name] for name in ("full", "packed", "cached")})
    return folder / "alone"


def weights(output: Path) -> dict[str, torch.Tensor]:
    (file,) = (output / "final").glob("*.safetensors")
    return safetensors.torch.load_file(file)


def log(output: Path) -> list[dict[str, Any]]:
    entries = json.loads((output / "log.json").read_text())
    return [{name: value for name, value in entry.items() if not name.endswith(CLOCK)} for entry in entries]


def assert_same(found: Path, expected: Path) -> None:
    mine, theirs = weights(found), weights(expected)
    # ZeRO-3 leaves the frozen head out of an adapter, where others save it beside the head's own.
    assert mine.keys() == theirs.keys() or theirs.keys() - mine.keys() == {"base_model.model.lm_head.base_layer.weight"}
    for name, tensor in mine.items():
        torch.testing.assert_close(tensor, theirs[name], rtol=1e-5, atol=1e-6)
    for entry, other in zip(log(found), log(expected), strict=True):
        assert entry.keys() == other.keys()
        for name, value in entry.items():
            # Where processes have one micro-batch more than others, an epoch's share counts it.
            assert value == pytest.approx(other[name], abs=0.2 if name == "epoch" else 1e-5, rel=1e-5), name


@pytest.mark.parametrize(
    "strategy", ["zero3", *(pytest.param(each, marks=pytest.mark.nightly) for each in STRATEGIES if each != "zero3")]
)
def test_two_processes_train_one_reward_model(folder: Path, tmp_path: Path, strategy: str) -> None:
    """A head in shards too; the second process goes on after the second checkpoint with the first one's files."""
    needs(strategy)
    case = {"reward": True, "facts": ["caption"], "center_rewards_coefficient": 0.01, **SAVED, **EVALUATED}
    launch("alone", folder, tmp_path / "alone", {"reward": case})
    launch(strategy, folder, tmp_path / "two", {"reward": case, "again": {**case, "output": "reward", "resume_after": 2}})
    assert_same(tmp_path / "two" / "reward", tmp_path / "alone" / "reward")
    assert any("reward_head" in name for name in weights(tmp_path / "two" / "reward"))
    for path in (tmp_path / "two" / "reward" / "final", tmp_path / "two" / "reward" / "checkpoint-2"):
        assert json.loads((path / "reward_model.json").read_text())["facts"] == ["caption"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_end_as_one(folder: Path, alone: Path, strategy: str) -> None:
    needs(strategy)
    output = folder / strategy
    launch(strategy, folder, output, CASES)

    # What was continued after its second checkpoint is what is compared.
    for name in ("full", "packed", "cached"):
        assert_same(output / name, alone / name)
        assert (output / name / "final" / "processor_config.json").exists() or (
            output / name / "final" / "tokenizer.json"
        ).exists()
    # One line a record, whichever process ran it.
    lines, expected = (
        sorted((path / "cached" / "reference.jsonl").read_text().splitlines()[1:], key=str) for path in (output, alone)
    )
    assert [json.loads(line)["key"] for line in lines] == [json.loads(line)["key"] for line in expected] and len(lines) == 9
    for line, other in zip(lines, expected, strict=True):
        assert json.loads(line)["logps"] == pytest.approx(json.loads(other)["logps"], rel=1e-5)
    # Saved as any other model or adapter, and read by what reads these.
    load_model(output / "full" / "final", device="cpu")
    load_model(folder / "model", adapter=output / "packed" / "final", device="cpu")

    errors = [(output / "spoilt" / f"error-{rank}.txt").read_text() for rank in range(2)]
    assert errors[0] == errors[1]
    assert "step 2: the loss is not finite; record record-" in errors[0] and "loss inf (sigmoid" in errors[0]
    assert "checkpoint-1 is whole, and training continues from it" in errors[0]
    for rank in range(2):
        error = (output / "still" / f"error-{rank}.txt").read_text()
        assert error.startswith("step 1: all gradients are zero, so nothing would be trained; ")


@pytest.mark.parametrize("strategy", ["ddp", "zero2"])
def test_a_model_in_4_bits(folder: Path, tmp_path: Path, strategy: str) -> None:
    """Whole in each process; packed scales are no parameters. Weights in shards are refused (`test_quantized.py`)."""
    needs(strategy)
    case = {"in_4_bits": True, "precompute_ref_log_probs": True, "logging_steps": 1}
    for each in ("alone", strategy):
        launch(each, folder, tmp_path / each, {"lora": case})
    assert_same(tmp_path / strategy / "lora", tmp_path / "alone" / "lora")
    assert (tmp_path / strategy / "lora" / "final" / "quantization.json").is_file()


@pytest.mark.parametrize(
    ("family", "strategy"),
    [
        ("qwen3_vl", "zero3"),
        pytest.param("gemma4", "zero3", marks=pytest.mark.nightly),
        ("gemma4", "fsdp2"),
        pytest.param("llava_next", "zero3", marks=pytest.mark.nightly),
        pytest.param("mllama", "fsdp2", marks=pytest.mark.nightly),
    ],
)
def test_other_families(family: str, strategy: str, tmp_path: Path) -> None:
    """Features for several layers, layers that share keys and values and see ahead, a weight that no module of its own holds, layers that a
    batch without pictures leaves out."""
    needs(strategy)
    for name, seed in (("model", 0), ("second", 3)):
        TINY[family](tmp_path / name, seed=seed)
    plain = {"regions": False, "logging_steps": 1}
    # PEFT has no adapter for the linears of Gemma 4's vision tower.
    own = {"lora": {**LORA["lora"], "target_modules": r".*language_model.*\.(q_proj|down_proj)"}} if family == "gemma4" else {}  # type: ignore[dict-item]
    cases = {"full": {**FULL, **plain, "save_strategy": "no"}, "lora": {**LORA, **own, **plain}}
    for each in ("alone", strategy):
        launch(each, tmp_path, tmp_path / each, cases)
    for name in cases:
        assert_same(tmp_path / strategy / name, tmp_path / "alone" / name)


@pytest.fixture(scope="module", params=MOE_FAMILIES)
def experts(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp(request.param)
    for name, seed in (("model", 0), ("second", 3)):
        TINY[request.param](folder / name, seed=seed, experts=16)
    launch("alone", folder, folder / "alone", WITH_EXPERTS)
    return folder


def test_micro_batches_leave_experts_without_tokens(experts: Path) -> None:
    """Others in the first than in the second, which two processes have at the same time."""
    loaded = load_model(experts / "model", device="cpu")
    idle = []
    for record in preference_records(2):
        batch = model_collator(loaded.model, loaded.processor)([{**record, "region": None, "patch_grid": None}])["batch"]
        taken: list[set[int]] = []
        hooks = [
            module.register_forward_hook(lambda _, args, output, taken=taken: taken.append(set(output[-1].flatten().tolist())))
            for module, _ in router_loss.routers(loaded.model)
        ]
        with torch.no_grad():
            head.batch_logps(patch_model(loaded.model), batch)
        for hook in hooks:
            hook.remove()
        every = set(range(loaded.model.config.get_text_config().num_experts))
        idle.append([every - each for each in taken])
    assert any(map(any, idle)) and idle[0] != idle[1]


@pytest.mark.parametrize("strategy", ["zero3", "fsdp2"])
def test_experts_in_two_processes(experts: Path, strategy: str) -> None:
    needs(strategy)
    launch(strategy, experts, experts / strategy, WITH_EXPERTS)
    for name in WITH_EXPERTS:
        assert_same(experts / strategy / name, experts / "alone" / name)
        assert all(entry["aux_loss"] > 0 for entry in log(experts / strategy / name) if "loss" in entry)


@pytest.mark.skipif(not hasattr(transformers.Cache, "get_conv_state"), reason="transformers before 5.22: trees are refused")
@pytest.mark.parametrize("strategy", ["zero3", pytest.param("fsdp2", marks=pytest.mark.nightly)])
def test_layers_that_run_once_a_batch_of_nodes(strategy: str, tmp_path: Path) -> None:
    """mDPO's trees of two processes have nodes on other levels: each runs its layers as often as its own tree asks for."""
    needs(strategy)
    for name, seed in (("model", 0), ("second", 3)):
        TINY["qwen3_5"](tmp_path / name, seed=seed)
    mdpo = {"loss_type": ["sigmoid", "copo", "ancpo"], "loss_weights": [1.0, 1.0, 1.0]}
    shared = {"regions": False, "attention_layer": 3, "learning_rate": 2e-4, **mdpo}
    lora = {"r": 4, "lora_alpha": 8, "target_modules": ["in_proj_qkv", "in_proj_a", "out_proj", "q_proj"]}
    cases = {"full": {"full_finetune": True, **shared}, "lora": {"lora": lora, "second": True, **shared}}
    for each in ("alone", strategy):
        launch(each, tmp_path, tmp_path / each, cases)
    for name in cases:
        assert_same(tmp_path / strategy / name, tmp_path / "alone" / name)


def test_a_killed_process_ends_the_step_and_training_continues(folder: Path, alone: Path) -> None:
    output = folder / "killed"
    codes = launch("fsdp2", folder, output, {"full": {**FULL, "kill": 1}}, check=False)
    assert all(code != 0 for code in codes)
    assert [path.name for path in (output / "full").glob("checkpoint-*") if defect(path) is None] == ["checkpoint-1"]
    # What a kill during a save leaves.
    half = shutil.copytree(output / "full" / "checkpoint-1", output / "full" / "checkpoint-2")
    (half / MARKER).unlink()

    launch("fsdp2", folder, output, {"full": FULL})
    assert_same(output / "full", alone / "full")


@pytest.mark.parametrize("strategy", ["zero2", "zero3"])
def test_every_machine_starts_its_own_processes(strategy: str) -> None:
    """As accelerate does without being told, it would start a DeepSpeed runner on each that wants to reach the others by pdsh."""
    needs(strategy)
    options = "--num_machines 2 --machine_rank 1 --num_processes 16 --main_process_ip first --main_process_port 29500 script.py"
    file = CONFIGS / "accelerate" / f"{strategy}.yaml"
    known = launch_command_parser().parse_args(["--config_file", str(file), *options.split()])
    arguments, defaults, _ = _validate_launch_command(known)
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
    command, environment = prepare_deepspeed_cmd_env(arguments)
    assert command is None and environment["ACCELERATE_USE_DEEPSPEED"] == "true"


def test_an_evaluation_has_every_record_whatever_training_drops(folder: Path) -> None:
    """One process would otherwise drop its last smaller batch, and several would not."""
    case = {"eval_strategy": "epoch", "dataloader_drop_last": True}
    for name in ("alone", "ddp"):
        launch(name, folder, folder / name / "dropping", {"dropping": case})
    assert_same(folder / "ddp" / "dropping" / "dropping", folder / "alone" / "dropping" / "dropping")
