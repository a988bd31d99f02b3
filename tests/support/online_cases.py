"""Online trainings of tiny models, with a rater that needs no model."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from training_cases import config, preference_records, tiny, warm_adapter

from mmdpo_trainers.answers.raters import Rating
from mmdpo_trainers.config.sections.online import OnlineConfig
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.training.online.pairs import OnlinePairs
from mmdpo_trainers.training.trainer import PreferenceTrainer


class HashRater:
    """A rating from 0 to `levels` - 1 that follows from record and text; few levels make ties."""

    attributes = ("overall",)

    def __init__(self, levels: int = 1000) -> None:
        self.levels = levels
        self.asked: list[tuple[str, list[str]]] = []

    def rate(self, records: Sequence[Mapping[str, Any]], responses: Sequence[Sequence[str]]) -> list[list[Rating]]:
        self.asked += [(record["id"], list(texts)) for record, texts in zip(records, responses, strict=True)]
        return [[self._rating(record, text) for text in texts] for record, texts in zip(records, responses, strict=True)]

    def _rating(self, record: Mapping[str, Any], text: str) -> Rating:
        digest = hashlib.sha256(f"{record['id']}|{text}".encode()).digest()
        return Rating({"overall": float(int.from_bytes(digest[:4], "big") % self.levels)})

    def costs(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


def online(rater: Any = None, **options: Any) -> OnlinePairs:
    """Enough answers of enough tokens that a model without training ends some of them."""
    return OnlinePairs(
        OnlineConfig(**{"alpha": 1.0, "samples": 4, "max_new_tokens": 24, "batch_size": 3, **options}), rater or HashRater()
    )


def train(
    folder: Path,
    output: Path,
    records: list[Any],
    pairs: OnlinePairs | None,
    *,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> PreferenceTrainer:
    """A trainer after `train`; its adapter starts off its zero, as policy and reference would agree."""
    loaded = tiny(folder, dtype)
    callbacks = options.pop("callbacks", [])
    settings = config(output, **{"train_sampling_strategy": "sequential", **options})
    trainer = PreferenceTrainer(
        loaded.model, settings, processing_class=loaded.processor, train_dataset=records, online=pairs, callbacks=callbacks
    )
    warm_adapter(trainer)
    trainer.train()
    return trainer


def weights(trainer: PreferenceTrainer) -> dict[str, torch.Tensor]:
    model: Any = trainer.model
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def kept_lines(output: Path) -> list[dict[str, Any]]:
    return list(read_jsonl(output / "online.jsonl"))


def as_trained(records: list[Any], lines: list[dict[str, Any]], column: str | None = None) -> list[Any]:
    """The records as `online.jsonl` says that they were trained on."""
    by_name = {record["id"]: record for record in records}
    found = []
    for line in lines:
        record = dict(by_name[line["record"]])
        if line["trained"] == "sampled":
            record[column or "rejected"] = line["answers"][line["rejected"]]
            if column is None:
                record["chosen"] = line["answers"][line["chosen"]]
        elif column is not None:
            record[column] = record["rejected"]
        if line["trained"] != "skipped":
            found.append({**record, "id": line["id"]})
    return found


__all__ = ["HashRater", "as_trained", "kept_lines", "online", "preference_records", "train", "weights"]
