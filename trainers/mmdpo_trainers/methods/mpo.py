"""MPO (arXiv 2411.10442): pairs that exist, by a relative loss (DPO), an absolute one (BCO) and the likelihood of the chosen response."""

from __future__ import annotations

from typing import Any

from mmdpo_trainers.methods.held_out import held_out_summary
from mmdpo_trainers.methods.method import Method

# Settings of the released script for InternVL2-8B, which trains all weights; its batch of 256 pairs is left to
# `per_device_train_batch_size` and `gradient_accumulation_steps`.
_PAPER: dict[str, Any] = {
    "loss_type": ["sigmoid", "bco_pair", "mean_nll"],
    "loss_weights": [0.8, 0.2, 1.0],
    "bco_shift": "previous",
    "beta": 0.1,
    "num_train_epochs": 1,
    "learning_rate": 5e-6,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "weight_decay": 0.05,
    "full_finetune": True,
    "freeze_vision": False,
    "freeze_projector": False,
}

METHOD = Method(
    name="mpo",
    title="MPO",
    about="pairs that exist, by DPO, BCO and the chosen response's likelihood together",
    stages=("pairs", "train", "evaluate", "report"),
    presets={
        # The shift is the mean reward of the steps before, and each chosen response's likelihood is a mean over its own tokens.
        "mpo_paper": _PAPER,
        # The released code takes each micro-batch into the shift before its own loss, and its likelihood is a mean over a batch's tokens.
        "mpo_official_code": {**_PAPER, "loss_type": ["sigmoid", "bco_pair", "nll"], "bco_shift": "present"},
    },
    evaluation_prompts="pairs",
    measures=("answers", "held_out"),
    summary=lambda folder, arms: held_out_summary(folder, arms, main="mpo"),
    tables=("held_out",),
    page=("comparison", "seeds", "rewards", "examples", "main_training", "pairs", "time"),
    arm_names={"dpo": "DPO", "mpo_without_bco": "MPO without BCO", "mpo_without_nll": "MPO without likelihood"},
    baseline="dpo",
)
