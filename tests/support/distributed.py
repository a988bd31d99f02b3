"""Trainings in two processes on the CPU, with the environment that `accelerate launch` gives them for one of configs/accelerate."""

from __future__ import annotations

import functools
import gc
import importlib
import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from online_cases import online as online_pairs
from peft import LoraConfig
from processes import end_of, free_port, start
from training_cases import config, preference_records, tiny
from transformers import TrainerCallback

from mmdpo_trainers.config.sections.quantization import QuantizationConfig
from mmdpo_trainers.config.shipped import CONFIGS
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.models.whole_weights import whole_weights
from mmdpo_trainers.training.reward.config import RewardConfig
from mmdpo_trainers.training.reward.trainer import RewardTrainer
from mmdpo_trainers.training.stopping import NoGradientError, NonFiniteLossError
from mmdpo_trainers.training.trainer import PreferenceTrainer

STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2")


def needs(strategy: str) -> None:
    """Skip a test of DeepSpeed where it is not installed."""
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


def launch(strategy: str, folder: Path, output: Path, cases: dict[str, dict[str, Any]], *, check: bool = True) -> list[int]:
    """Train the cases one after the other in two processes ("alone": in one), and return their exit codes.

    As with a launcher, a process that fails ends the others. folder: holds `model` and `second`. check: they must end well.
    """
    world = 1 if strategy == "alone" else 2
    shared = {**_environment(strategy, world), "STRATEGY": strategy, "MASTER_ADDR": "127.0.0.1"}
    output.mkdir(parents=True, exist_ok=True)
    with free_port() as port:
        started = []
        for rank in range(world):
            own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world} if world > 1 else {}
            environment = {**shared, "MASTER_PORT": str(port), **{name: str(value) for name, value in own.items()}}
            started.append(start(_process, strategy, folder, output, cases, environment=environment))
        codes = end_of(started)
    assert not check or not any(codes), codes
    return codes


