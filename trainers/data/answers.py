"""Comparing an answer with the truth: normalised text, words inside a sentence, and multiple-choice options."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_ARTICLES = re.compile(r"^(?:the|an|a)\s+")
_EDGES = " \t\n.,;:!?\"'`*()[]{}"
_BEFORE = re.compile(rf"(?:(?!\.\d)[{re.escape(_EDGES)}])+")
"""Punctuation at the start, up to a decimal point."""
_LETTER = re.compile(r"\(?([a-z])(?:[).:,]|$)", re.IGNORECASE | re.ASCII)
# What follows the letter tells "option a" from "the answer is a dog".
_ANNOUNCED = re.compile(r"\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*\(?\b([a-z])(?:[).:,;!?\n]|\s*$)", re.IGNORECASE | re.ASCII)


def normalize_answer(text: str) -> str:
    """Compatibility forms folded, letter case folded, spaces collapsed, punctuation at the ends and a leading article removed.

    Signs inside and decimal points stay: `3.5`, `.5`, `t-shirt` and `10:30` keep their meaning.
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(_EDGES)
    folded = folded[before.end() :] if (before := _BEFORE.match(folded)) else folded
    return _ARTICLES.sub("", folded) or folded


def answers_match(response: str, truth: str, *, options: Sequence[str] | None = None, match: str = "exact") -> bool:
    """Whether the response says what the truth says.

    match:
        exact: equal after `normalize_answer`; with options, also by the option's letter or text (`chosen_option`).
        contains: the truth's words occur in the response, whole and in order.
        choice: as exact, and with options also a response that names exactly one of them somewhere ("It is red.").
    """
    if match == "contains":
        words = re.escape(normalize_answer(truth))
        return bool(words) and re.search(rf"(?<!\w){words}(?!\w)", normalize_answer(response)) is not None
    if options:
        mentioned = match == "choice"
        said, true = chosen_option(response, options, mentioned=mentioned), chosen_option(truth, options)
        if true is not None:
            return said == true
    return normalize_answer(response) == normalize_answer(truth)


def chosen_option(text: str, options: Sequence[str], *, mentioned: bool = False) -> int | None:
    """Index of the option that an answer names, or None: its text, its letter (`B`, `(b)`, `B. red`, `the answer is B`).

    An option's text goes before a letter. mentioned: also an answer in which exactly one option's text occurs, whatever letter it
    announces.
    """
    said = normalize_answer(text)
    texts = [normalize_answer(option) for option in options]
    if said in texts:
        return texts.index(said)
    plain = unicodedata.normalize("NFKC", text).strip()
    if (letter := _LETTER.match(plain)) and _index(letter) < len(options):
        return _index(letter)
    if mentioned:
        found = [index for index, option in enumerate(texts) if option and re.search(rf"(?<!\w){re.escape(option)}(?!\w)", said)]
        if len(found) == 1:
            return found[0]
    if (letter := _ANNOUNCED.search(plain)) and _index(letter) < len(options):
        return _index(letter)
    return None


def say_option(index: int, options: Sequence[str], like: str) -> str:
    """Option `index` in the form in which `like` names its own: `B` -> `C`, `(b)` -> `(c)`, `B. red` -> `C. blue`, else the text.

    So that the form of an answer does not tell a drawn one from a true one.
    """
    true = chosen_option(like, options)
    letter = _LETTER.match(like) or _ANNOUNCED.search(like)
    if true is None or letter is None or index > ord("z") - ord("a") or normalize_answer(like) == normalize_answer(options[true]):
        return options[index]
    first = "A" if letter[1].isupper() else "a"
    rest = like[letter.end(1) :].replace(options[true], options[index], 1)
    return like[: letter.start(1)] + chr(ord(first) + index) + rest


def _index(letter: re.Match[str]) -> int:
    return ord(letter[1].lower()) - ord("a")
