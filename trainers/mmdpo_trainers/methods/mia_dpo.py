"""MIA-DPO (arXiv 2410.17637): pairs from the model's own answers to multi-image prompts, selected by where it looked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.methods.method import Method


def _summary(folder: Path, arms: Sequence[str]) -> dict[str, Any]:
    """`accuracy` before and after, `pairs` by format, `dropped` by rule, what augment made and could not use; the same by arm; `rate`."""
    summary = _outcome(folder)
    before, augment, select = (
        read_json(folder / stage / "summary.json", missing={}) for stage in ("evaluate/before", "augment", "select")
    )
    summary["accuracy"] = {"before": before.get("accuracy"), **summary["accuracy"]}
    summary["counts"] = {"evaluate": before.get("counts")}
    summary["match"] = {"select": select.get("match"), "evaluate": before.get("match")}
    summary["prompts"], summary["problems"] = augment.get("prompts"), augment.get("problems")
    rate = read_json(folder / "rate" / "summary.json", missing={})
    summary["rate"] = {name: value for name, value in rate.items() if name not in ("fingerprint", "seconds", "lost")} or None
    summary["arms"] = {arm: _outcome(folder / "arms" / arm) for arm in arms}
    return summary


def _outcome(folder: Path) -> dict[str, Any]:
    select, after = (read_json(folder / stage / "summary.json", missing={}) for stage in ("select", "evaluate/after"))
    return {"accuracy": {"after": after.get("accuracy")}, "pairs": select.get("pairs"), "dropped": select.get("dropped")}


METHOD = Method(
    name="mia_dpo",
    title="MIA-DPO",
    about="pairs from the model's own answers",
    stages=("augment", "generate", "rate", "score", "select", "train", "evaluate", "report"),
    # Only an arm that a judge selects for needs ratings.
    optional={"rate": lambda config: any(each.select.rule == "judge" for each in config.every_arm)},
    arm_sections=("select", "train"),
    presets={
        # The paper's effective batch of 64 pairs is left to `per_device_train_batch_size` and `gradient_accumulation_steps`.
        "mia_dpo_paper": {
            "loss_type": ["sigmoid", "nll"],
            "loss_weights": [1.0, 0.1],
            "beta": 0.1,
            "learning_rate": 5e-5,
            "lr_scheduler_type": "linear",
            "warmup_steps": 0.1,
            "lora_r": 128,
            "lora_alpha": 256,
        }
    },
    evaluation_prompts="augmented",
    summary=_summary,
    tables=("accuracy", "selection"),
    page=("accuracy", "control_arms", "heat_maps", "selection", "judge", "ratios", "training", "selected_pairs", "time"),
)