def _process(strategy: str, folder: Path, output: Path, cases: dict[str, dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    if strategy not in ("alone", "ddp"):
        pretend_accelerators(strategy)
    for name, case in cases.items():
        train(folder, output / name, case)
        gc.collect()
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    # Without the end of process groups, for which some of these libraries wait.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def pretend_accelerators(strategy: str) -> None:
    """accelerate shards on accelerators only; here the CPU stands for one."""
    from accelerate.state import DistributedType, PartialState

    if strategy.startswith("zero"):
        # It would compile one of its kernels for the CPU.
        importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
    PartialState._prepare_backend = lambda *args, **kwargs: ("gloo", DistributedType.MULTI_GPU)  # type: ignore[method-assign]


def _environment(strategy: str, world: int) -> dict[str, str]:
    shared = {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}
    if strategy == "alone":
        return shared
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    file = CONFIGS / "accelerate" / f"{strategy}.yaml"
    known = ["--config_file", str(file), "--num_processes", str(world), "script.py"]
    arguments, defaults, has_precision = _validate_launch_command(launch_command_parser().parse_args(known))
    arguments.deepspeed_fields_from_accelerate_config = ",".join(
        [*defaults.deepspeed_config, *["mixed_precision"] * has_precision]
    )
    found = prepare_deepspeed_cmd_env(arguments)[1] if strategy.startswith("zero") else prepare_multi_gpu_env(arguments)
    if strategy.startswith("zero"):
        settings = json.loads(file.with_suffix(".json").read_text())
        # Weights as small as these would stay whole.
        settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 0} if strategy == "zero3" else {}
        changed = Path(tempfile.mkdtemp()) / f"{strategy}.json"
        changed.write_text(json.dumps(settings))
        found["ACCELERATE_DEEPSPEED_CONFIG_FILE"] = str(changed)
    kind = {"ACCELERATE_USE_CPU": "true"} if strategy == "ddp" else {"ACCELERATE_TORCH_DEVICE": "cpu"}
    return {**{name: value for name, value in found.items() if name.startswith(("ACCELERATE", "FSDP"))}, **shared, **kind}


class KillAt(TrainerCallback):
    """Kills the last process in the middle of a step, between two of its micro-batches."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step and args.process_index == args.world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)


class Spoilt(PreferenceTrainer):
    """A trainer whose second step has an infinite loss, in one of its processes."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        own: Any = self.objective.loss

        def loss(*args: Any, **options: Any) -> Any:
            found, parts = own(*args, **options)
            bad = self.state.global_step == 1 and self.args.process_index == 1
            return (found + float("inf") if bad else found), parts

        self.objective.loss = loss  # type: ignore[method-assign]


def train(folder: Path, output: Path, case: dict[str, Any]) -> None:
    """One training; writes its log and weights to `output`."""
    case = dict(case)
    strategy, rank = os.environ["STRATEGY"], int(os.environ.get("RANK", "0"))
    output = output.with_name(case.pop("output", output.name))
    lora, kill, second, resume, tied = (case.pop(name, None) for name in ("lora", "kill", "second", "resume_after", "tied"))
    # Regions are on LLaVA's patches.
    plain = {} if case.pop("regions", True) else {"region": None, "patch_grid": None}
    kind: Any = Spoilt if case.pop("spoilt", False) else PreferenceTrainer
    reward = case.pop("reward", False)
    online = case.pop("online", None)
    in_4_bits = QuantizationConfig(load_in_4bit=True) if case.pop("in_4_bits", False) else None
    if resume is not None and rank == 0:
        # As if the processes had ended right after this checkpoint.
        for checkpoint in output.glob("checkpoint-*"):
            if int(checkpoint.name.removeprefix("checkpoint-")) > resume:
                shutil.rmtree(checkpoint)
    world = 1 if strategy == "alone" else 2
    options = {
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 2,
        "gradient_accumulation_steps": case.pop("accumulation", 4) // world,
        "max_steps": -1,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        # Where gradients are rounding errors, AdamW makes whole steps of them.
        "adam_epsilon": 1e-3,
        **({} if reward else {"loss_type": ["sigmoid", "nll"], "loss_weights": [1.0, 0.3]}),
        "attention_layer": 1,
        "logging_steps": 2,
        "max_grad_norm": 1.0,
        "use_cpu": strategy in ("alone", "ddp"),
        **case,
    }
    with whole_weights():
        model = load_model(folder / "model", dtype=torch.float32, device="cpu", quantization=in_4_bits)
        other = tiny(folder / "second", torch.float32).model if second else None
    if tied:
        for part in (model.model.config, model.model.config.text_config):
            part.tie_word_embeddings = True
        model.model.tie_weights()
        assert model.model.lm_head.weight is model.model.get_input_embeddings().weight
    settings: Any = config
    if reward:
        kind, settings, plain = RewardTrainer, functools.partial(config, kind=RewardConfig), {**plain, "caption": "a red circle"}
    trainer = kind(
        model.model,
        settings(output, **options),
        processing_class=model.processor,
        # One of these has no pictures, so that processes differ in having some.
        train_dataset=[{**record, **plain} for record in preference_records(9)],
        eval_dataset=[{**record, **plain} for record in preference_records(5)],
        peft_config=LoraConfig(**lora) if lora else None,
        ref_model=other,
        online=None if online is None else online_pairs(**online),
        callbacks=[KillAt(kill)] if kill is not None else None,
    )
    try:
        trainer.train(resume_from_checkpoint="auto")
    except (NonFiniteLossError, NoGradientError) as error:
        output.joinpath(f"error-{rank}.txt").write_text(str(error))
        return
    if rank == 0:
        shutil.rmtree(output / "final", ignore_errors=True)
    trainer.save_model(str(output / "final"))
    if rank == 0:
        (output / "log.json").write_text(json.dumps(trainer.state.log_history))


def fill(folder: Path) -> Path:
    """Put the models that `launch` reads into a folder."""
    tiny(folder / "model", torch.float32)
    tiny(folder / "second", torch.float32, seed=3)
    return folder
