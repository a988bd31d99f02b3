"""What a trainer writes and reads back: checkpoints with a marker, adapters and whole models that `from_pretrained` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import Tensor, nn
from transformers import Trainer

from mmdpo_trainers.files.atomic import write_atomic
from mmdpo_trainers.processes import collectives
from mmdpo_trainers.training.checkpoints import mark_complete, remove_old, start, writing
from mmdpo_trainers.training.sharded.sharding import Sharding
from mmdpo_trainers.training.training_log import Averages

LOG_STATE = "log_state.json"


class SavingTrainer(Trainer):
    """`transformers.Trainer` with whole checkpoints, and weights by the names that models save them under."""

    sharding: Sharding
    _averages: dict[str, Averages]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        averages, loss = self._averages["train"].state(), collectives.gathered(self._tr_loss.item())
        self.sharding.complete_optimizer(self.optimizer)
        with writing(folder):
            if self.args.process_index == 0:
                start(folder)
            collectives.barrier()
            limit, self.args.save_total_limit = self.args.save_total_limit, None
            try:
                # Its own removal of old checkpoints would not wait for the marker, nor spare what others wrote.
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
            # Every process has written what is its own.
            collectives.barrier()
            if self.args.process_index == 0:
                state = {"loss": sum(loss) / len(loss), "last_logged": self._globalstep_last_logged, "averages": averages}
                write_atomic(folder / LOG_STATE, state)
                mark_complete(folder)
                remove_old(folder.parent, limit, keep=self.state.best_model_checkpoint)
            collectives.barrier()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `transformers.Trainer`: an adapter or a whole model that `from_pretrained` reads, gathered where weights are in shards."""
        if self.is_fsdp_enabled and not _internal_call:
            # By itself it writes nothing where checkpoints are in shards.
            state = self.accelerator.get_state_dict(self.model)
            self._save(output_dir, state_dict=state)
        else:
            super().save_model(output_dir, _internal_call)
        collectives.barrier()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """As in `transformers.Trainer`; a tied weight once, also where gathering has made two of it."""
        if state_dict is not None and not isinstance(self.model, PeftModel):
            once = dict(self.model.named_parameters())  # type: ignore[union-attr]
            twice = [name for name, _ in self.model.named_parameters(remove_duplicate=False) if name not in once]  # type: ignore[union-attr]
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in twice}
        super()._save(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As in `transformers.Trainer`; a whole model by `from_pretrained`, which knows under what names weights are saved."""
        target: Any = model if model is not None else self.model
        if isinstance(target, PeftModel) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            saved = type(target).from_pretrained(resume_from_checkpoint, dtype="auto", local_files_only=True)
            target.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        if isinstance(self.model, PeftModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))
