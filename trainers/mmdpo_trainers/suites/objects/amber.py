"""What an AMBER description names, of the objects that are there and of those that people would expect there.

Wang et al., arXiv 2311.07397; code https://github.com/junyangwang0410/AMBER. Two things differ from that code, both because it needs models
that do not come with the benchmark: nouns are found by spelling (`nouns_in`; there NLTK's tagger and lemmatiser), and a word that is
neither true nor associated with what is true is hallucinated (there also compared by spaCy's vectors, with 0.8 as near enough). Without
near-synonyms CHAIR and Hal can only be higher.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from mmdpo_trainers.suites.objects.words import NONE, singulars, tokens

_BEFORE_VERBS = frozenset(
    {
        *("to", "i", "you", "he", "she", "it", "we", "they", "who", "not", "n't"),
        *("can", "could", "may", "might", "must", "shall", "should", "will", "would"),
    }
)
_BEHIND_NOUNS = frozenset(
    {
        *(
            "of",
            "on",
            "in",
            "at",
            "by",
            "near",
            "next",
            "with",
            "to",
            "behind",
            "beside",
            "under",
            "above",
            "inside",
            "for",
            "from",
        ),
        *("and", "or", "is", "are", "was", "were", "has", "that", "which", "can", "sits", "stands", "lies"),
    }
)
_ADJECTIVES = frozenset({"hot"})
"""A word of AMBER's lists that is an adjective wherever it stands."""

DESCRIPTIONS = "descriptions"
_DIMENSIONS = {
    "generative": DESCRIPTIONS,
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
}
"""AMBER's type of a question -> its group here; every other type is `relation`."""


def dimension(kind: str) -> str:
    """The group of questions that AMBER's type of a question belongs to."""
    return _DIMENSIONS.get(kind, "relation")


@dataclass(frozen=True)
class Association:
    """AMBER's `relation.json` and `safe_words.txt`."""

    relation: Mapping[str, Sequence[str]]
    """Object -> words that stand for it or come with it."""
    safe: frozenset[str]
    """Words that are counted and never hallucinated."""

    @classmethod
    def of(cls, relation: Mapping[str, Sequence[str]], safe: Collection[str]) -> Association:
        """From what the two files hold."""
        return cls(relation, frozenset(safe))

    @functools.cached_property
    def vocabulary(self) -> frozenset[str]:
        """All words that are counted at all."""
        return frozenset({*self.relation, *(word for words in self.relation.values() for word in words)})

    def owners(self, objects: Sequence[str]) -> dict[str, int]:
        """Word -> place of the object that it stands for: words that come with one before the objects' own, the first object first."""
        found: dict[str, int] = {}
        for place, name in enumerate(objects):
            for word in self.relation.get(name, ()):
                found.setdefault(word, place)
        for place, name in enumerate(objects):
            found.setdefault(name, place)
        return found


def nouns_in(text: str, vocabulary: Collection[str]) -> list[str]:
    """Words of a text, or their singulars, that are in the vocabulary and stand as nouns, in order, with repetitions.

    No tagger: a word behind `to`, a pronoun, a modal verb or `not` is a verb ("they watch"); `can` is a noun in the plural and before a
    preposition, a conjunction, another verb or a sign ("a can of soda"); "hot" never is one.
    """
    words = tokens(text)
    found = []
    for place, word in enumerate(words):
        name = next((form for form in singulars(word) if form in vocabulary), None)
        if name is not None and _is_noun(words, place):
            found.append(name)
    return found


def _is_noun(words: Sequence[str], place: int) -> bool:
    word = words[place]
    if word in _ADJECTIVES:
        return False
    if word == "can":
        behind = words[place + 1] if place + 1 < len(words) else "."
        return behind in _BEHIND_NOUNS or not behind.isalnum()
    return place == 0 or words[place - 1] not in _BEFORE_VERBS


@dataclass(frozen=True)
class Description:
    """What a description names."""

    nouns: Sequence[str]
    wrong: Sequence[str]
    """The nouns that are neither true, nor come with what is true, nor safe."""
    covered: int
    """True objects that it names."""
    cognitive: int
    """Imagined objects that it names."""

    @property
    def said(self) -> str:
        """For readers: the nouns, those that are not there marked."""
        return ", ".join(f"{noun} (not there)" if noun in self.wrong else noun for noun in dict.fromkeys(self.nouns)) or NONE


def described(text: str, truth: Sequence[str], imagined: Sequence[str], association: Association) -> Description:
    """What a description names.

    truth: the objects in the picture. imagined: objects that people would expect there and that are not (AMBER's `hallu`).
    CHAIR is the share of wrong nouns, Cover of covered objects, Cog of imagined objects that are named, as the released code counts it;
    each over all descriptions. Hal is the share of descriptions with a wrong noun.
    """
    nouns = nouns_in(text, association.vocabulary)
    true, not_there = association.owners(truth), association.owners(imagined)
    counted = [noun for noun in nouns if noun not in association.safe]
    wrong = [noun for noun in counted if noun not in true]
    return Description(
        nouns=nouns,
        wrong=wrong,
        covered=len({true[noun] for noun in counted if noun in true}),
        cognitive=len({not_there[noun] for noun in wrong if noun in not_there}),
    )
