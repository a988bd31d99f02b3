"""mDPO as its authors' trainer computes it (github.com/luka-group/mDPO, `mdpo_trainer.py`), on transformers' own model.

Chosen and rejected responses are padded and run as one batch of twice as many sequences, the chosen ones with the corrupted picture
as another, the policy first and the reference (adapter off) after it: three forwards a record and model, each with pictures of its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer

Sequences = dict[str, Tensor]


class OfficialCollator:
    """Records to `pair` (chosen, then rejected) and `corrupted`, each (n, L) padded on the right with pictures for every sequence."""

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, Sequences]:
        true, corrupted = self._pixels(records, "images"), self._pixels(records, "rejected_images")
        prompts = [self._prompt(record) for record in records]
        chosen, rejected = ([self._response(record, name) for record in records] for name in ("chosen", "rejected"))
        return {
            "pair": {**self._padded(prompts * 2, chosen + rejected), "pixel_values": torch.cat([true, true])},
            "corrupted": {**self._padded(prompts, chosen), "pixel_values": corrupted},
        }

    def _pixels(self, records: Sequence[Mapping[str, Any]], column: str) -> Tensor:
        pictures = [picture for record in records for picture in record[column]]
        return self.processor.image_processor(pictures, return_tensors="pt")["pixel_values"]

    def _prompt(self, record: Mapping[str, Any]) -> list[int]:
        text = self.processor.apply_chat_template(record["prompt"], add_generation_prompt=True)
        return self.processor(text=text, images=record["images"], add_special_tokens=False)["input_ids"][0]

    def _response(self, record: Mapping[str, Any], column: str) -> list[int]:
        tokenizer = self.processor.tokenizer
        return [*tokenizer(record[column][0]["content"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    @staticmethod
    def _padded(prompts: list[list[int]], responses: list[list[int]]) -> Sequences:
        whole = [torch.tensor(prompt + response) for prompt, response in zip(prompts, responses, strict=True)]
        labels = [torch.tensor([-100] * len(prompt) + response) for prompt, response in zip(prompts, responses, strict=True)]
        return {
            "input_ids": pad_sequence(whole, batch_first=True),
            "attention_mask": pad_sequence([torch.ones_like(ids) for ids in whole], batch_first=True),
            "labels": pad_sequence(labels, batch_first=True, padding_value=-100),
        }


class OfficialTrainer(Trainer):
    """A PEFT model trained with mDPO's three terms. `rows_only`: logits of response rows only, in place of all in float32."""

    def __init__(self, *args: Any, rows_only: bool, beta: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.rows_only, self.beta = rows_only, beta

    def compute_loss(
        self, model: Any, inputs: dict[str, Sequences], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        chosen, rejected, corrupted = self._all_logps(model, inputs)
        with torch.no_grad(), model.disable_adapter():
            reference_chosen, reference_rejected, reference_corrupted = self._all_logps(model, inputs)
        chosen, rejected, corrupted = chosen - reference_chosen, rejected - reference_rejected, corrupted - reference_corrupted
        margins = chosen - rejected, chosen - corrupted, chosen
        loss = -sum(logsigmoid(self.beta * margin) for margin in margins).mean()  # type: ignore[union-attr]
        return (loss, {}) if return_outputs else loss

    def _all_logps(self, model: Any, inputs: dict[str, Sequences]) -> tuple[Tensor, Tensor, Tensor]:
        pair = self._logps(model, **inputs["pair"])
        corrupted = self._logps(model, **inputs["corrupted"])
        return pair[: len(corrupted)], pair[len(corrupted) :], corrupted

    def _logps(self, model: Any, labels: Tensor, **inputs: Tensor) -> Tensor:
        """(n,) summed over response tokens."""
        used, targets = labels[:, 1:] != -100, labels[:, 1:].clamp(min=0)
        if not self.rows_only:
            logits = model(**inputs, use_cache=False).logits.float()[:, :-1]
            return (logits.log_softmax(-1).gather(2, targets[..., None])[..., 0] * used).sum(1)
        base = model.get_base_model()
        hidden = base.base_model(**inputs, use_cache=False).last_hidden_state[:, :-1][used]
        logps = base.lm_head(hidden).float().log_softmax(-1).gather(1, targets[used][:, None])[:, 0]
        return torch.zeros_like(used, dtype=logps.dtype).masked_scatter(used, logps).sum(1)
