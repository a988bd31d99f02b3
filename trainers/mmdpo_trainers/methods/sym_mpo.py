"""SymMPO (arXiv 2506.11712): pairs with a second, similar picture and its answer: what is right about the one is wrong about the other."""

from __future__ import annotations

from typing import Any

from mmdpo_trainers.methods.held_out import held_out_summary
from mmdpo_trainers.methods.method import Method

# Settings of the released script for LLaVA-1.5-7B, which trains all but the vision tower for 670 steps of 128 pairs; how many epochs these
# are is left to the run.
_PAPER: dict[str, Any] = {
    "loss_type": ["sigmoid", "symmetric", "ancpo", "similar_anchor", "symmetric_margin"],
    # The margins' difference counts 1e-4 in units of reward: beta^2 of that in log-ratios, of which the loss is.
    "loss_weights": [1.0, 0.5, 1.0, 1.0, 1e-6],
    "beta": 0.1,
    "anchor": 0.0,
    "anchors": ["chosen"],
    "further_branches": {
        "exchanged": ["images", "similar_chosen"],
        "similar_chosen": ["similar_images", "similar_chosen"],
        "similar_rejected": ["similar_images", "chosen"],
    },
    "learning_rate": 5e-6,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.05,
    "weight_decay": 0.01,
    "full_finetune": True,
    "freeze_projector": False,
}

METHOD = Method(
    name="sym_mpo",
    title="SymMPO",
    about="pairs of similar pictures with an answer each, trained on symmetrically",
    stages=("pairs", "train", "evaluate", "report"),
    presets={
        "sym_mpo_paper": _PAPER,
        # The released code squares the difference of log-ratios, without beta, and has a beta of its own for the second anchor.
        "sym_mpo_official_code": {**_PAPER, "loss_weights": [1.0, 0.5, 1.0, 1.0, 1e-4], "similar_beta": 0.1},
    },
    evaluation_prompts="pairs",
    measures=("answers", "held_out"),
    summary=lambda folder, arms: held_out_summary(folder, arms, main="sym_mpo"),
    tables=("held_out",),
    page=("comparison", "seeds", "rewards", "examples", "main_training", "pairs", "time"),
    arm_names={"dpo": "DPO", "without_symmetric": "DPO with both anchors"},
    baseline="dpo",
)
