"""Words of an answer that name objects of a closed list: by spelling alone, without a tagger or a lemmatiser.

Published scorers singularise with WordNet or `pattern`. Here a word stands for a name where it is that name, or its plural by the rules of
`singulars`: as the list is closed, a wrong guess of a singular names nothing and does no harm.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

NONE = "no object"
"""What an answer that names none is said to name."""

_WORDS = re.compile(r"[^\W\d_]+(?:[-'\u2019][^\W\d_]+)*|\d+|[^\w\s]")
_PLURALS = {
    **{
        "children": "child",
        "men": "man",
        "women": "woman",
        "people": "person",
        "persons": "person",
        "mice": "mouse",
        "geese": "goose",
    },
    **{"feet": "foot", "teeth": "tooth", "oxen": "ox", "dice": "die", "policemen": "policeman", "servicemen": "serviceman"},
    **{"gentlemen": "gentleman", "snowmen": "snowman"},
}
_POSSESSIVE = ("'s", "\u2019s", "'", "\u2019")


def tokens(text: str) -> list[str]:
    """Words in lower case and signs, in order; a possessive's end is taken off ("the dog's tail": the, dog, tail)."""
    found = []
    for word in _WORDS.findall(text.casefold()):
        end = next((end for end in _POSSESSIVE if word.endswith(end) and len(word) > len(end)), "")
        found.append(word.removesuffix(end))
    return found


def singulars(word: str) -> Iterator[str]:
    """The word itself, then what it may be the plural of, likeliest first."""
    yield word
    if word in _PLURALS:
        yield _PLURALS[word]
    if not word.endswith("s") or word.endswith("ss") or len(word) < 4:
        return
    yield word[:-1]
    if word.endswith("ies"):
        yield f"{word[:-3]}y"
    if word.endswith("ves"):
        yield f"{word[:-3]}f"
        yield f"{word[:-3]}fe"
    if word.endswith("es"):
        yield word[:-2]


def named(word: str, names: Collection[str]) -> str | None:
    """The name that a word is, or is the plural of; None where it is none."""
    return next((form for form in singulars(word) if form in names), None)


def names_in(words: Sequence[str], names: Collection[str], longest: int) -> Iterator[tuple[int, str]]:
    """(place, name) of each name, from left to right, the longest first, none inside another: "hot dogs" is no dog.

    longest: words of the longest name. Only the last word of a name may be in the plural.
    """
    place = 0
    while place < len(words):
        for length in range(min(longest, len(words) - place), 0, -1):
            before = "".join(f"{word} " for word in words[place : place + length - 1])
            name = next((before + form for form in singulars(words[place + length - 1]) if before + form in names), None)
            if name is not None:
                yield place, name
                place += length
                break
        else:
            place += 1
