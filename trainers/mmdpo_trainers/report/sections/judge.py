"""What the answers were rated, what that cost, and how good the rater is where the better answer is known."""

from __future__ import annotations

from typing import Any

from mmdpo_trainers.answers.raters.quality import WORDS

from ..comparison import PageInputs
from ..contents import Record
from ..intervals import Proportion
from ..numbers import number
from ..tables import Table, TableCell, reason_words, share


def judge(page: PageInputs) -> dict[str, Any] | None:
    """Mean ratings, costs, and the check's figures with intervals; None in a run without ratings."""
    rate = page.run.summaries.get("rate")
    if rate is None:
        return None
    return {"source": rate["source"], "ratings": _ratings(rate), "check": _quality(rate["check"]) if rate["check"] else None}


def _ratings(rate: Record) -> Table:
    scale = "" if rate["scale"] is None else " from {} to {}".format(*(number(end, "g") for end in rate["scale"]))
    rows = [["Answers", f"{rate['answers']:,}"]]
    rows += [[f"Mean {name}", number(value, ".2f")] for name, value in rate["mean"].items()]
    rows += [[f"Not rated: {reason_words(reason)}", f"{count:,}"] for reason, count in rate["unrated"].items()]
    rows += [[name.replace("_", " ").capitalize(), f"{count:,}"] for name, count in rate["costs"].items()]
    return Table(caption=f"Ratings{scale}, and what they took.", head=["What", "Number"], rows=rows)


def _quality(check: Record) -> Table:
    of = "of the user's own, held out" if check["of"] == "check_pairs" else "of a true answer and a wrong one"
    rows: list[list[TableCell]] = [
        [words.capitalize(), share(Proportion(found["correct"], found["total"])), f"{found['total']:,}"]
        for name, words in WORDS.items()
        if (found := check.get(name))
    ]
    return Table(
        caption=f"The rater on {check['pairs']:,} pairs {of}, with 95 % Wilson intervals.",
        head=["What", "Share", "Of"],
        rows=rows,
    )
