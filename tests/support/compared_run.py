"""A run folder of invented numbers with arms side by side: answers in groups, and log-probabilities of held-out pairs."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from report_run import message, picture, write_json, write_lines

from mmdpo_trainers.methods.held_out import held_out_figures
from mmdpo_trainers.stages.evaluate import accuracy_summary

KINDS = ("answer", "caption")


def _answers(share: float, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    return [
        {
            **{
                "id": f"{kind}-{index}",
                "format": "single",
                "group": f"{kind}/{('agree', 'disagree')[index % 2]}",
                "num_images": 1,
            },
            **{"images": ["../../pairs/images/one.png"], "prompt": "<image>\nWhat colour is the circle?", "answer": "red"},
            **{"response": "red" if (right := rng.random() < share) else "blue", "correct": right},
        }
        for kind in KINDS
        for index in range(40)
    ]


def _held_out(gap: float, seed: int) -> list[dict[str, Any]]:
    """Pairs that differ more among themselves than the arms do; the crop gap is `gap` less in answers, and may be below 0."""
    rng, own = random.Random(1), random.Random(seed)
    records = []
    for index in range(24):
        kind, chosen = KINDS[index % 2], -rng.uniform(4, 12)
        crop = chosen - gap * (index % 2) + rng.uniform(-1, 1) + own.gauss(0, 0.05)
        logps = {"chosen": chosen, "rejected": chosen + own.uniform(-3, 1), "crop": crop, "blank": chosen - 3 + own.gauss(0, 0.1)}
        records.append({"id": f"held_out-{index}", "kind": kind, "logps": logps})
    return records


def write_compared_run(folder: Path, *, alike: bool = False) -> Path:
    """A finished mDPO run with an arm. alike: training changed no answer."""
    picture(folder / "pairs" / "images" / "one.png", "red")
    pair = {"id": "p", "prompt": message("user", "<image>\nWhat colour is the circle?"), "images": ["images/one.png"]}
    sides = {"chosen": message("assistant", "red"), "rejected": message("assistant", "blue")}
    write_lines(folder / "pairs" / "pairs.jsonl", [{**pair, **sides}])
    base = _held_out(0.4, 2)
    places = {"evaluate/before": (0.5, 0.4, 2), "evaluate/after": (0.9, 1.4, 3), "arms/dpo/evaluate/after": (0.8, 0.9, 4)}
    for place, (share, gap, seed) in places.items():
        answers, records = _answers(0.5 if alike else share, 2 if alike else seed), _held_out(gap, seed)
        write_lines(folder / place / "answers.jsonl", answers)
        write_lines(folder / place / "held_out.jsonl", records)
        figures = held_out_figures(records, None if place == "evaluate/before" else base, beta=0.1)
        write_json(
            folder / place / "summary.json", {**accuracy_summary(answers), "held_out": figures, "beta": 0.1, "seconds": 2.0}
        )
    for arm in ("", "arms/dpo/"):
        lines = [{"step": s, "loss": 1 / s, "rewards/chosen": -s / 90, "rewards/chosen_answer": s / 50} for s in (5, 10, 15)]
        write_lines(folder / arm / "train" / "log.jsonl", lines)
    return folder
