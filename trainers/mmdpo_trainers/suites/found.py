"""What an answer says, found by the rules of VLMEvalKit, so that figures can be set beside those of its tables.

The rules are those of `can_infer` (vlmeval/utils/matching_util.py) and `YOrN_Extraction` (vlmeval/dataset/utils/yorn.py) of
https://github.com/open-compass/VLMEvalKit at commit e8e78f05, where no judge is asked (`--judge exact_matching`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping

NONE_OF_THEM = "Z"
"""Letter of an answer that refuses, or says that no option is right."""

_REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_MARKS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
_SAID = re.compile(r"(?:correct\s+)?answer\s+is\s+\**([ABCD])\**", re.IGNORECASE)
_LAST_WORDS = 4

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGITS_AROUND_A_COMMA = re.compile(r"\d,\d")
_LONE_PERIOD = re.compile(r"(?<!\d)\.(?!\d)")


def found_option(answer: str, choices: Mapping[str, str]) -> str | None:
    """The letter of the option that an answer names; `NONE_OF_THEM` where it refuses, None where that cannot be told.

    choices: letter -> option. By a letter first, then by an option's text.
    """
    letter = _by_letter(answer, choices)
    return letter if letter is not None else _by_text(answer, choices)


def _by_letter(answer: str, choices: Mapping[str, str]) -> str | None:
    """Punctuation counts as spaces. A capital letter that stands alone, no other option's beside it, among the last four words; or what
    "answer is" is followed by, a letter or the beginning of a word ("the answer is blue" names B)."""
    if any(refusal in answer for refusal in _REFUSALS):
        return NONE_OF_THEM
    words = answer.translate(_MARKS).split()
    letters = [letter for letter in choices if letter in words]
    if len(letters) == 1 and words.index(letters[0]) >= len(words) - _LAST_WORDS:
        return letters[0]
    if not letters and NONE_OF_THEM in words:
        return NONE_OF_THEM
    said = _SAID.search(answer)
    return said[1].upper() if said and said[1].upper() in choices else None


def _by_text(answer: str, choices: Mapping[str, str]) -> str | None:
    """The only option whose text occurs in the answer, in any case, within words too; an answer over twice as long as all options names none."""
    if len(answer) > 2 * sum(map(len, choices.values())):
        return None
    letters = [letter for letter, option in choices.items() if option.lower() in answer.lower()]
    return letters[0] if len(letters) == 1 else None


def found_yes_or_no(answer: str) -> str | None:
    """`yes` or `no`, whichever of the two words alone occurs in the answer, in any case; None where both do, or neither."""
    words = _plain(answer.lower()).split()
    said = [word for word in ("yes", "no") if word in words]
    return said[0] if len(said) == 1 else None


def _plain(text: str) -> str:
    """Punctuation taken out where it stands beside a space anywhere (or where digits stand around a comma), else made a space, as VQA's
    evaluation does; periods that no digit is beside taken out."""
    plain, numbers = text, _DIGITS_AROUND_A_COMMA.search(text) is not None
    for mark in _PUNCTUATION:
        beside_a_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if beside_a_space or numbers else " ")
    return _LONE_PERIOD.sub("", plain)
