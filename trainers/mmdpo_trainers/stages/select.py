"""Preference pairs from scored answers, and a table of what each rule dropped."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mmdpo_trainers.answers.raters import Rating
from mmdpo_trainers.data.records import FORMATS, relative_images
from mmdpo_trainers.errors import ConfigError, StageError
from mmdpo_trainers.files.atomic import write_atomic
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.methods.selection import (
    Selection,
    SelectionRules,
    match_mix,
    mix_of,
    preference_pair,
    random_wrong_pairs,
    select_pairs,
)
from mmdpo_trainers.stages.batches import Record, count_formats, read_records, require
from mmdpo_trainers.stages.context import StageContext

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
    """Select; writes `pairs.jsonl` and `dropped.jsonl`. Raises StageError, with the table, where no pair is left."""
    options = context.options
    for name in options.thresholds:
        if name not in FORMATS:
            raise ConfigError(f"select.thresholds: unknown format {name!r}; expected {', '.join(FORMATS)}")
    records = read_records(context.scores, "scored answers")
    _check(records, options, context.scores)
    if options.rule == "judge":
        records = _with_ratings(records, context)
    selection = _select(records, options, context.seed)
    summary = _summary(records, selection, options)
    _write(context, "dropped.jsonl", selection.dropped)
    if not selection.pairs:
        raise StageError(_nothing_left(selection, context))
    _write(context, "pairs.jsonl", [preference_pair(record) for record in selection.pairs])
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


def _select(records: Sequence[Record], options: Any, seed: int) -> Selection:
    attention = select_pairs(records, SelectionRules.from_options(options, records), max_pairs=options.max_pairs, seed=seed)
    if options.rule == "attention":
        return attention
    control = SelectionRules.from_options(options, attention=False, judged=options.rule == "judge")
    pool = random_wrong_pairs(records, control, seed=seed) if options.rule == "random_wrong" else select_pairs(records, control)
    return match_mix(pool, mix_of(attention), seed=seed)


def _summary(records: Sequence[Record], selection: Selection, options: Any) -> dict[str, Any]:
    rules = SelectionRules.from_options(options, records)
    # A format of which nothing is left is counted too.
    pairs, seen = count_formats(selection.pairs), count_formats(records)
    return {
        "records": len(records),
        "pairs": {name: pairs.get(name, 0) for name in FORMATS if name in seen},
        "dropped": selection.dropped_by(first=True),
        "dropped_any": selection.dropped_by(first=False),
        "rule": options.rule,
        "match": rules.match,
        "thresholds": rules.thresholds if options.rule == "attention" else {},
        **({"max_rating": options.max_rating, "rating": options.rating or "mean"} if options.rule == "judge" else {}),
        "max_length_ratio": rules.max_length_ratio,
        "min_edit_distance": rules.min_edit_distance,
    }


def _with_ratings(records: Sequence[Record], context: StageContext) -> list[Record]:
    """The records with `rating`, what the judge made of their answer. StageError where it saw other answers."""
    options, attributes = context.options, context.config.rate.attributes
    if options.rating is not None and options.rating not in attributes:
        raise ConfigError(
            f"select.rating: expected one of rate.attributes, {', '.join(attributes)}, or null, got {options.rating!r}"
        )
    lines = {line["id"]: line for line in read_jsonl(context.judged)}
    found = []
    for record in records:
        line = lines.get(record["id"], {})
        if line.get("responses") != [record["response"]]:
            raise StageError(
                f"{context.judged}: expected a rating of the answer to record {record['id']!r}, {record['response'][:60]!r}, got one of "
                f"{line.get('responses')!r}; give rate the answers that were scored: leave rate.input out, then --restart rate"
            )
        rating = Rating(line["ratings"][0])
        found.append({**record, "rating": rating.value(options.rating)})
    return found


def _check(records: Sequence[Record], options: Any, path: Path) -> None:
    require(records, {"response": str, "ratio": (float, int, type(None))}, path)
    missing = next((record["id"] for record in records if "ratio" not in record), None)
    if missing is not None:
        raise StageError(f"{path}, record {missing!r}: no `ratio`; run score first, or give a file that score wrote")
    if options.min_perplexity is not None:
        without = next((record["id"] for record in records if not isinstance(record.get("perplexity"), float | int)), None)
        if without is not None:
            raise StageError(
                f"{path}, record {without!r}: no `perplexity`; add it, or set select.min_perplexity to null to leave the rule out"
            )


def _write(context: StageContext, name: str, records: Sequence[Mapping[str, Any]]) -> None:
    lines = []
    for record in records:
        images = relative_images(record["images"], context.folder, context.run.path)
        lines.append(json.dumps({**record, "images": images}, ensure_ascii=False) + "\n")
    write_atomic(context.folder / name, "".join(lines))


def _nothing_left(selection: Selection, context: StageContext) -> str:
    first, among = selection.dropped_by(first=True), selection.dropped_by(first=False)
    table = "\n".join(
        f"  {rule:<16} first {first.get(rule, 0):>7}   any {count:>7}   {_REMEDIES[rule]}" for rule, count in among.items()
    )
    return (
        f"select left no pair of {len(selection.dropped)} answers. Dropped by rule (as the first that failed, among all that "
        f"failed), and what loosens it:\n{table}\nEach record is in {context.folder / 'dropped.jsonl'}"
    )
