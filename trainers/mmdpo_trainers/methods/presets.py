"""Settings that papers and their released code train with, by name; `train.preset` of a run, or `PreferenceConfig(**PRESETS[name])`."""

from __future__ import annotations

from typing import Any

from mmdpo_trainers.config.run_config import RunConfig

_MIA_DPO: dict[str, Any] = {
    "loss_type": ["sigmoid", "nll"],
    "loss_weights": [1.0, 0.1],
    "beta": 0.1,
    "learning_rate": 5e-5,
    "lr_scheduler_type": "linear",
    "warmup_steps": 0.1,
    "lora_r": 128,
    "lora_alpha": 256,
}

_MDPO: dict[str, Any] = {
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

METHODS = {"mia_dpo": "mia_dpo_paper", "mdpo": "mdpo_paper"}
"""A run's `method` -> the preset it trains with where it names none."""

PRESETS: dict[str, dict[str, Any]] = {
    "mia_dpo_paper": _MIA_DPO,
    "mdpo_paper": _MDPO,
    "mdpo_official_code": {**_MDPO, "corruption_draw": "separate", "precompute_ref_log_probs": True},
}
"""`mia_dpo_paper`: arXiv 2410.17637. `mdpo_paper`: arXiv 2406.11839; one corrupted picture for policy and reference, so that every
term starts at log 2. `mdpo_official_code`: the released code draws another crop for the reference, and its conditional term does not.

The papers' effective batches (64 and 32 pairs) are left to `per_device_train_batch_size` and `gradient_accumulation_steps`."""


def preset_args(config: RunConfig) -> dict[str, Any]:
    """A run's `train.args` over those of its preset."""
    return {**PRESETS[config.train.preset or METHODS[config.method]], **config.train.args}
