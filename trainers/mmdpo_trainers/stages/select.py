"""Preference pairs from scored answers, and a table of what each rule dropped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from mmdpo_trainers.data.records import FORMATS
from mmdpo_trainers.errors import ConfigError, StageError
from mmdpo_trainers.methods.selected import Facts, Selection
from mmdpo_trainers.methods.selection import SelectionRules, WrongAnswers, rejected_answer
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.scored import ATTENTION, CONTROL, PairWriter, Ratings, Record, ScoreFile

_REMEDIES = {
    "no_truth": "the prompts need an `answer`",
    "empty_response": "the model answers nothing: look at generate/responses.jsonl",
    "no_threshold": "give select.thresholds for these formats and numbers of pictures, or select.quantile",
    "no_ratio": "score.drop_first_row leaves one-token answers without a row: switch it off",
    "ratio": "raise select.thresholds",
    "no_rating": "see rate/problems.jsonl for what became of the ratings",
    "rating": "raise select.max_rating",
    "answer": "the model is right: use harder prompts, or sample (generate.do_sample)",
    "unclear": "answers of which nobody can tell: ask for short ones, or set select.match to exact",
    "perplexity": "lower select.min_perplexity",
    "truth_length": "raise select.max_truth_chars",
    "length_ratio": "raise select.max_length_ratio",
    "edit_distance": "lower select.min_edit_distance",
    "no_wrong_answer": "all truths of a format are the same: use more varied prompts",
    "not_drawn": "raise select.max_pairs",
}


def inputs(context: StageContext) -> list[Path]:
    return [context.scores, *([context.judged] if context.options.rule == "judge" else [])]


def run(context: StageContext) -> dict[str, Any]:
    """Select; writes `pairs.jsonl` and `dropped.jsonl`. Raises StageError, with the table, where no pair is left.

    The scores are read as a stream, several times, by several processes where there are many.
    """
    options = context.options
    for name in options.thresholds:
        if name not in FORMATS:
            raise ConfigError(f"select.thresholds: unknown format {name!r}; expected {', '.join(FORMATS)}")
    scores = ScoreFile(context.scores, options, _ratings(context) if options.rule == "judge" else None)
    facts = scores.facts()
    rules = SelectionRules.from_options(options, facts.ratios(ATTENTION))
    selection, rejected = _select(scores, facts, rules, context)
    summary = _summary(selection, rules, options)
    writer = PairWriter(scores, selection, rejected, context.folder, context.run.path)
    if not len(selection.pairs):
        writer.write(pairs=False)
        raise StageError(_nothing_left(selection, context))
    writer.write()
    context.progress.console.print(selection_table(summary))
    return summary


def selection_table(summary: Mapping[str, Any]) -> Table:
    """What each rule dropped: as the first rule a record failed, and among all it failed."""
    table = Table(title=f"selection, answers compared by {summary['match']}", title_justify="left")
    for name in ("", "first", "any"):
        table.add_column(name, justify="right" if name else "left")
    for rule, count in summary["dropped_any"].items():
        table.add_row(f"dropped by {rule}", str(summary["dropped"].get(rule, 0)), str(count))
    table.add_row("pairs", str(sum(summary["pairs"].values())), "")
    shown = [
        f"{name} {', '.join(f'{n}: {t:.2f}' for n, t in each.items())}" for name, each in summary["thresholds"].items() if each
    ]
    says = "first: by the first rule that an answer failed; any: by each that it failed"
    if shown:
        says += f"\nratios to stay under, by number of pictures: {'; '.join(shown)}"
    table.caption, table.caption_justify = says, "left"
    return table


def _select(
    scores: ScoreFile, facts: Facts, rules: SelectionRules, context: StageContext
) -> tuple[Selection, Callable[[Record], str]]:
    """The selection, and what makes a pair's rejected answer."""
    options, seed = context.options, context.seed
    attention = facts.by_attention(rules, ATTENTION).draw(options.max_pairs, seed)
    if options.rule == "attention":
        return attention, rejected_answer
    if options.rule == "random_wrong":
        drawn = WrongAnswers(scores.truths, SelectionRules.from_options(options, attention=False), seed)
        facts.failed[CONTROL] = scores.failing(drawn.failing)
        return facts.by(CONTROL).match_mix(attention.mix(), seed=seed), drawn.rejected
    return facts.by(CONTROL).match_mix(attention.mix(), seed=seed), rejected_answer


def _summary(selection: Selection, rules: SelectionRules, options: Any) -> dict[str, Any]:
    # A format of which nothing is left is counted too.
    pairs = selection.formats()
    return {
        "records": len(selection.facts),
        "pairs": {name: pairs[name] for name in FORMATS if name in pairs},
        "dropped": selection.dropped_by(first=True),
        "dropped_any": selection.dropped_by(first=False),
        "rule": options.rule,
        "match": rules.match,
        "thresholds": rules.thresholds if options.rule == "attention" else {},
        **({"max_rating": options.max_rating, "rating": options.rating or "mean"} if options.rule == "judge" else {}),
        "max_length_ratio": rules.max_length_ratio,
        "min_edit_distance": rules.min_edit_distance,
    }


def _ratings(context: StageContext) -> Ratings:
    options, attributes = context.options, context.config.rate.attributes
    if options.rating is not None and options.rating not in attributes:
        raise ConfigError(
            f"select.rating: expected one of rate.attributes, {', '.join(attributes)}, or null, got {options.rating!r}"
        )
    return Ratings(context.judged, options.rating)


def _nothing_left(selection: Selection, context: StageContext) -> str:
    first, among = selection.dropped_by(first=True), selection.dropped_by(first=False)
    table = "\n".join(
        f"  {rule:<16} first {first.get(rule, 0):>7}   any {count:>7}   {_REMEDIES[rule]}" for rule, count in among.items()
    )
    return (
        f"select left no pair of {len(selection.facts)} answers. Dropped by rule (as the first that failed, among all that "
        f"failed), and what loosens it:\n{table}\nEach record is in {context.folder / 'dropped.jsonl'}"
    )
