"""A reward model: the policy's architecture with a scalar head, trained on pairs that exist (arXiv 2309.14525), to rate answers with."""

from __future__ import annotations

from typing import Any

from mmdpo_trainers.methods.method import Method
from mmdpo_trainers.methods.reward_figures import rewards_summary

# As the released code trains its reward model; its effective batch of 32 pairs is left to `per_device_train_batch_size` and
# `gradient_accumulation_steps`. Loss and place of the facts are the paper's: docs/training.md says where the code differs.
_LLAVA_RLHF: dict[str, Any] = {
    "num_train_epochs": 1,
    "learning_rate": 2e-5,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 0.03,
    "weight_decay": 0.0,
    "max_grad_norm": 0.3,
    "lora_r": 64,
    "lora_alpha": 16,
    "facts": ["caption"],
}

METHOD = Method(
    name="reward",
    title="Reward model",
    about="a reward model from pairs that exist, to rate answers with",
    stages=("pairs", "train", "evaluate", "report"),
    trainer="reward_model",
    presets={
        # Without facts, which not every data set has.
        "bradley_terry": {**_LLAVA_RLHF, "facts": []},
        "llava_rlhf": _LLAVA_RLHF,
    },
    evaluation_prompts="pairs",
    measures=("rewards",),
    summary=lambda folder, arms: rewards_summary(folder, arms, main="reward"),
    tables=("rewards",),
    page=("reward_accuracy", "reward_margins", "main_training", "pairs", "time"),
    arm_names={"no_facts": "without facts", "no_image": "without pictures"},
    baseline="no_facts",
    example="llava_reward",
)
