"""Real `train()` loops that take turns: each runs in a thread of its own and moves one optimizer step when asked to."""

from __future__ import annotations

import threading
from typing import Any

from transformers import PrinterCallback, Trainer, TrainerCallback


class Loop:
    """One trainer's `train()`. `step` runs from the end of one step to the end of the next: data, forward, backward, optimizer, log.

    The first step also starts the loop, and so is a warm-up.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._go, self._done = threading.Semaphore(0), threading.Semaphore(0)
        self._stop = False
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        trainer.add_callback(_HandOver(self))
        trainer.remove_callback(PrinterCallback)

    def step(self) -> None:
        """Let the loop go on for one step; an error in it is raised here."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()
        else:
            self._go.release()
        self._done.acquire()
        if self._error is not None:
            raise RuntimeError("the training loop failed") from self._error

    def close(self) -> None:
        """End the loop."""
        self._stop = True
        if self._thread is not None:
            self._go.release()
            self._thread.join()

    def __enter__(self) -> Loop:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def _run(self) -> None:
        try:
            self.trainer.train()
            if not self._stop:
                raise RuntimeError("train() ended by itself; give it more steps")
        except BaseException as error:  # reaches the caller of `step`
            self._error = error
        self._done.release()

    def hand_over(self) -> bool:
        """Called at the end of each step: wait to be asked for the next. -> whether to stop."""
        self._done.release()
        self._go.acquire()
        return self._stop


class _HandOver(TrainerCallback):
    def __init__(self, loop: Loop) -> None:
        self.loop = loop

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        control.should_training_stop = self.loop.hand_over()
        return control
