"""Wrong answers by the model itself, from true ones: bias-driven hallucination sampling (BDHS, arXiv 2407.02477, section 3.4, algorithm 1).

A share of the image tokens is hidden (`hidden_images`). Each sentence of the truth is split at a random word, and the model goes on from the
truth up to there to the end of the sentence; the sentences put together are the hallucinated answer, which keeps the truth's style and
structure. While it says too much the same as the truth, mask and splits are drawn anew; the last try has no truth to follow.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from mmdpo_trainers.answers.similarity import Similarity
from mmdpo_trainers.answers.transformers_engine import generate_responses
from mmdpo_trainers.data.seeds import batch_seed
from mmdpo_trainers.data.sentences import Sentence, join_sentences, split_sentences, swap_yes_no, words_of
from mmdpo_trainers.models.encode import load_images
from mmdpo_trainers.models.loaded import LoadedModel


@dataclass(frozen=True)
class Hallucination:
    """What became of a true answer. similarity: to it. tries: how many it took. guided: whether it follows the truth's sentences.
    swapped: its sentences of which a leading yes or no was turned round."""

    response: str
    similarity: float
    tries: int
    guided: bool
    swapped: int


@dataclass(frozen=True)
class _Draft:
    """A sentence to be finished. before: the truth in front of it. kept: its own words so far."""

    before: str
    kept: str
    space: str
    swapped: bool

    @property
    def opening(self) -> str:
        return f"{self.before}{self.kept}".rstrip()


class HallucinationSampler:
    """BDHS with a model and the settings of a `HallucinateConfig`. Everything follows from `seed`, the records' ids and the batch."""

    def __init__(self, loaded: LoadedModel, options: Any, similarity: Similarity, seed: int) -> None:
        self.loaded, self.options, self.similarity, self.seed = loaded, options, similarity, seed

    def sample(self, number: int, records: Sequence[Mapping[str, Any]], truths: Sequence[str]) -> list[Hallucination]:
        """One of each record's true answer. number: of the batch. records: with `id`, `prompt` and `images`.

        The paper's order: similarity is that of whole answers; the last of several tries is taken whatever it says.
        """
        pictures = [load_images(record) for record in records]
        found: dict[int, Hallucination] = {}
        most = self.options.max_tries
        for tried in range(1, most + 1):
            left = [index for index in range(len(records)) if index not in found]
            guided = most == 1 or tried < most
            drafts = [self._drafts(records[index]["id"], truths[index], tried) if guided else None for index in left]
            responses = self._responses(number, tried, [records[i] for i in left], [pictures[i] for i in left], drafts)
            values = self.similarity([truths[index] for index in left], responses) if left else []
            for index, its_drafts, response, value in zip(left, drafts, responses, values, strict=True):
                if value < self.options.max_similarity or tried == most:
                    swapped = sum(draft.swapped for draft in its_drafts or ())
                    found[index] = Hallucination(response, float(value), tried, guided, swapped)
        return [found[index] for index in range(len(records))]

    def _drafts(self, name: str, truth: str, tried: int) -> list[_Draft]:
        """The truth's sentences, each up to a random word of it; a leading yes or no may be turned round, and is kept then."""
        draw = random.Random(batch_seed(self.seed, "hallucinate", "splits", name, tried))
        drafts = []
        before = ""
        for sentence in split_sentences(truth):
            other = swap_yes_no(sentence.text)
            swapped = other is not None and draw.random() < self.options.swap_yes_no
            text = other if swapped and other is not None else sentence.text
            places = [place for place, _ in words_of(text)]
            kept = draw.randrange(int(swapped), max(len(places), int(swapped) + 1))
            stop = places[kept] if kept < len(places) else len(text)
            drafts.append(_Draft(before, text[:stop].rstrip(), sentence.space, swapped))
            before += sentence.text + sentence.space
        return drafts

    def _responses(
        self,
        number: int,
        tried: int,
        records: Sequence[Mapping[str, Any]],
        pictures: Sequence[Sequence[Image.Image]],
        drafts: Sequence[list[_Draft] | None],
    ) -> list[str]:
        """Whole answers, drafts finished by the model; None: without a draft."""
        rows: list[tuple[int, _Draft | None]] = []
        for index, each in enumerate(drafts):
            rows += [(index, draft) for draft in each] if each is not None else [(index, None)]
        texts: list[str] = []
        for start in range(0, len(rows), self.options.batch_size):
            part = rows[start : start + self.options.batch_size]
            seed = batch_seed(self.seed, "hallucinate", "tokens", number, tried, start)
            texts += self._continued([(records[i], pictures[i], draft) for i, draft in part], tried, seed)
        found: list[list[Sentence]] = [[] for _ in records]
        for (index, draft), text in zip(rows, texts, strict=True):
            found[index].append(Sentence(text, "" if draft is None else draft.space))
        return [join_sentences(sentences) for sentences in found]

    def _continued(
        self, rows: Sequence[tuple[Mapping[str, Any], Sequence[Image.Image], _Draft | None]], tried: int, seed: int
    ) -> list[str]:
        """Per row the finished sentence, or a whole answer, by one forward's sampling."""
        options, texts = self.options, self.loaded.texts
        records = [record for record, _, _ in rows]
        drafts = [draft for _, _, draft in rows]
        openings = ["" if draft is None else draft.opening for draft in drafts]
        begun = [texts.answer(record["id"], "the answer", text) for record, text in zip(records, openings, strict=True)]

        def written(row: int, ids: Sequence[int]) -> str:
            draft = drafts[row]
            text = _behind(self.loaded.tokenizer, begun[row], ids)
            return text.strip() if draft is None or not draft.kept else draft.kept + text

        def finished(row: int, ids: list[int]) -> bool:
            draft = drafts[row]
            if draft is None:
                return False
            text = written(row, ids)
            return len(first_sentence(text, draft.kept)) < len(text.rstrip())

        answers = generate_responses(
            self.loaded,
            records,
            max_new_tokens=options.max_new_tokens,
            do_sample=options.do_sample,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=seed,
            pictures=[its_pictures for _, its_pictures, _ in rows],
            openings=openings,
            hidden=lambda row, count: self.hidden(records[row]["id"], tried, count),
            finished=finished,
        )
        whole = [written(row, answer["response_ids"]) for row, answer in enumerate(answers)]
        return [text if draft is None else first_sentence(text, draft.kept) for text, draft in zip(whole, drafts, strict=True)]

    def hidden(self, name: str, tried: int, count: int) -> np.ndarray:
        """(count,) bool, which of a record's image tokens a try hides: each with probability `hide` (equation 6), in all its sentences."""
        seed = batch_seed(self.seed, "hallucinate", "mask", name, tried)
        # RandomState, because NumPy keeps its streams as they are in every version.
        return np.random.RandomState(seed % 2**32).random_sample(count) < self.options.hide


def first_sentence(text: str, kept: str) -> str:
    """A text up to the end of the sentence that `kept`, its beginning, is in."""
    end = 0
    for sentence in split_sentences(text):
        stop = end + len(sentence.text)
        if stop >= len(kept) and sentence.text:
            return text[:stop]
        end = stop + len(sentence.space)
    return text.rstrip()


def _behind(tokenizer: Any, begun: Sequence[int], ids: Sequence[int]) -> str:
    """The text that `ids` add to an answer of the ids `begun`: tokens at a text's beginning may lose the space in front of them."""
    before, whole = (tokenizer.decode(list(each), skip_special_tokens=True) for each in (begun, [*begun, *ids]))
    text = whole[len(before) :] if whole.startswith(before) else tokenizer.decode(list(ids), skip_special_tokens=True)
    # Half of a character, where generation was cut.
    return str(text).rstrip("\ufffd")
