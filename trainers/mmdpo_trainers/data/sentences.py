"""Sentences of a text and the words of a sentence, by rules: no language is asked for, and no model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

_CLOSING = "\"'\u2019\u201d\u00bb)\\]\u300d\u300f\uff09"
# Full stops that need no space behind them: Chinese and Japanese, Indic, Arabic, Armenian, Ethiopic.
_OWN_STOPS = "\u3002\uff01\uff1f\uff61\u0964\u0965\u061f\u06d4\u0589\u1362"
_END = re.compile(rf"[{_OWN_STOPS}]+[{_CLOSING}]*|[.!?\u2026]+[{_CLOSING}]*(?=\s|$)|(?=\s*\n)")
_TITLES = frozenset(
    (
        *(
            "mr",
            "mrs",
            "ms",
            "dr",
            "prof",
            "st",
            "mt",
            "messrs",
            "rev",
            "gen",
            "col",
            "sgt",
            "capt",
            "lt",
            "fig",
            "figs",
            "eq",
            "vs",
            "cf",
        ),
        *("e.g", "i.e", "approx", "ca", "al", "dept", "est", "vol", "pp", "nos"),
    )
)
"""Abbreviations that something always follows."""
_BEFORE_NUMBERS = frozenset({"no", "p", "ch", "sec", "art", "nr"})
_MAY_END = frozenset(("etc", "inc", "co", "corp", "ltd", "jr", "sr", "u.s", "u.k", "a.m", "p.m", "ph.d"))
"""Abbreviations that may end a sentence; one goes on where a small letter follows."""
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\s{_CJK}]+")


@dataclass(frozen=True)
class Sentence:
    """A sentence without the space around it, and the space behind it."""

    text: str
    space: str


def split_sentences(text: str) -> list[Sentence]:
    """The sentences of a text without space in front: joined with their `space` they are the text again.

    A sentence ends at `.`, `!`, `?` or `…` before a space, at the full stops of scripts that set none behind, and at a line break. A
    point ends none behind an abbreviation ("Dr. Lee", "No. 5", "etc. and"), an initial ("J. Smith") or the number of a list's line
    ("1. Slow down"), nor dots before a small letter ("and ... so"). A decimal point has no space behind it.
    """
    found: list[Sentence] = []
    start = 0
    for match in _END.finditer(text):
        stop = match.end()
        if stop <= start or not text[start:stop].strip() or _goes_on(text[start : match.start()], match.group(), text[stop:]):
            continue
        space = re.match(r"\s*", text[stop:])
        assert space is not None
        found.append(Sentence(text[start:stop], space.group()))
        start = stop + space.end()
    rest = text[start:]
    if rest:
        bare = rest.rstrip()
        found.append(Sentence(bare, rest[len(bare) :]))
    return found


def _goes_on(before: str, mark: str, behind: str) -> bool:
    """Whether a mark that may end the sentence `before` does not."""
    after = behind.lstrip()
    if mark.strip("." + _CLOSING) or not mark.startswith("."):
        return False
    if len(mark.rstrip(_CLOSING)) > 1:
        return after[:1].islower()
    word = before.split()[-1].lstrip("(\"'\u201c\u2018[") if before.split() else ""
    name = word.casefold()
    if name in _TITLES or (len(word) == 1 and word.isupper() and word != "I"):
        return bool(after)
    if name in _BEFORE_NUMBERS and after[:1].isdigit():
        return True
    if word.isdigit() and before.strip() == word:
        return bool(after)
    return name in _MAY_END and after[:1].islower()


def words_of(text: str) -> list[tuple[int, str]]:
    """(place, word) of the words of a text: runs without space, and single characters of Chinese and Japanese."""
    return [(match.start(), match.group()) for match in _WORD.finditer(text)]


def plain_words(text: str) -> list[str]:
    """The words of a text for comparing: small letters, no punctuation around them, none that are punctuation alone."""
    stripped = (re.sub(r"^\W+|\W+$", "", word.casefold()) for _, word in words_of(text))
    return [word for word in stripped if word]


def swap_yes_no(sentence: str) -> str | None:
    """The sentence with a leading yes made no and the other way round, in its case; None where it begins with neither."""
    match = re.match(r"(\s*)(yes|no)\b", sentence, re.IGNORECASE)
    if match is None:
        return None
    word, other = match[2], "no" if match[2].casefold() == "yes" else "yes"
    cased = other.upper() if word.isupper() else other.capitalize() if word[0].isupper() else other
    return f"{match[1]}{cased}{sentence[match.end() :]}"


def join_sentences(sentences: Sequence[Sentence]) -> str:
    """Their text; one that is empty leaves no space behind."""
    return "".join(each.text + each.space for each in sentences if each.text).rstrip()
