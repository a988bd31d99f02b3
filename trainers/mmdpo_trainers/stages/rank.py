"""Records to train on from rated answers, and a table of what each rule dropped."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mmdpo_trainers.data.records import FORMATS, TEXT, relative_images
from mmdpo_trainers.errors import DataError, StageError
from mmdpo_trainers.files.atomic import write_atomic
from mmdpo_trainers.methods.ranking import RULES, Ranking, rank_answers
from mmdpo_trainers.stages.batches import Record, count_formats, read_records, require
from mmdpo_trainers.stages.context import StageContext

_REMEDIES = {
    "no_rating": "see rate/problems.jsonl for what became of the ratings",
    "one_answer": "the answers to a prompt are all the same: raise generate.num_answers or generate.temperature",
    "low": "lower rank.min_chosen",
    "gap": "lower rank.min_gap, or raise generate.temperature",
    "not_drawn": "raise rank.max_pairs",
}


def inputs(context: StageContext) -> list[Path]:
    return [context.ratings]


def run(context: StageContext) -> dict[str, Any]:
    """Rank; writes `pairs.jsonl` and `dropped.jsonl`. Raises StageError, with the table, where nothing is left."""
    options = context.options
    records = read_records(context.ratings, "rated answers")
    _check(records, context.ratings)
    ranking = rank_answers(records, options, attributes=context.config.rate.attributes, seed=context.seed)
    summary = _summary(records, ranking, options)
    _write(context, "dropped.jsonl", ranking.dropped)
    if not ranking.pairs:
        raise StageError(_nothing_left(summary, context))
    _write(context, "pairs.jsonl", ranking.pairs)
    context.progress.console.print(ranking_table(summary))
    return summary


def ranking_table(summary: Mapping[str, Any]) -> Table:
    """What was made, and what became of the other prompts and answers."""
    table = Table(title=f"rated answers, {summary['make']}", title_justify="left")
    table.add_column("")
    table.add_column("number", justify="right")
    for name in ("records", "answers", "unrated", "empty", "repeats", "ties"):
        table.add_row({"records": "prompts", "ties": "prompts with several best answers"}.get(name, name), f"{summary[name]:,}")
    for rule, count in summary["dropped"].items():
        table.add_row(f"prompts dropped by {rule}", f"{count:,}")
    table.add_row("to train on", f"{sum(summary['pairs'].values()):,}")
    return table


def _summary(records: Sequence[Record], ranking: Ranking, options: Any) -> dict[str, Any]:
    pairs, seen = count_formats(ranking.pairs), count_formats(records)
    dropped = Counter(record["rule"] for record in ranking.dropped)
    gaps = [pair["values"]["chosen"] - pair["values"]["rejected"] for pair in ranking.pairs]
    return {
        "records": len(records),
        **{name: ranking.counts[name] for name in ("answers", "unrated", "empty", "repeats", "ties")},
        # A format of which nothing is left is counted too.
        "pairs": {name: pairs.get(name, 0) for name in (*FORMATS, TEXT) if name in seen},
        "prompts": len({pair["source"] for pair in ranking.pairs}),
        "dropped": {rule: dropped[rule] for rule in RULES if dropped[rule]},
        "make": options.make,
        "mean_gap": statistics.fmean(gaps) if gaps else None,
        "mean_chosen": statistics.fmean(pair["values"]["chosen"] for pair in ranking.pairs) if gaps else None,
    }


def _check(records: Sequence[Record], path: Path) -> None:
    require(records, {"responses": list, "ratings": list}, path)
    for record in records:
        where = f"{path}, record {record['id']!r}"
        responses, ratings = record["responses"], record["ratings"]
        if not all(isinstance(text, str) for text in responses):
            raise DataError(f"{where}: responses must be a list of texts, got {str(responses)[:120]}")
        if len(ratings) != len(responses):
            raise DataError(f"{where}: ratings must be one for each of its {len(responses)} responses, got {len(ratings)}")
        wrong = next((each for each in ratings if each is not None and not _is_rating(each)), None)
        if wrong is not None:
            raise DataError(f"{where}: a rating must be a mapping of attributes to numbers, or null, got {str(wrong)[:120]}")


def _is_rating(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(each, int | float) and not isinstance(each, bool) for each in value.values())
    )


def _write(context: StageContext, name: str, records: Sequence[Mapping[str, Any]]) -> None:
    lines = []
    for record in records:
        images = relative_images(record["images"], context.folder, context.run.path)
        lines.append(json.dumps({**record, "images": images}, ensure_ascii=False) + "\n")
    write_atomic(context.folder / name, "".join(lines))


def _nothing_left(summary: Mapping[str, Any], context: StageContext) -> str:
    table = "\n".join(f"  {rule:<12} {count:>7}   {_REMEDIES[rule]}" for rule, count in summary["dropped"].items())
    return (
        f"rank left nothing of {summary['records']:,} prompts. Dropped by rule, and what loosens it:\n{table}\n"
        f"Each is in {context.folder / 'dropped.jsonl'}"
    )
