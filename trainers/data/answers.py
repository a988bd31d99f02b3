"""Comparing an answer with the truth: normalised text, words inside a sentence, and multiple-choice options."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_ARTICLES = re.compile(r"^(?:the|an|a)\s+")
_EDGES = " \t\n.,;:!?\"'`*()[]{}"
_LETTER = re.compile(r"\(?([a-z])(?:[).:,]|$)")
_ANNOUNCED = re.compile(r"\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*\(?([a-z])\)?(?=[).:,\s]|$)")


def normalize_answer(text: str) -> str:
    """Compatibility forms folded, letter case folded, spaces collapsed, punctuation at the ends and a leading article removed.

    Signs inside stay: `3.5`, `t-shirt` and `10:30` keep their meaning.
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split()).strip(_EDGES)
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

    An option's text goes before a letter. mentioned: also an answer in which exactly one option's text occurs.
    """
    said = normalize_answer(text)
    texts = [normalize_answer(option) for option in options]
    if said in texts:
        return texts.index(said)
    lowered = unicodedata.normalize("NFKC", text).casefold().strip()
    letter = _LETTER.match(lowered) or _ANNOUNCED.search(lowered)
    if letter and (index := ord(letter[1]) - ord("a")) < len(options):
        return index
    if mentioned:
        found = [index for index, option in enumerate(texts) if option and re.search(rf"(?<!\w){re.escape(option)}(?!\w)", said)]
        if len(found) == 1:
            return found[0]
    return None
