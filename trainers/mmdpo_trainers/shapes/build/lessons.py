"""Forward passes and losses that train the base: packed answers, and where attention should go.

The pictures' patch features come from a frozen tower and are computed once, so a step costs the language model only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mmdpo_trainers.shapes.build.formats import TOKENS, Composed, Sample, TreeBatch, pack, pixel_values

LABEL_LAYER, LABEL_HEAD = 0, 0
TARGET_LAYERS = (1, 2)


@dataclass(frozen=True)
class AttentionLesson:
    """Which key each query should look at: the auxiliary loss that makes "Image k" findable within minutes.

    Without it, a model of this size still answers about a random picture after a thousand steps. The lesson has two parts,
    both negative log attention mass: in one head of layer 0, image tokens and response rows look at the last ``Image k``
    before them; in layers 1 and 2 (mean over heads), response rows look at the asked-about picture, relative to all
    pictures.
    """

    label_key: torch.Tensor  # (B, S) key index of the last picture label before a row; -1: the row has no lesson
    target_keys: torch.Tensor  # (R, S) bool: the R response rows' asked-about patches
    image_keys: torch.Tensor  # (R, S) bool: the patches of all pictures of the row's sample

    @classmethod
    def of(
        cls, batch: TreeBatch, samples: Sequence[Sample], pool: Sequence[Composed], label_ids: Sequence[int]
    ) -> AttentionLesson:
        """The lesson of a packed batch; ``label_ids`` are the tokens ``Image1``, ``Image2``, ..."""
        length = batch.input_ids.shape[1]
        is_label = torch.isin(batch.input_ids, torch.tensor(label_ids))
        last = torch.where(is_label, torch.arange(length), -1).cummax(1).values
        rows = batch.labels >= 0
        label_key = torch.where(rows | (batch.patch >= 0), last, -1)
        owner = torch.full_like(batch.patch, -1)
        for i, sample in enumerate(samples):
            owner[i, batch.patch[i] >= 0] = torch.from_numpy(sample.owners(pool))
        targets = torch.tensor([t.target for s in samples for t in s.turns])[batch.turn[rows]]
        sample_of_row = rows.nonzero()[:, 0]
        return cls(label_key, owner[sample_of_row] == targets[:, None], batch.patch[sample_of_row] >= 0)

    def loss(self, attentions: Sequence[torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        """Scalar; ``attentions`` are the layers' maps (B, H, S, S), ``rows`` (B, S) bool marks response rows."""
        total = torch.zeros(())
        sample, row = (self.label_key >= 0).nonzero(as_tuple=True)
        if len(sample):
            mass = attentions[LABEL_LAYER][sample, LABEL_HEAD, row, self.label_key[sample, row]]
            total = total - (mass + 1e-6).log().mean()
        for layer in TARGET_LAYERS:
            attention = attentions[layer].mean(1)[rows]
            target, images = ((attention * keys).sum(-1) + 1e-6 for keys in (self.target_keys, self.image_keys))
            total = total - (target / images).log().mean() / len(TARGET_LAYERS)
        return total


def answer_loss(
    model: LlavaForConditionalGeneration,
    batch: TreeBatch,
    features: torch.Tensor,
    lesson: AttentionLesson | None = None,
    weight: float = 0.0,
) -> torch.Tensor:
    """Mean cross-entropy of the response tokens, plus ``weight`` times the lesson, which needs eager attention."""
    rows = batch.labels >= 0
    hidden, attentions = _language_model(model, batch, features, output_attentions=lesson is not None)
    loss = F.cross_entropy(model.lm_head(hidden[rows]), batch.labels[rows])
    return loss if lesson is None else loss + weight * lesson.loss(attentions, rows)


def response_logits(model: LlavaForConditionalGeneration, batch: TreeBatch, features: torch.Tensor) -> torch.Tensor:
    """Logits (R, V) of the R rows of ``batch`` that predict a response token; ``features`` are pool features (P * patches, C)."""
    hidden, _ = _language_model(model, batch, features)
    return model.lm_head(hidden[batch.labels >= 0])


@torch.no_grad()
def accuracy(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, samples: Sequence[Sample], features: torch.Tensor
) -> float:
    """The fraction of questions answered exactly by greedy decoding: those whose every token is the model's first choice."""
    batch = pack(samples, [[t.answer for t in s.turns] for s in samples], processor)
    rows = batch.labels >= 0
    hit = response_logits(model, batch, features).argmax(-1) == batch.labels[rows]
    turn = batch.turn[rows]
    right = torch.ones(int(turn.max()) + 1, dtype=torch.bool)
    right[turn[~hit]] = False
    return right.float().mean().item()


def patch_features(model: LlavaForConditionalGeneration, pixels: torch.Tensor) -> torch.Tensor:
    """The tower's output for each patch: (B, patches, C)."""
    hidden = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return hidden[model.config.vision_feature_layer][:, 1:]


@torch.no_grad()
def encode(model: LlavaForConditionalGeneration, pool: Sequence[Composed]) -> torch.Tensor:
    """Patch features of a pool, flattened: (P * patches, C)."""
    pixels = pixel_values([item.picture for item in pool])
    return torch.cat([patch_features(model, part) for part in pixels.split(512)]).reshape(len(pool) * TOKENS, -1)


def _language_model(
    model: LlavaForConditionalGeneration, batch: TreeBatch, features: torch.Tensor, output_attentions: bool = False
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Last hidden states (B, S, H), and the layers' attention maps (B, heads, S, S) or an empty tuple."""
    embedded = model.get_input_embeddings()(batch.input_ids)
    at_patch = batch.patch >= 0
    embedded = embedded.masked_scatter(at_patch[..., None], model.model.multi_modal_projector(features[batch.patch[at_patch]]))
    output = model.model.language_model(
        inputs_embeds=embedded,
        attention_mask=batch.mask(),
        position_ids=batch.positions,
        use_cache=False,
        output_attentions=output_attentions,
    )
    return output.last_hidden_state, output.attentions or ()
