"""How much two answers say the same: by an embedding of sentences, or by their words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from rapidfuzz.distance import Indel
from transformers import AutoModel, AutoTokenizer

from mmdpo_trainers.data.sentences import plain_words
from mmdpo_trainers.errors import StageError


class Similarity(Protocol):
    """Of each truth and its answer a number, 1 where they say the same."""

    def __call__(self, truths: Sequence[str], answers: Sequence[str]) -> list[float]: ...


def word_similarity(truths: Sequence[str], answers: Sequence[str]) -> list[float]:
    """1 minus the words to take out and to put in, as a share of both texts' words: rapidfuzz's normalised Indel similarity of the lists of
    words, whatever their case and punctuation. It lies in [0, 1], and sees no synonyms.
    """
    pairs = zip(truths, answers, strict=True)
    return [Indel.normalized_similarity(plain_words(truth), plain_words(answer)) for truth, answer in pairs]


class EmbeddingSimilarity:
    """Cosine of two sentence embeddings: last hidden states averaged over a text's tokens, as sentence-transformers' mean pooling has them.

    folder: a local model of texts, such as all-mpnet-base-v2, which BDHS was made with; a longer text than it takes is cut off.
    """

    def __init__(self, folder: Path, device: str | torch.device) -> None:
        try:
            self.tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            model: Any = AutoModel.from_pretrained(folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32)
            self.model = model.to(device).eval()
        except (OSError, ValueError, KeyError) as error:
            raise StageError(
                f"hallucinate.embedding: {folder} is no model of sentences: {' '.join(str(error).split())[:300]}; give the folder of one, "
                "with its tokenizer, or leave it out"
            ) from error
        text = self.model.config.get_text_config()
        # Models of RoBERTa's kind begin counting positions behind the padding's id.
        self.longest = min(self.tokenizer.model_max_length, int(getattr(text, "max_position_embeddings", 514)) - 2)

    @torch.no_grad()
    def __call__(self, truths: Sequence[str], answers: Sequence[str]) -> list[float]:
        first, second = self.embed(truths), self.embed(answers)
        return torch.nn.functional.cosine_similarity(first, second, dim=-1).tolist()  # type: ignore[no-any-return]

    @torch.no_grad()
    def embed(self, texts: Sequence[str]) -> torch.Tensor:
        """(N, H) float32."""
        inputs = self.tokenizer(list(texts), padding=True, truncation=True, max_length=self.longest, return_tensors="pt")
        inputs = inputs.to(self.model.device)
        states = self.model(**inputs).last_hidden_state
        weights = inputs["attention_mask"][..., None].to(states.dtype)
        return (states * weights).sum(1) / weights.sum(1).clamp(min=1)  # type: ignore[no-any-return]


def similarity_of(folder: str | None, device: str | torch.device) -> Similarity:
    """By the embedding model of a folder, or by words where there is none."""
    return word_similarity if folder is None else EmbeddingSimilarity(Path(folder), device)


def similarity_name(folder: str | None) -> str:
    """What summaries call it."""
    return "words in common (rapidfuzz)" if folder is None else f"cosine of {Path(folder).name}"
