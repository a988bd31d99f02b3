"""The page's sections, each a function that makes its values and a template of the same name; None leaves it out.

A method names those of its page. They import what the rest of the folder offers; `page.py` alone imports them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..comparison import PageInputs
from ..tables import seconds_table
from .accuracy import accuracy, control_arms
from .benchmarks import benchmarks
from .comparison import comparison, seeds
from .examples import examples, pairs
from .hallucinated import hallucinated
from .heat_maps import heat_maps
from .judge import judge
from .layers import layers
from .ratings import ratings
from .reward_model import reward_accuracy, reward_margins
from .sampled import sampled
from .selection import ratios, selected_pairs, selection
from .training import main_training, rewards, training


def time(page: PageInputs) -> dict[str, Any]:
    """Wall seconds of each stage."""
    return {"seconds": seconds_table(page.run)}


Section = Callable[[PageInputs], dict[str, Any] | None]

SECTIONS: dict[str, Section] = {
    each.__name__: each
    for each in (
        accuracy,
        control_arms,
        heat_maps,
        layers,
        selection,
        judge,
        ratings,
        ratios,
        training,
        selected_pairs,
        comparison,
        seeds,
        rewards,
        hallucinated,
        examples,
        main_training,
        pairs,
        time,
        reward_accuracy,
        reward_margins,
        sampled,
        benchmarks,
    )
}
"""By name, which is its template's too."""

OF_EVERY_METHOD = ("benchmarks",)
"""Sections behind the first one of every page, where a run has something for them."""
