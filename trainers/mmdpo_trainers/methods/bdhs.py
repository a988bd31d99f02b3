"""BDHS (arXiv 2407.02477): rejected answers that the model makes itself of true ones, with part of the picture hidden from it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.methods.held_out import arm_folders, held_out_summary
from mmdpo_trainers.methods.method import Method

_NAME = "bdhs"

# Appendix A searches learning rates of 1e-7 to 5e-6, 3 to 7 epochs and batches of 16 to 48, and does not say which were best: these lie
# within. The batch is left to `per_device_train_batch_size` and `gradient_accumulation_steps`. The paper also trains the projector, at a
# rate of its own; here LoRA leaves it as it is.
_PAPER: dict[str, Any] = {
    "loss_type": ["sigmoid"],
    "beta": 0.1,
    "learning_rate": 1e-6,
    "num_train_epochs": 3,
    "lora_r": 128,
    "lora_alpha": 256,
}


def _summary(folder: Path, arms: Sequence[str]) -> dict[str, Any]:
    """The figures of held-out pairs, and of each arm's rejected answers (`hallucinate`)."""
    found = {}
    for name, path in arm_folders(folder, arms, _NAME).items():
        summary = read_json(path / "hallucinate" / "summary.json", missing={})
        found[name] = {key: value for key, value in summary.items() if key not in ("fingerprint", "seconds")}
    return {**held_out_summary(folder, arms, main=_NAME), "hallucinate": found}


METHOD = Method(
    name=_NAME,
    title="BDHS",
    about="rejected answers by the model itself, of true ones, with part of the picture hidden",
    stages=("pairs", "hallucinate", "train", "evaluate", "report"),
    arm_sections=("hallucinate", "train"),
    presets={
        "bdhs_paper": _PAPER,
        "bdhs_ipo": {**_PAPER, "loss_type": ["ipo"], "beta": 0.9},
        "bdhs_slic": {**_PAPER, "loss_type": ["hinge"], "beta": 0.1},
        # Equation 5, on preference data: the data's own rejected answer (an arm's `hallucinate.rejected: given`) beside the hallucinated one.
        "bdhs_both": {
            **_PAPER,
            "further_branches": {"hallucinated": ["images", "hallucinated"]},
            "extra_negative": "hallucinated",
            "extra_negative_weight": 0.5,
        },
    },
    evaluation_prompts="pairs",
    measures=("answers", "held_out"),
    summary=_summary,
    tables=("held_out",),
    page=("comparison", "seeds", "hallucinated", "rewards", "examples", "main_training", "time"),
    arm_names={
        "given": "DPO on the given rejected answers",
        "nothing_hidden": "nothing hidden",
        "nearly_all_hidden": "99 % hidden",
        "both": "both rejected answers",
        "ipo": "IPO",
        "slic": "SLiC",
    },
    baseline="given",
    example="llava_bdhs",
)
