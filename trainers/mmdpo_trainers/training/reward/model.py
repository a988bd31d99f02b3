"""A reward model that is loaded, and the rewards that it gives to answers."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors import SafetensorError

from mmdpo_kernels import patch_model
from mmdpo_trainers.data.conversation import TEMPLATE_COLUMNS
from mmdpo_trainers.data.pair_records import IMAGES, PAIR, Branch
from mmdpo_trainers.errors import DataError, StageError
from mmdpo_trainers.models import quantized
from mmdpo_trainers.models.families import tree_refusal
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import check_folder, load_model
from mmdpo_trainers.models.template_date import TemplateDate
from mmdpo_trainers.training import model_parts
from mmdpo_trainers.training.batches.collator import PreferenceCollator, model_collator
from mmdpo_trainers.training.reward import score_head
from mmdpo_trainers.training.reward.inputs import FACTS, RewardInputs

EMPTY = "an empty answer has no text to reward"
"""Why an answer has no reward."""


class RewardModel:
    """Rewards of any number of answers to a prompt: prompt and pictures are run once, in one token tree for all records that come together.

    Args:
        loaded: a model with a head, trained (a PeftModel) or not; it is patched.
        inputs: what it reads.
    """

    def __init__(self, loaded: LoadedModel, inputs: RewardInputs) -> None:
        patch_model(loaded.model)
        self.loaded, self.inputs = loaded, inputs
        self._collator = functools.lru_cache(maxsize=None)(self._made_collator)

    @classmethod
    def load(
        cls,
        folder: str | Path,
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        date: TemplateDate | None = None,
    ) -> RewardModel:
        """What `RewardTrainer` saved: its adapter and head on the model that they were trained on, which `adapter_config.json` names.

        Head and adapter are those of the training bit for bit; the adapter is not merged, and the model is in 4 bits where it was in
        training. Raises StageError naming what is missing.
        """
        folder = Path(folder)
        inputs = RewardInputs.read(folder)
        try:
            base = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        except (OSError, KeyError, ValueError) as error:
            raise StageError(f"reward model {folder}: adapter_config.json cannot be read ({error}); restore it") from error
        if not base or not Path(base).is_dir():
            raise StageError(
                f"reward model {folder}: the model that it was trained on, {base}, is not a folder here; put it there, or write its folder "
                "into base_model_name_or_path of adapter_config.json"
            )
        in_4_bits = quantized.method_of(check_folder(Path(base))) is not None
        how = None if in_4_bits else quantized.read_settings(folder)
        loaded = load_model(base, dtype=dtype, device=device, date=date, quantization=how)
        score_head.add_head(loaded.model, seed=0)
        try:
            model = PeftModel.from_pretrained(loaded.model, str(folder), is_trainable=False, local_files_only=True)
        except (OSError, RuntimeError, ValueError, KeyError, SafetensorError) as error:
            raise StageError(f"reward model {folder} does not fit {base} ({error}); it was trained on another model") from error
        found = LoadedModel(model=model.eval(), processor=loaded.processor, path=loaded.path, adapter=folder, date=loaded.date)
        return cls(found, inputs)

    @classmethod
    def untrained(cls, loaded: LoadedModel, inputs: RewardInputs, *, seed: int) -> RewardModel:
        """A model with the head that a training with this seed starts from."""
        score_head.add_head(loaded.model, seed)
        return cls(loaded, inputs)

    def problem(self, record: Mapping[str, Any], answer: str) -> str | None:
        """Why an answer to a record can have no reward; None: it can have one. Of its pictures only the sizes are read."""
        if not answer.strip():
            return EMPTY
        try:
            self._collator(2).length(_record(record, [answer, answer], self.inputs))
        except DataError as error:
            return str(error)
        return None

    @torch.no_grad()
    def rewards(self, records: Sequence[Mapping[str, Any]], answers: Sequence[Sequence[str]]) -> list[list[float]]:
        """The reward of each answer to each record, float64 of the head's float32.

        records: with `id`, `prompt`, `images`, and the facts that the model reads. answers: at least one a record, one of them not empty.
        Raises DataError naming the record that cannot be used.
        """
        if not records:
            return []
        distinct = [sorted(dict.fromkeys(texts), key=lambda text: not text.strip()) for texts in answers]
        # A record with fewer answers has its last one again, which a tree holds once.
        count = max(2, max(map(len, distinct)))
        filled = [[*texts, *texts[-1:] * (count - len(texts))] for texts in distinct]
        made = [_record(record, texts, self.inputs) for record, texts in zip(records, filled, strict=True)]
        model = self.loaded.model
        batch = self._collator(count).batch(made).to(self.loaded.device)
        hidden = model_parts.hidden_states(model, batch, model_parts.image_features(model, batch))
        found = score_head.scores(model, hidden, batch).double().tolist()
        known = [dict(zip(texts, row, strict=False)) for texts, row in zip(distinct, found, strict=True)]
        return [[rewards[text] for text in texts] for rewards, texts in zip(known, answers, strict=True)]

    def _made_collator(self, count: int) -> PreferenceCollator:
        """Of records with so many answers."""
        names = _columns(count)
        base = model_parts.base_of(self.loaded.model)
        return model_collator(
            base,
            self.loaded.processor,
            tree_packing=tree_refusal(base) is None,
            branches={name: PAIR.get(name, Branch(IMAGES, name)) for name in names},
            no_image=self.inputs.no_image,
            date=self.loaded.date,
            prompt_of=self.inputs.prompt_of,
        )


def _columns(count: int) -> list[str]:
    return [*PAIR, *(f"answer_{number}" for number in range(len(PAIR), count))]


def _record(record: Mapping[str, Any], answers: Sequence[str], inputs: RewardInputs) -> dict[str, Any]:
    """A preference record of a record's prompt, pictures and facts, and these answers."""
    facts = (each for each in FACTS if each in inputs.facts)
    own = {name: record.get(name) for name in ("id", "prompt", "images", *TEMPLATE_COLUMNS, *facts)}
    return {**own, **dict(zip(_columns(len(answers)), answers, strict=True))}
