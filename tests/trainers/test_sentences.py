"""Sentences and words of texts of several scripts; a leading yes or no turned round."""

from __future__ import annotations

import pytest

from mmdpo_trainers.data.sentences import join_sentences, plain_words, split_sentences, swap_yes_no, words_of


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", []),
        ("red", ["red"]),
        ("Dr. Lee saw 3.5 cats. Is it? Yes.", ["Dr. Lee saw 3.5 cats.", "Is it?", "Yes."]),
        ("The answer is no. No. 5 is here!", ["The answer is no.", "No. 5 is here!"]),
        (
            "J. Smith ate apples, etc. and pears, etc. The U.S. is big.",
            ["J. Smith ate apples, etc. and pears, etc.", "The U.S. is big."],
        ),
        (
            'He said "hi." Then (see fig. 3) left ... and so on… Why?!',
            ['He said "hi."', "Then (see fig. 3) left ... and so on…", "Why?!"],
        ),
        ("He and I. Then plan B. Smith.", ["He and I.", "Then plan B. Smith."]),
        ("1. Slow down.\n2. Stop", ["1. Slow down.", "2. Stop"]),
        ("A list:\n\n- one\n- two  ", ["A list:", "- one", "- two"]),
        ("small letters. the colour is red.", ["small letters.", "the colour is red."]),
        ("猫がいる。犬もいる！「はい。」終わり", ["猫がいる。", "犬もいる！", "「はい。」", "終わり"]),
        ("यह एक बिल्ली है। यह सोती है।", ["यह एक बिल्ली है।", "यह सोती है।"]),
        ("هل هذا كلب؟ نعم۔", ["هل هذا كلب؟", "نعم۔"]),
    ],
)
def test_sentences(text: str, sentences: list[str]) -> None:
    found = split_sentences(text)
    assert [each.text for each in found] == sentences
    assert "".join(each.text + each.space for each in found) == text
    assert join_sentences(found) == text.rstrip()


def test_words() -> None:
    assert [word for _, word in words_of("A  red 猫が!")] == ["A", "red", "猫", "が", "!"]
    assert all("A  red 猫が!"[place:].startswith(word) for place, word in words_of("A  red 猫が!"))
    assert plain_words("A Red, (big) 猫 -- 3.5 x.") == ["a", "red", "big", "猫", "3.5", "x"]


@pytest.mark.parametrize(
    ("sentence", "swapped"),
    [
        ("Yes, it is.", "No, it is."),
        ("no", "yes"),
        ("\nNO!", "\nYES!"),
        ("Nothing is there.", None),
        ("Not yes.", None),
        ("It is, yes.", None),
    ],
)
def test_a_leading_yes_or_no_is_turned_round(sentence: str, swapped: str | None) -> None:
    assert swap_yes_no(sentence) == swapped
