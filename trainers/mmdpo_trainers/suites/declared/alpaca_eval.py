"""AlpacaEval (https://github.com/tatsu-lab/alpaca_eval): 805 instructions without pictures; a judge says whose answer people would prefer.

Read from a file of reference answers, `alpaca_eval.json` (its first version: text_davinci_003) or `alpaca_eval_gpt4_baseline.json` (the second:
gpt4_1106_preview), a list of `instruction`, `output`, `dataset`. The figure is the win rate against those answers, half for a
tie. The judge is asked in both orders, and their mean counts; there it is one order, drawn. Judges like long answers: the length of both is
beside the rate, which is not corrected for it (the published length-controlled rate is that of a model fitted to many systems).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmdpo_trainers.answers.raters.judge import CHOICE, Form
from mmdpo_trainers.answers.raters.parsing import parse_choice
from mmdpo_trainers.suites.judging import SAMPLE, Judging, Record, question_of
from mmdpo_trainers.suites.reading import groups_of, text_of
from mmdpo_trainers.suites.suite import Figure, Layout, Marks, Question, Row, Source, Suite

_WINS = ({"A": 1.0, "tie": 0.5, "B": 0.0}, {"A": 0.0, "tie": 0.5, "B": 1.0})
"""What a choice is worth to the model, whose answer is A first, then B."""


def _question(row: Row, source: Source) -> Question:
    return Question(
        id=str(source.number),
        text=text_of(row, "instruction"),
        pictures=[],
        answer=text_of(row, "output"),
        groups=groups_of(row, {"dataset": "dataset"}),
    )


def _asked(record: Record, answer: Record) -> list[Mapping[str, Any]]:
    own, reference = answer["response"], record["answer"]
    pairs = ((own, reference), (reference, own))
    return [{"prompt": question_of(record), "first": first, "second": second} for first, second in pairs]


def _marked(record: Record, answer: Record, found: Sequence[str | None]) -> tuple[str | None, Marks]:
    wins = [worth[choice] for worth, choice in zip(_WINS, found, strict=True) if choice is not None]
    if len(wins) < len(found):
        # One order by itself would favour a place.
        return None, {}
    lengths: Marks = {"length": float(len(answer["response"])), "reference_length": float(len(record["answer"]))}
    return f"{sum(wins) / 2:g}", {"win_rate": sum(wins) / 2, "kept": float(wins[0] == wins[1]), **lengths}


SUITES = (
    Suite(
        name="alpaca_eval",
        title="AlpacaEval",
        paper="arXiv 2305.14387",
        cited="https://github.com/tatsu-lab/alpaca_eval",
        layouts=(Layout(about="reference answers", columns=frozenset({"instruction", "output"}), question=_question),),
        figures={
            "win_rate": Figure(label="Win rate"),
            "kept": Figure(label="Same choice in both orders"),
            "length": Figure(label="Characters an answer", kind="mean"),
            "reference_length": Figure(label="Characters of the reference", kind="mean"),
        },
        mark=None,
        judging=Judging(
            template="alpaca_eval.txt.j2",
            form=Form("alpaca_eval", CHOICE.schema),
            parse=parse_choice,
            asked=_asked,
            marked=_marked,
            sample={"prompt": "What is it?", "first": SAMPLE, "second": "A ball."},
        ),
        max_new_tokens=1024,
    ),
)
