"""`PreferenceConfig`: what preference training is made with; TRL's names where TRL has the same thing."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

LOSS_TYPES = ("sigmoid", "hinge", "ipo", "nll")
"""Losses of a chosen and a rejected response; their equations are in `mmdpo_kernels.preference_loss`."""

REFERENCE_FREE = frozenset({"nll"})
"""Losses for which the reference model is not run."""


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class PreferenceConfig(TrainingArguments):
    """`transformers.TrainingArguments` with the fields of TRL's `DPOConfig` that apply, and ours.

    Defaults are MIA-DPO's (arXiv 2410.17637): beta 0.1, LoRA 128/256 on every linear of the language tower, learning rate 5e-5
    linear with a tenth of warm-up. Dropout is always off: policy and reference must differ by the weights only.

    Raises ValueError naming the field where values do not fit together.
    """

    learning_rate: float = _option(5e-5, "peak learning rate")
    warmup_steps: float = _option(0.1, "warm-up steps; below 1: as a share of all steps")
    logging_steps: float = _option(10, "log every so many steps; below 1: as a share of all steps")
    save_total_limit: int | None = _option(2, "checkpoints kept; at least 2, so that a kill during a save leaves a whole one")
    report_to: None | str | list[str] = _option("none", "experiment trackers to report to, as in transformers")
    remove_unused_columns: bool = _option(False, "must stay off: the collator reads the columns itself")

    beta: float = _option(0.1, "strength of the pull towards the reference model, above 0")
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": f"losses to add up, of {', '.join(LOSS_TYPES)}; MIA-DPO is sigmoid nll"},
    )
    loss_weights: list[float] | None = _option(None, "one factor a loss (the one of nll is MIA-DPO's gamma); None: 1 each")
    max_length: int | None = _option(
        None, "longest prompt + response in tokens, with picture tokens; longer records are left out and named. None: no limit"
    )
    full_finetune: bool = _option(False, "train the weights themselves in place of a LoRA adapter")
    lora_r: int = _option(128, "rank of the LoRA adapter")
    lora_alpha: int = _option(256, "LoRA scale: the update is multiplied by lora_alpha / lora_r")
    lora_target: str = _option(
        "language", "what LoRA adapts: `language` (every linear of the language tower, not lm_head), or a PEFT regular expression"
    )
    freeze_vision: bool = _option(True, "full fine-tuning: keep the vision tower as it is")
    freeze_projector: bool = _option(True, "full fine-tuning: keep the projector between vision and language as it is")
    tree_packing: bool = _option(
        True, "run each micro-batch as one token tree, shared prompts and pictures once; False: padded, separate sequences"
    )
    attention_layer: int | None = _option(
        None, "decoder layer (0-based) whose attention ratio on the asked-about picture is logged (attn/ratio_*); None: none"
    )
    log_attention_every: int = _option(1, "steps between recordings of the attention ratio; 0: during evaluation only")

    def __post_init__(self) -> None:
        self._check_numbers()
        super().__post_init__()
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        self._check_loss()
        self._check_strategies()
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns: expected False (the collator reads the columns itself), got True")
        if self.save_total_limit is not None and self.save_total_limit < 2:
            raise ValueError(
                f"save_total_limit: expected at least 2, got {self.save_total_limit}; a kill during a save would lose the run"
            )
        if self.lora_r < 1 or self.lora_alpha <= 0:
            raise ValueError(f"lora_r, lora_alpha: expected values above 0, got {self.lora_r}, {self.lora_alpha}")
        if self.log_attention_every < 0:
            raise ValueError(f"log_attention_every: expected 0 or more, got {self.log_attention_every}")

    def _check_numbers(self) -> None:
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected a whole number of 1 or more, got {value!r}")
        if not _is_number(self.num_train_epochs) or not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs: expected a number above 0, got {self.num_train_epochs!r}")
        if not _is_number(self.learning_rate) or self.learning_rate < 0:
            raise ValueError(f"learning_rate: expected a number of 0 or more, such as 5.0e-5, got {self.learning_rate!r}")

    def _check_strategies(self) -> None:
        if self.save_strategy != SaveStrategy.STEPS:
            return
        for name in ("eval_strategy", "logging_strategy"):
            if getattr(self, name) == IntervalStrategy.EPOCH:
                raise ValueError(
                    f"{name}: 'epoch' needs save_strategy 'epoch' too; a run continued from a checkpoint at the end of an epoch "
                    "would miss it"
                )

    def _check_loss(self) -> None:
        unknown = [name for name in self.loss_type if name not in LOSS_TYPES]
        if unknown or not self.loss_type:
            raise ValueError(f"loss_type: expected one or more of {', '.join(LOSS_TYPES)}, got {self.loss_type}")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(f"loss_weights: expected one a loss ({len(self.loss_type)}), got {self.loss_weights}")
        if self.loss_weights is not None and not all(map(_is_number, self.loss_weights)):
            raise ValueError(f"loss_weights: expected finite numbers, got {self.loss_weights}")
        if not _is_number(self.beta) or not self.beta > 0:
            raise ValueError(f"beta: expected a value above 0, got {self.beta}")

    @property
    def weight_of(self) -> dict[str, float]:
        """Loss -> its factor."""
        weights = self.loss_weights or [1.0] * len(self.loss_type)
        return dict(zip(self.loss_type, map(float, weights), strict=True))

    @property
    def needs_reference(self) -> bool:
        """Whether some loss compares with the reference model."""
        return not REFERENCE_FREE.issuperset(self.loss_type)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
