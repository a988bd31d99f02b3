"""Ratings of the answers, with what they cost and how good the rater is on pairs whose better answer is known."""

from __future__ import annotations

import contextlib
import random
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from mmdpo_trainers.answers.raters import Rater, Rating, Surroundings
from mmdpo_trainers.answers.raters.quality import WORDS, quality_counts, rate_pairs
from mmdpo_trainers.answers.raters.replies import costs
from mmdpo_trainers.data.left_out import check_left_out, lost
from mmdpo_trainers.data.pair_records import record_images, response_text, stored_prompt
from mmdpo_trainers.data.pairs import read_pairs
from mmdpo_trainers.data.seeds import batch_seed
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.files.json_lines import JsonLines, read_jsonl
from mmdpo_trainers.methods.selection import draw_wrong
from mmdpo_trainers.processes import ranks
from mmdpo_trainers.report.intervals import Proportion
from mmdpo_trainers.stages.batches import Record, own_records, run_batches
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.training.reward.rater import rater_of

_IN_FLIGHT = 4
"""Records to a batch for each request that an endpoint is sent at a time: it has nothing to do where a batch ends."""


def inputs(context: StageContext) -> list[Path]:
    options = context.options
    own = [options.template, options.comparison_template, options.check_pairs]
    own += [options.file] if options.source == "file" else []
    own += [options.judge] if options.source in ("model", "reward_model") else []
    return [context.to_rate, *(Path(path) for path in own if path)]


def run(context: StageContext) -> dict[str, Any]:
    """Rate every answer; writes `ratings.jsonl`, `problems.jsonl` where there are any, and a judge's `replies.jsonl`.

    Raises DataError where most records get no rating, unless `allow_missing`.
    """
    options = context.options
    records, left_out = own_records(context, context.to_rate, "responses")
    answers = {record["id"]: _responses(record, context.to_rate) for record in records}
    most = max(len(record["images"]) for record in records)
    surroundings = Surroundings(
        folder=context.folder,
        device=context.device,
        dtype=context.config.dtype,
        # A judge's template has arguments of its own.
        date=context.date.with_arguments(None),
        allow_missing=context.config.allow_missing,
        most_images=max(1, most),
    )
    with contextlib.closing(rater_of(options, surroundings)) as rater:

        def work(number: int, batch: Sequence[Record]) -> list[dict[str, Any]]:
            found = rater.rate(batch, [answers[record["id"]] for record in batch])
            return [_line(answers[record["id"]], ratings) for record, ratings in zip(batch, found, strict=True)]

        # Attention and token ids are other stages' business.
        slim = [{name: value for name, value in record.items() if name not in ("recorded", "response_ids")} for record in records]
        path = run_batches(context, "ratings.jsonl", slim, _batch_size(options), work, "rate")
        if not ranks.is_rank_0():
            return {}
        checked = _check(context, rater, records)
    summary = {**_summary(context, list(read_jsonl(path)), left_out), "check": checked}
    for table in rating_tables(summary):
        context.progress.console.print(table)
    return summary


def _responses(record: Mapping[str, Any], path: Path) -> list[str]:
    """The answers of a record: `responses`, or the one `response`. DataError where there is neither."""
    found = record.get("responses", [record.get("response")])
    if not isinstance(found, list) or not found or not all(isinstance(text, str) for text in found):
        raise DataError(
            f"{path}, record {record['id']!r}: expected `response` (text) or `responses` (a list of texts), got {found!r}"
        )
    return found


def _line(responses: Sequence[str], ratings: Sequence[Rating]) -> dict[str, Any]:
    problems = [
        {"answer": place, "reason": rating.reason, "detail": rating.problem}
        for place, rating in enumerate(ratings)
        if rating.scores is None
    ]
    scores = [None if rating.scores is None else dict(rating.scores) for rating in ratings]
    return {"responses": list(responses), "ratings": scores, **({"problems": problems} if problems else {})}


def _batch_size(options: Any) -> int:
    return (
        max(options.batch_size, _IN_FLIGHT * options.endpoint.concurrency) if options.source == "endpoint" else options.batch_size
    )


def _summary(context: StageContext, records: Sequence[Record], left_out: Mapping[str, Any]) -> dict[str, Any]:
    """Means, losses and costs, from the file that was written."""
    options = context.options
    found = [rating for record in records for rating in record["ratings"] if rating is not None]
    problems = [{"id": record["id"], **problem} for record in records for problem in record.get("problems", ())]
    _write_problems(context.folder / "problems.jsonl", problems)
    without = [record for record in records if not any(record["ratings"])]
    earlier = left_out.get("lost", {"of": len(records), "reasons": {}})
    reasons = Counter(earlier["reasons"]) + Counter(record["problems"][0]["reason"] for record in without)
    share = len(without) / len(records)
    # A reward model has one attribute of its own, without bounds.
    names = list(found[0]) if found else list(options.attributes)
    bounded = set(names) <= set(options.attributes)
    check_left_out(
        share,
        context.config.allow_missing,
        f"{len(without):,} of {len(records):,} records got no rating ({dict(reasons)}); such as record "
        f"{problems[0]['id'] if problems else ''}: {problems[0]['detail'] if problems else ''}. See {context.folder / 'problems.jsonl'}",
    )
    return {
        "source": options.source,
        "records": len(records),
        "answers": sum(len(record["ratings"]) for record in records),
        "unrated": dict(Counter(problem["reason"] for problem in problems)),
        "mean": {name: statistics.fmean(rating[name] for rating in found) for name in names} if found else {},
        "scale": [options.lowest, options.highest] if bounded else None,
        "costs": costs(context.folder),
        **lost(earlier["of"], reasons),
    }


