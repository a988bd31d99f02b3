"""Curves over training."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from mmdpo_trainers.methods.held_out import ALL

from .. import plots
from ..comparison import PageInputs
from ..contents import Record

CURVES = (
    ("Loss", ("loss", "nll_loss", "eval_loss")),
    ("Rewards", ("rewards/chosen", "rewards/rejected", "eval_rewards/chosen", "eval_rewards/rejected")),
    ("Reward margin", ("rewards/margins", "eval_rewards/margins")),
    ("Reward accuracy", ("rewards/accuracies", "eval_rewards/accuracies")),
    ("Log-probabilities", ("logps/chosen", "logps/rejected")),
    ("Accuracy", ("accuracy", "eval_accuracy")),
    ("Margin", ("margin", "eval_margin")),
)


def training(page: PageInputs) -> dict[str, Any]:
    """Losses, rewards and ratios of the run."""
    return {
        "training": _curve_plots(page.run.log),
        "training_caption": "Logged every few optimizer steps"
        + (
            "; dashed: evaluations during training."
            if any(key.startswith("eval_") for line in page.run.log for key in line)
            else "."
        ),
    }


def main_training(page: PageInputs) -> dict[str, Any]:
    """The same of the main arm, where arms have curves of their own too."""
    return training(page)


def rewards(page: PageInputs) -> dict[str, Any]:
    """The chosen reward of every arm."""
    compared = page.comparison
    return {"rewards": _reward_plots(compared.summary["arms"], compared.held_out.kinds(), page.method.name_of)}


def _curve_plots(log: Iterable[Record]) -> list[str]:
    """The training curves that the log holds: losses, rewards, and every `attn/ratio_*`."""
    records = [record for record in log if "step" in record]
    ratio_keys = sorted({key for record in records for key in record if key.removeprefix("eval_").startswith("attn/ratio_")})
    drawn: list[str] = []
    for title, keys in (*CURVES, ("Target attention ratio", tuple(ratio_keys))):
        series = {}
        for key in keys:
            values = {record["step"]: float(record[key]) for record in records if record.get(key) is not None}
            if values:
                label = re.sub(r"rewards/|logps/|attn/ratio_", "", key).replace("_", " ")
                series[label] = (sorted(values), [values[step] for step in sorted(values)])
        if series:
            drawn.append(plots.curve_plot(series, name=f"curve-{len(drawn)}", title=title))
    return drawn


def _reward_plots(arms: Mapping[str, Mapping[str, Any]], kinds: Sequence[str], name_of: Callable[[str], str]) -> list[str]:
    """The chosen reward over training, one line an arm, one plot a kind."""
    drawn = []
    for kind in kinds:
        key = "rewards/chosen" if kind == ALL else f"rewards/chosen_{kind}"
        series = {}
        for arm, figures in arms.items():
            curves = figures.get("curves") or {}
            points = [
                (step, value)
                for step, value in zip(curves.get("step", ()), curves.get(key, ()), strict=False)
                if value is not None
            ]
            if points:
                series[name_of(arm)] = ([step for step, _ in points], [value for _, value in points])
        if series:
            title = "Chosen reward" if kind == ALL else f"Chosen reward, {kind}s"
            drawn.append(plots.curve_plot(series, name=f"chosen-{kind}", title=title, zero=True))
    return drawn
