"""What training reports: averages between log lines, `log.jsonl`, and progress."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from mmdpo_kernels import PreferenceLoss
from mmdpo_trainers.data.pair_records import PAIR
from mmdpo_trainers.files.atomic import read_json, write_atomic
from mmdpo_trainers.files.json_lines import JsonLines
from mmdpo_trainers.processes import collectives
from mmdpo_trainers.processes.progress import Progress, ProgressTask
from mmdpo_trainers.training.config import PreferenceConfig

_CLOCK = ("_runtime", "_per_second", "_time")
_TOTALS = ("train_loss", "total_flos")
LOG_STATE = "log_state.json"
"""File of a checkpoint: what was averaged but not yet logged, and what runs beside the weights."""
PAIRWISE = "pairwise_loss"
"""Average of the losses that are means over records, as "nll" is over tokens."""


class Averages:
    """Weighted means of named values."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = {}

    def add(self, values: Mapping[str, Tensor | float], weight: float) -> None:
        """Count each value (a mean over `weight` things) in."""
        for name, value in values.items():
            total = self._sums.setdefault(name, [0.0, 0.0])
            total[0] += float(value) * weight
            total[1] += weight

    def take(self) -> dict[str, float]:
        """The means so far, over the records of all processes; counting starts anew."""
        means = {name: total / weight for name, (total, weight) in self.state().items() if weight}
        self.clear()
        return means

    def clear(self) -> None:
        """Start counting anew."""
        self._sums = {}

    def state(self) -> dict[str, list[float]]:
        """JSON-able state of all processes for a checkpoint; all of them call this together."""
        merged: dict[str, list[float]] = {}
        for sums in collectives.all_gather(self._sums):
            for name, (total, weight) in sums.items():
                known = merged.setdefault(name, [0.0, 0.0])
                known[0] += total
                known[1] += weight
        return merged

    def load(self, state: Mapping[str, list[float]]) -> None:
        """Put `state()` back."""
        self._sums = {name: list(pair) for name, pair in state.items()}


def mean_of(values: Tensor) -> float:
    """Mean in double precision, so that what is logged does not depend on how records fall into micro-batches."""
    return sum(values.tolist()) / len(values)


def rewards_of(outcome: PreferenceLoss) -> dict[str, Tensor]:
    """What is logged of the rewards; (B,) each."""
    values = {**outcome.rewards, "accuracies": outcome.accuracies, "margins": outcome.margins}
    for name in (name for name in outcome.rewards if name not in PAIR):
        margins = outcome.rewards["chosen"] - outcome.rewards[name]
        values.update({f"{name}_accuracies": (margins > 0).float(), f"{name}_margins": margins})
    return values


def log_record(entry: Mapping[str, Any]) -> dict[str, Any]:
    """A log entry without what depends on the clock or on interruptions, so that a continued run logs the same; may be empty."""
    kept = {name: value for name, value in sorted(entry.items()) if not name.endswith(_CLOCK) and name not in _TOTALS}
    return kept if kept.keys() - {"epoch", "step"} else {}


class LogFile(TrainerCallback):
    """Writes log entries to a JSON-lines file. A continued run first puts back what its checkpoint knew: no line is doubled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        records = filter(None, map(log_record, state.log_history))
        write_atomic(self.path, "".join(json.dumps(record) + "\n" for record in records))

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        record = log_record(state.log_history[-1])
        if record:
            with JsonLines(self.path, key="step") as lines:
                lines.append([record])


class TrainingProgress(TrainerCallback):
    """Shows optimizer steps and the loss. A context manager, so that an error takes the bar away too."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self._stack = ExitStack()
        self._task: ProgressTask | None = None
        self._note = ""

    def __enter__(self) -> TrainingProgress:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stack.close()

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._task = self._stack.enter_context(self.progress.task("train", total=state.max_steps, completed=state.global_step))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._task is not None:
            self._task.advance(1, self._note)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        logs = state.log_history[-1]
        if "loss" in logs:
            accuracy = logs.get("rewards/accuracies", logs.get("accuracy"))
            self._note = f"loss {logs['loss']:.3f}" + (f", chosen preferred {accuracy:.0%}" if accuracy is not None else "")


class LoggingTrainer(Trainer):
    """`transformers.Trainer` whose log has averages over records, whatever processes and micro-batches they were in."""

    def __init__(self, **arguments: Any) -> None:
        self.router_aux_loss_coef = getattr(self, "router_aux_loss_coef", 0.0)
        self._averages = {"train": Averages(), "eval": Averages()}
        self._resumed_from: Path | None = None
        super().__init__(**arguments)

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Loss of an evaluation batch; its other values are averaged into the metrics."""
        with torch.no_grad():
            loss: Any = self.compute_loss(model, inputs)
        return loss.detach(), None, None

    def evaluation_loop(
        self,
        dataloader: DataLoader,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """As in `transformers.Trainer`, with the training log's keys among the metrics; the loss is that of all records at once."""
        self._averages["eval"].clear()
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        means, args = self._averages["eval"].take(), cast(PreferenceConfig, self.args)
        if means:
            # Records, chosen tokens and attention targets differ from batch to batch: the parts have averages of their own.
            means["loss"] = means.pop(PAIRWISE, 0.0) + args.weight_of.get("nll", 0.0) * means.get("nll_loss", 0.0)
            means["loss"] += args.attention_target_weight * means.get("attn/target_loss", 0.0)
            means["loss"] += self.router_aux_loss_coef * means.get("aux_loss", 0.0)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in means.items()})  # type: ignore[union-attr]
        return output

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        # The loss since the last log line is the mean over processes, as it is in the log.
        losses = collectives.all_gather(self._tr_loss.item())
        self._tr_loss.fill_(sum(losses) / len(losses))
        return super()._finalize_training(*args, **kwargs)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in `transformers.Trainer`, with the averages since the last training log."""
        if "loss" in logs:
            logs.update(self._averages["train"].take())
        super().log(logs, start_time)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """0: the estimate of transformers knows no token trees."""
        return 0

    def _restore_log(self) -> None:
        """Put back what was averaged but not yet logged when the checkpoint was written."""
        if self._resumed_from is None or not (self._resumed_from / LOG_STATE).is_file():
            return
        state = read_json(self._resumed_from / LOG_STATE)
        self._tr_loss.fill_(state["loss"])
        self._globalstep_last_logged = state["last_logged"]
        # All processes' values are in it: one of them goes on with them.
        self._averages["train"].load(state["averages"] if self.args.process_index == 0 else {})
        self._load_further_state(state)

    def _further_state(self) -> dict[str, Any]:
        """What else a checkpoint keeps beside the log's state; JSON-able, the same in all processes."""
        return {}

    def _load_further_state(self, state: Mapping[str, Any]) -> None:
        """Put `_further_state()` back."""
