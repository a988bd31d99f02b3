"""Rated answers (arXiv 2402.10884): several sampled answers a prompt, rated, and trained on by DPO, SFT on the best, or SteerLM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.methods.method import Method
from mmdpo_trainers.methods.outcomes import outcomes

# LoRA, epochs, schedule and weight decay are the released scripts' (findalexli/mllm-dpo), the first two the paper's too. Their effective
# batch of 32 a GPU is left to `per_device_train_batch_size` and `gradient_accumulation_steps`, ZeRO-3 to the launcher.
_SCRIPTS: dict[str, Any] = {
    "num_train_epochs": 3,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.03,
    "weight_decay": 0.0,
    "lora_r": 128,
    "lora_alpha": 256,
}


def _summary(folder: Path, arms: Sequence[str]) -> dict[str, Any]:
    """`outcomes`, and what generate and rank say of answers."""
    summary = outcomes(folder, arms, "rank")
    generate = read_json(folder / "generate" / "summary.json", missing={})
    summary["generate"] = {name: generate.get(name) for name in ("answers", "distinct", "all_alike")}
    for arm in (None, *arms):
        place = folder if arm is None else folder / "arms" / arm
        rank, after = (read_json(place / stage / "summary.json", missing={}) for stage in ("rank", "evaluate/after"))
        told = {name: rank.get(name) for name in ("make", "ties", "repeats", "mean_gap", "mean_chosen")}
        (summary if arm is None else summary["arms"][arm])["rank"] = {**told, "asked": after.get("asked")}
    return summary


METHOD = Method(
    name="rated",
    title="DPO on rated answers",
    about="pairs from several sampled answers a prompt, by their ratings",
    stages=("augment", "generate", "rate", "rank", "train", "evaluate", "report"),
    arm_sections=("rank", "train"),
    presets={
        "rated_paper": {**_SCRIPTS, "loss_type": ["sigmoid"], "beta": 0.1, "learning_rate": 5e-5},
        # SFT on the best answers and SteerLM, in the released code's script for both.
        "rated_sft": {**_SCRIPTS, "loss_type": ["nll"], "learning_rate": 4e-4},
    },
    evaluation_prompts="augmented",
    summary=_summary,
    tables=("accuracy", "selection"),
    page=("accuracy", "control_arms", "judge", "ratings", "training", "time"),
    arm_names={
        "best": "SFT on the best answer",
        "steerlm": "SteerLM",
        "random_pairs": "DPO on random pairs",
    },
    example="llava_rated",
)
