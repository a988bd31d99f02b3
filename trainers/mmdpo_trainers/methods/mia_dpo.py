"""MIA-DPO (arXiv 2410.17637): pairs from the model's own answers to multi-image prompts, selected by where it looked."""

from __future__ import annotations

from typing import Any

from mmdpo_trainers.methods.method import Method
from mmdpo_trainers.methods.outcomes import outcomes

# The paper's effective batch of 64 pairs is left to `per_device_train_batch_size` and `gradient_accumulation_steps`.
_PAPER: dict[str, Any] = {
    "loss_type": ["sigmoid", "nll"],
    "loss_weights": [1.0, 0.1],
    "beta": 0.1,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "lora_r": 128,
    "lora_alpha": 256,
}

METHOD = Method(
    name="mia_dpo",
    title="MIA-DPO",
    about="pairs from the model's own answers",
    stages=("augment", "generate", "rate", "score", "select", "train", "evaluate", "report"),
    # Only an arm that a judge selects for needs ratings.
    optional={"rate": lambda config: any(each.select.rule == "judge" for each in config.every_arm)},
    arm_sections=("select", "train"),
    presets={
        "mia_dpo_paper": _PAPER,
        # The released code has the paper's gamma term, and its training script (train_dpo_multi.sh) sets gamma to 0.
        "mia_dpo_official_code": {**_PAPER, "loss_type": ["sigmoid"], "loss_weights": None},
    },
    evaluation_prompts="augmented",
    summary=lambda folder, arms: outcomes(folder, arms, "select"),
    tables=("accuracy", "selection"),
    page=(
        *("accuracy", "control_arms", "heat_maps", "layers", "selection", "judge", "ratios"),
        *("training", "selected_pairs", "time"),
    ),
    example="llava_mia_dpo",
)
