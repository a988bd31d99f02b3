"""Trainings in two processes on the CPU, with the environment that `accelerate launch` gives them for one of configs/accelerate.

The processes are forks of the one that runs the tests, which has imported everything already.
"""

from __future__ import annotations

import gc
import importlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from training_cases import config, preference_records, tiny
from transformers import TrainerCallback

from mmdpo_trainers.training.gradient_check import NoGradientError
from mmdpo_trainers.training.loss_check import NonFiniteLossError
from mmdpo_trainers.training.preference_trainer import PreferenceTrainer
from mmdpo_trainers.whole_weights import whole_weights

ROOT = Path(__file__).parents[1]
STRATEGIES = ("ddp", "zero2", "zero3", "fsdp2")
TIMEOUT = 300


def needs(strategy: str) -> None:
    """Skip a test of DeepSpeed where it is not installed."""
    if strategy.startswith("zero"):
        pytest.importorskip("deepspeed", reason="DeepSpeed is not installed")


def launch(strategy: str, folder: Path, output: Path, cases: dict[str, dict[str, Any]], *, check: bool = True) -> list[int]:
    """Train the cases one after the other in two processes ("alone": in one), and return their exit codes.

    As with a launcher, a process that fails ends the others. folder: holds `model` and `second`. check: they must end well.
    """
    world = 1 if strategy == "alone" else 2
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {**_environment(strategy, world), "STRATEGY": strategy, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    output.mkdir(parents=True, exist_ok=True)
    context = multiprocessing.get_context("fork")
    processes, logs = [], []
    for rank in range(world):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world} if world > 1 else {}
        environment = {**shared, **{name: str(value) for name, value in own.items()}}
        logs.append(output / f"process-{rank}.log")
        processes.append(context.Process(target=_process, args=(environment, logs[-1], folder, output, cases)))
        processes[-1].start()
    end = time.monotonic() + TIMEOUT
    while any(process.is_alive() for process in processes) and time.monotonic() < end:
        if any(process.exitcode not in (None, 0) for process in processes):
            break
        time.sleep(0.05)
    for process in processes:
        process.join(timeout=5)
        if process.is_alive():
            process.kill()
            process.join()
    codes = [int(process.exitcode or 0) for process in processes]
    assert not check or not any(codes), "\n".join(file.read_text()[-5000:] for file in logs)
    return codes


def _process(environment: dict[str, str], log: Path, folder: Path, output: Path, cases: dict[str, dict[str, Any]]) -> None:
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = sys.stderr = os.fdopen(2, "w", buffering=1)
    os.environ.update(environment)
    torch.set_num_threads(1)
    code = 1
    try:
        if environment["STRATEGY"] not in ("alone", "ddp"):
            _pretend_accelerators(environment["STRATEGY"])
        for name, case in cases.items():
            train(folder, output / name, case)
            gc.collect()
        if torch.distributed.is_initialized():
            torch.distributed.barrier()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # Without what the forked process's own ending would do, which is the tests'.
        os._exit(code)


def _pretend_accelerators(strategy: str) -> None:
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

    file = ROOT / "configs" / "accelerate" / f"{strategy}.yaml"
    known = ["--config_file", str(file), "--num_processes", str(world), "script.py"]
    arguments, defaults, _ = _validate_launch_command(launch_command_parser().parse_args(known))
    arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
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

    def _loss(self, batch: Any, *args: Any) -> Any:
        loss, parts = super()._loss(batch, *args)
        bad = self.state.global_step == 1 and self.args.process_index == 1
        return (loss + float("inf") if bad else loss), parts


def train(folder: Path, output: Path, case: dict[str, Any]) -> None:
    """One training; writes its log and weights to `output`."""
    case = dict(case)
    strategy, rank = os.environ["STRATEGY"], int(os.environ.get("RANK", "0"))
    output = output.with_name(case.pop("output", output.name))
    lora, kill, second, resume, tied = (case.pop(name, None) for name in ("lora", "kill", "second", "resume_after", "tied"))
    kind = Spoilt if case.pop("spoilt", False) else PreferenceTrainer
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
        "loss_type": ["sigmoid", "nll"],
        "loss_weights": [1.0, 0.3],
        "attention_layer": 1,
        "logging_steps": 2,
        "max_grad_norm": 1.0,
        "use_cpu": strategy in ("alone", "ddp"),
        **case,
    }
    with whole_weights():
        model = tiny(folder / "model", torch.float32)
        other = tiny(folder / "second", torch.float32).model if second else None
    if tied:
        for part in (model.model.config, model.model.config.text_config):
            part.tie_word_embeddings = True
        model.model.tie_weights()
        assert model.model.lm_head.weight is model.model.get_input_embeddings().weight
    trainer = kind(
        model.model,
        config(output, **options),
        processing_class=model.processor,
        # One of these has no pictures, so that processes differ in having some.
        train_dataset=preference_records(9),
        eval_dataset=preference_records(5),
        peft_config=LoraConfig(**lora) if lora else None,
        ref_model=other,
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
