"""Log-probabilities of held-out pairs under one model: with the true picture, and with corrupted ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmdpo_trainers.data.corruption import Corruption
from mmdpo_trainers.data.pair_records import BRANCHES, PAIR
from mmdpo_trainers.methods.held_out import CORRUPTIONS
from mmdpo_trainers.models.families import tree_refusal
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.training.batches.collator import model_collator
from mmdpo_trainers.training.head import batch_logps


def pair_logps(loaded: LoadedModel, records: Sequence[Mapping[str, Any]], *, seed: int) -> list[dict[str, float]]:
    """Per record the log-probabilities of its responses: `chosen`, `rejected`, and of the chosen one for each of `CORRUPTIONS`.

    The corruptions follow from `seed` and the records' content, not from the model. The model must be patched.
    """
    # A record's own corrupted pictures would stand in for every corruption.
    plain = [{name: value for name, value in record.items() if name != "rejected_images"} for record in records]
    found: list[dict[str, float]] = [{} for _ in records]
    for kind in CORRUPTIONS:
        collator = model_collator(
            loaded.model,
            loaded.processor,
            tree_packing=tree_refusal(loaded.model) is None,
            branches=BRANCHES,
            corruption=Corruption(kind=kind, seed=seed),
            date=loaded.date,
        )
        batch = collator.batch(plain).to(loaded.device)
        for logps, row in zip(found, batch_logps(loaded.model, batch).tolist(), strict=True):
            by_name = dict(zip(batch.branches, row, strict=True))
            logps.update({**{name: by_name[name] for name in PAIR}, kind: by_name["corrupted"]})
    return found