def _write_problems(path: Path, problems: Sequence[Mapping[str, Any]]) -> None:
    with JsonLines(path, key="key") as out:
        lines = [{"key": f"{each['id']}: {each['answer']}", **each, "dropped": True} for each in problems]
        out.append(line for line in lines if line["key"] not in out)


def _check(context: StageContext, rater: Rater, records: Sequence[Record]) -> dict[str, Any] | None:
    """How good the rater is: figures with their 95 % Wilson intervals; None where there are no pairs to try it on."""
    options = context.options
    if not options.check or options.source == "file":
        return None
    asked, pairs = _own_pairs(context) if options.check_pairs else _true_pairs(context, records)
    if not pairs:
        return None
    size = _batch_size(options)
    with context.progress.task("check of the ratings", len(pairs), 0) as task:
        rated = rate_pairs(rater, asked, pairs, batch_size=size, advance=task.advance)
    shares = {name: Proportion(*count) for name, count in quality_counts(rated).items()}
    return {
        "pairs": len(pairs),
        "of": "check_pairs" if options.check_pairs else "truth",
        **{
            name: {"correct": each.correct, "total": each.total, "value": each.value, "low": each.low, "high": each.high}
            for name, each in shares.items()
        },
    }


def _own_pairs(context: StageContext) -> tuple[list[Record], list[tuple[str, str]]]:
    """Preference data of the user's own as prompt records, and (better, worse) answers; drawn with the run's seed."""
    data = read_pairs(Path(context.options.check_pairs))
    drawn = _drawn(range(len(data)), context)
    records = [data[index] for index in drawn]
    asked = [
        {**record, "id": str(record.get("id", index)), "prompt": stored_prompt(record), "images": record_images(record)}
        for index, record in zip(drawn, records, strict=True)
    ]
    return asked, [(response_text(record, "chosen"), response_text(record, "rejected")) for record in records]


def _true_pairs(context: StageContext, records: Sequence[Record]) -> tuple[list[Record], list[tuple[str, str]]]:
    """Records with their own answers against wrong ones: another option, or what is true of another record of the same format."""
    known = [record for record in records if str(record.get("answer") or "").strip()]
    truths: dict[str, list[str]] = {}
    for record in known:
        truths.setdefault(record["format"], []).append(record["answer"].strip())
    asked, pairs = [], []
    for record in _drawn(known, context):
        draw = random.Random(batch_seed(context.seed, "check", record["id"]))
        wrong = draw_wrong(record, record.get("options") or truths[record["format"]], draw, context.options.match)
        if wrong is not None:
            asked.append(record)
            pairs.append((record["answer"].strip(), wrong))
    return asked, pairs


def _drawn(values: Sequence[Any], context: StageContext) -> list[Any]:
    count = min(context.options.check, len(values))
    return random.Random(batch_seed(context.seed, "check")).sample(list(values), count)


def rating_tables(summary: Mapping[str, Any]) -> list[Table]:
    """Mean ratings with losses and costs, and what the check found."""
    table = Table(title=f"ratings by {summary['source']}", title_justify="left")
    table.add_column("")
    table.add_column("", justify="right")
    table.add_row("answers", f"{summary['answers']:,}")
    scale = "" if summary["scale"] is None else ", {:g} to {:g}".format(*summary["scale"])
    for name, value in summary["mean"].items():
        table.add_row(f"mean {name}{scale}", f"{value:.2f}")
    for name, count in (
        *((f"not rated: {reason}", count) for reason, count in summary["unrated"].items()),
        *summary["costs"].items(),
    ):
        table.add_row(name.replace("_", " "), f"{count:,}")
    checked = summary["check"]
    if checked is None:
        return [table]
    quality = Table(title=f"check on {checked['pairs']:,} pairs, 95 % Wilson intervals", title_justify="left")
    for name in ("", "share", "interval", "of"):
        quality.add_column(name, justify="right" if name else "left")
    for name, words in WORDS.items():
        if share := checked.get(name):
            quality.add_row(words, f"{share['value']:.3f}", f"{share['low']:.3f} to {share['high']:.3f}", f"{share['total']:,}")
    return [table, quality]
