"""What training reports: averages between log lines, `log.jsonl`, and progress."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from mmdpo_trainers.files.atomic import write_atomic
from mmdpo_trainers.files.json_lines import JsonLines
from mmdpo_trainers.processes import collectives
from mmdpo_trainers.processes.progress import Progress, ProgressTask

_CLOCK = ("_runtime", "_per_second", "_time")
_TOTALS = ("train_loss", "total_flos")


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
        for sums in collectives.gathered(self._sums):
            for name, (total, weight) in sums.items():
                known = merged.setdefault(name, [0.0, 0.0])
                known[0] += total
                known[1] += weight
        return merged

    def load(self, state: Mapping[str, list[float]]) -> None:
        """Put `state()` back."""
        self._sums = {name: list(pair) for name, pair in state.items()}


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
            accuracy = logs.get("rewards/accuracies")
            self._note = f"loss {logs['loss']:.3f}" + (f", chosen preferred {accuracy:.0%}" if accuracy is not None else "")
