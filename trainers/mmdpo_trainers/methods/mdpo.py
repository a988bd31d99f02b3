"""mDPO (arXiv 2406.11839): pairs that exist, with a term that holds the picture against a corrupted one and an anchor on the chosen reward."""

from __future__ import annotations

from typing import Any

from mmdpo_trainers.methods.held_out import held_out_summary
from mmdpo_trainers.methods.method import Method

# The paper's effective batch of 32 pairs is left to `per_device_train_batch_size` and `gradient_accumulation_steps`.
_PAPER: dict[str, Any] = {
    "loss_type": ["sigmoid", "copo", "ancpo"],
    "beta": 0.1,
    "anchor": 0.0,
    "anchors": ["chosen"],
    "corruption": "crop",
    "corruption_keep": (0.01, 0.20),
    "corruption_draw": "shared",
    "num_train_epochs": 3,
    "learning_rate": 1e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,
    "weight_decay": 0.05,
    "adam_beta2": 0.98,
    "lora_r": 64,
    "lora_alpha": 128,
}

METHOD = Method(
    name="mdpo",
    title="mDPO",
    about="pairs that exist, trained on with corrupted pictures",
    stages=("pairs", "train", "evaluate", "report"),
    presets={
        # One corrupted picture for policy and reference, so that every term starts at log 2.
        "mdpo_paper": _PAPER,
        # The released code draws another crop for the reference, and its conditional term does not start there.
        "mdpo_official_code": {**_PAPER, "corruption_draw": "separate", "precompute_ref_log_probs": True},
    },
    evaluation_prompts="pairs",
    measures=("answers", "held_out"),
    summary=lambda folder, arms: held_out_summary(folder, arms, main="mdpo"),
    tables=("held_out",),
    page=("comparison", "seeds", "rewards", "examples", "main_training", "pairs", "time"),
    arm_names={
        "dpo": "DPO",
        "dpo_no_image": "DPO (No Image)",
        "mdpo_without_copo": "mDPO without CoPO",
        "mdpo_without_ancpo": "mDPO without AncPO",
    },
    baseline="dpo",
    example="llava_mdpo",
)
