"""What the answers were rated, what that cost, and how good the rater is where the better answer is known."""

from __future__ import annotations

from typing import Any

from mmdpo_trainers.answers.raters.quality import WORDS

from ..comparison import PageInputs
from ..contents import Record
from ..intervals import Proportion
from ..tables import Table


def judge(page: PageInputs) -> dict[str, Any] | None:
    """Mean ratings, costs, and the check's figures with intervals; None in a run without ratings."""
    rate = page.run.summaries.get("rate")
    if rate is None:
        return None
    return {"source": rate["source"], "ratings": _ratings(rate), "check": _quality(rate["check"]) if rate["check"] else None}


def _ratings(rate: Record) -> Table:
    low, high = rate["scale"]
    rows = [["Answers", f"{rate['answers']:,}"]]
    rows += [[f"Mean {name}", f"{value:.2f}"] for name, value in rate["mean"].items()]
    rows += [[f"Not rated: {reason.replace('_', ' ')}", f"{count:,}"] for reason, count in rate["unrated"].items()]
    rows += [[name.replace("_", " ").capitalize(), f"{count:,}"] for name, count in rate["costs"].items()]
    return Table(caption=f"Ratings from {low:g} to {high:g}, and what they took.", head=["", "Number"], rows=rows)


def _quality(check: Record) -> Table:
    of = "of the user's own, held out" if check["of"] == "check_pairs" else "of a true answer and a wrong one"
    rows: list[list[str | Proportion | None]] = [
        [words.capitalize(), Proportion(share["correct"], share["total"]), f"{share['total']:,}"]
        for name, words in WORDS.items()
        if (share := check.get(name))
    ]
    return Table(
        caption=f"The rater on {check['pairs']:,} pairs {of}, with 95 % Wilson intervals.", head=["", "Share", "Of"], rows=rows
    )
