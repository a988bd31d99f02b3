"""Online and mixed DPO (arXiv 2407.02477; OnlineDPO: arXiv 2402.04792): pairs of answers that the policy gives while it is trained.

2407.02477 has two answers a prompt, ranked by an annotator model, in each step online or, in mixed DPO, with probability 1/2; the rest of
the step is offline. Its extra negatives are gamma L(y+, y-) + (1 - gamma) L(y+, y~-), gamma = 1/2. It has no released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.methods.held_out import arm_folders, held_out_summary
from mmdpo_trainers.methods.method import Method

# Rates and adapter are the defaults of PreferenceConfig.
_DPO: dict[str, Any] = {"loss_type": ["sigmoid"], "beta": 0.1}
_NEGATIVE: dict[str, Any] = {
    "extra_negative": "sampled",
    "extra_negative_weight": 0.5,
    "further_branches": {"sampled": ["images", "sampled"]},
}

_NAME = "online_dpo"


def _summary(folder: Path, arms: Sequence[str]) -> dict[str, Any]:
    """What is of held-out pairs and questions, and by arm what was sampled in training."""
    summary = held_out_summary(folder, arms, main=_NAME)
    for name, path in arm_folders(folder, arms, _NAME).items():
        summary["arms"][name]["online"] = read_json(path / "train" / "summary.json", missing={}).get("online")
    return summary


METHOD = Method(
    name=_NAME,
    title="Online DPO",
    about="pairs of answers that the policy gives while it is trained, rated as `rate` says",
    stages=("pairs", "train", "evaluate", "report"),
    arm_sections=("train", "online"),
    presets={
        # As in the papers no pair but the policy's own is trained on.
        "online_pairs": {**_DPO, "online": {"alpha": 1.0, "use": "pair", "without_pair": "skip"}},
        "mixed_pairs": {**_DPO, "online": {"alpha": 0.5, "use": "pair"}},
        # The record's own pair in every step, beside it the worst answer of the policy.
        "online_negatives": {**_DPO, **_NEGATIVE, "online": {"alpha": 1.0, "use": "negative"}},
        "mixed_negatives": {**_DPO, **_NEGATIVE, "online": {"alpha": 0.5, "use": "negative"}},
    },
    evaluation_prompts="pairs",
    measures=("answers", "held_out"),
    summary=_summary,
    tables=("held_out",),
    page=("comparison", "seeds", "sampled", "rewards", "examples", "main_training", "pairs", "time"),
    arm_names={
        "dpo": "DPO",
        "mixed_dpo": "Mixed DPO",
        "own_pairs_stand_in": "Online DPO, own pairs for ties",
        "extra_negatives": "DPO with sampled negatives",
    },
    baseline="dpo",
    example="llava_online",
)
