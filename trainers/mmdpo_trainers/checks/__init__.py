"""Checks of a model on this library: exact where it says so, and refused with a reason where not. `mmdpo check` runs them.

They make their own prompts and pictures, need no data, and leave the model as it was. Each holds the library to transformers itself: the
unpatched model, its processor, its eager attention. Imported by cli; imports training, answers, models and data.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator

from mmdpo_trainers.checks.copies import softcapped
from mmdpo_trainers.checks.mass import check_mass
from mmdpo_trainers.checks.parity import check_generate, check_parity, check_unpatch
from mmdpo_trainers.checks.prompts import check_prompts
from mmdpo_trainers.checks.result import CheckResult, timed
from mmdpo_trainers.checks.segments import check_segments
from mmdpo_trainers.checks.training import check_gradients, check_heads, check_shared_vision, check_tree
from mmdpo_trainers.models.loaded import LoadedModel

__all__ = ["CHECKS", "CheckResult", "run_checks"]

CHECKS: dict[str, Callable[[LoadedModel], CheckResult]] = {
    "prompts": check_prompts,
    "parity": check_parity,
    "segments": check_segments,
    "mass": check_mass,
    "tree": check_tree,
    "gradients": check_gradients,
    "generate": check_generate,
    "shared vision": check_shared_vision,
    "heads": check_heads,
    "unpatch": check_unpatch,
}
"""By name, in the order in which they run."""


def run_checks(loaded: LoadedModel, only: Collection[str] = tuple(CHECKS)) -> Iterator[CheckResult]:
    """The results one by one, as they come. The model must not be patched, and is not afterwards."""
    for name, check in CHECKS.items():
        if name in only:
            with softcapped(loaded.model):
                found = timed(name, check, loaded)
            yield found
