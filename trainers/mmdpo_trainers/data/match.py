"""Comparing an answer with the truth: normalised text, words inside a sentence, and multiple-choice options."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

from mmdpo_trainers.config.options import Match

_ARTICLES = re.compile(r"^(?:the|an|a)\s+")
_EDGES = " \t\n.,;:!?\"'`*()[]{}"
_BEFORE = re.compile(rf"(?:(?!\.\d)[{re.escape(_EDGES)}])+")
"""Punctuation at the start, up to a decimal point."""
_LETTER = re.compile(r"\(?([a-z])(?:[).:,]|$)", re.IGNORECASE | re.ASCII)
# What follows the letter tells "option a" from "the answer is a dog".
_ANNOUNCED = re.compile(r"\b(?:answer|option|choice)(?:\s+is)?\s*:?\s*\(?\b([a-z])(?:[).:,;!?\n]|\s*$)", re.IGNORECASE | re.ASCII)

_NEGATION = r"(?:not|no|never|neither|nor|without|cannot|\w+n['\u2019]t)"
# "Not only", "not just" and "no doubt" affirm; a mark or a "but" ends what is negated.
_NEGATED = re.compile(rf"\b{_NEGATION}\s+(?!only\b|just\b|doubt\b)(?:(?!but\b|and\b|yet\b)[\w'\u2019-]+\s+){{0,2}}$")
_NO = re.compile(rf"\b(?:{_NEGATION}|none|nothing|nobody|nope)(?!\w)")
_NUMBER_WORDS = (
    *("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen", "twenty"),
)
# "One" is a number at the start or behind "is", "only" and the like; in "the red one" it is none.
_NUMBER_WORD = re.compile(
    rf"\b(?:{'|'.join(word for word in _NUMBER_WORDS if word != 'one')})\b(?!-)"
    r"|(?:^|(?<=\bis )|(?<=\bonly )|(?<=\bjust )|(?<=\bexactly ))one\b(?!-)"
)


def normalize_answer(text: str) -> str:
    """Compatibility forms folded, letter case folded, spaces collapsed, punctuation at the ends and a leading article removed.

    Signs inside and decimal points stay: `3.5`, `.5`, `t-shirt` and `10:30` keep their meaning.
    """
    folded = " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(_EDGES)
    folded = folded[before.end() :] if (before := _BEFORE.match(folded)) else folded
    return _ARTICLES.sub("", folded) or folded


def answers_match(response: str, truth: str, *, options: Sequence[str] | None = None, match: Match = "exact") -> bool:
    """Whether the response says what the truth says; no where that cannot be told. See `is_right`."""
    return is_right(response, truth, options=options, match=match) is True


def is_right(response: str, truth: str, *, options: Sequence[str] | None = None, match: Match = "exact") -> bool | None:
    """Whether the response says what the truth says; None where that cannot be told from the two texts.

    match:
        exact: equal after `normalize_answer`; with options, also by the option's letter or text (`chosen_option`).
        choice: as exact, and with options also a response that names exactly one of them somewhere ("It is red."). None: it names several.
        contains: with options as choice; without, the truth's words occur in the response, whole and in order, and not behind a negation
            ("not a cat"). Number words count as numbers ("two", 2). A truth of yes or no is compared with what the response opens with,
            or else with its only yes or no, in any words ("There is no dog.", "It isn't."). None: neither yes nor no is said, or the
            response is a part of the truth ("on the mat" for "The cat is on the mat").

    Paraphrases are not seen through: "a feline" is not "a cat".
    """
    if options and (true := chosen_option(truth, options)) is not None:
        return _is_option(response, options, true, match)
    said, true_words = normalize_answer(response), normalize_answer(truth)
    if said == true_words or match != "contains":
        return said == true_words
    if not said or not true_words:
        return False
    if true_words in ("yes", "no"):
        verdict = _yes_or_no(said)
        return None if verdict is None else verdict == true_words
    said, true_words = _numbers(said), _numbers(true_words)
    return True if _occurs(true_words, said) else None if _occurs(said, true_words) else False


def _is_option(response: str, options: Sequence[str], true: int, match: Match) -> bool | None:
    said = chosen_option(response, options, mentioned=match != "exact")
    if said is None and match != "exact" and len(_mentioned(normalize_answer(response), options)) > 1:
        return None
    return said == true


def _occurs(words: str, text: str) -> bool:
    """Whether words stand in a text, whole, and somewhere without a negation before them. A number is not a part of another (2 and 2.5)."""
    number = r"(?<![-\d.,:])" if words[0].isdigit() else ""
    places = re.finditer(rf"(?<!\w){number}{re.escape(words)}(?!\w)(?![.,:]\d)", text)
    return any(_NEGATED.search(text[: place.start()]) is None for place in places)


def _yes_or_no(said: str) -> str | None:
    """What an answer to a yes-or-no question says: by the word it opens with, or by the only one it has."""
    if opening := re.match(r"(yes|no)\b", said):
        return opening[1]
    yes, no = re.search(r"\b(?:yes|yeah|yep)\b", said), _NO.search(said)
    return None if bool(yes) == bool(no) else "yes" if yes else "no"


def _numbers(text: str) -> str:
    return _NUMBER_WORD.sub(lambda word: str(_NUMBER_WORDS.index(word[0])), text)


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
    if mentioned and len(found := _mentioned(said, options)) == 1:
        return found[0]
    if (letter := _ANNOUNCED.search(plain)) and _index(letter) < len(options):
        return _index(letter)
    return None


def _mentioned(said: str, options: Sequence[str]) -> list[int]:
    """Indices of the options whose texts occur in a normalised answer."""
    texts = (normalize_answer(option) for option in options)
    return [index for index, text in enumerate(texts) if text and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", said)]


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
