"""hallucinate: rejected answers by the model itself, of true ones, with part of the pictures hidden."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.answers.config_only import config_only
from mmdpo_trainers.answers.hallucination import HallucinationSampler
from mmdpo_trainers.answers.similarity import similarity_name, similarity_of
from mmdpo_trainers.data.conversation import TEMPLATE_COLUMNS, Conversation, read_prompt
from mmdpo_trainers.data.image_paths import image_files, placed
from mmdpo_trainers.data.left_out import counted, lost
from mmdpo_trainers.data.pair_records import record_conversation, response_text, stored_prompt
from mmdpo_trainers.data.pairs import read_pairs, refuse_missing
from mmdpo_trainers.data.records import relative_images
from mmdpo_trainers.data.sentences import plain_words
from mmdpo_trainers.errors import ConfigError, DataError, StageError
from mmdpo_trainers.files.atomic import write_atomic
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.processes import ranks
from mmdpo_trainers.stages.batches import Record, missing_images, read_records, run_batches
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.models import LazyModel, load_base

STAGE = "hallucinate"
GIVEN = "given_rejected"
"""Column of the data's own rejected answers."""


def inputs(context: StageContext) -> list[Path]:
    """True answers; an embedding model; what the main arm kept, for an arm with the data's own rejected answers."""
    options = context.options
    files = [context.true_answers]
    if options.embedding:
        files.append(Path(options.embedding))
    if _is_given(context):
        if context.arm is None:
            raise ConfigError("hallucinate.rejected: given is for an arm beside the main one; for the main arm use hallucinated")
        files.append(_main(context) / "pairs.jsonl")
    return files


def run(context: StageContext) -> dict[str, Any]:
    """Write `answers.jsonl`, a hallucinated answer for every record, and `pairs.jsonl` of those that are kept.

    `pairs.jsonl` has TRL's columns with the hallucinated answer as `rejected` and as `hallucinated`, the data's own one, where it had one,
    as `given_rejected`. An arm with the main one's settings takes that one's pairs.
    """
    if _is_given(context):
        return _given(context) if ranks.is_rank_0() else {}
    if _as_main(context):
        return _taken_over(context) if ranks.is_rank_0() else {}
    options = context.options
    records, left_out = _records(context)
    _check_texts(context, records)
    sampler: list[HallucinationSampler] = []
    model = LazyModel(lambda: load_base(context))

    def work(number: int, batch: Sequence[Record]) -> list[dict[str, Any]]:
        if not sampler:
            similarity = similarity_of(options.embedding, model().device)
            sampler.append(HallucinationSampler(model(), options, similarity, context.seed))
        truths = [response_text(record, "chosen").strip() for record in batch]
        found = sampler[0].sample(number, [_asked(record) for record in batch], truths)
        return [{"sampled": vars(each)} for each in found]

    path = run_batches(context, "answers.jsonl", records, options.batch_size, work, STAGE, opened=True)
    return _finished(context, list(read_jsonl(path)), left_out) if ranks.is_rank_0() else {}


def _records(context: StageContext) -> tuple[list[Record], dict[str, int]]:
    """Preference records with a true answer and a picture; and those that are left out, by reason."""
    path, allowed = context.true_answers, context.config.allow_missing
    first = next(iter(read_jsonl(path)), None)
    if first is None:
        raise StageError(f"{path} holds no records; see the stage that wrote it, or give your own with --input")
    missing: list[str] = []
    if "chosen" in first:
        found = list(read_pairs(path, missing if allowed else None, views=context.further_views))
    else:
        prompts = read_records(path, "records")
        gone = missing_images(prompts)
        if gone and not allowed:
            refuse_missing(path, gone, len(prompts))
        missing += gone
        found = [_pair(record) for record in prompts if record["id"] not in gone]
    for record in found:
        if any(not image_files(image) for image in record["images"]):
            raise DataError(
                f"{path}, record {record['id']}: expected pictures as files; give this data as pairs.source, which makes them"
            )
    usable = [record for record in found if record["images"] and record["chosen"]]
    reasons = {
        "missing": len(missing),
        "no_picture": sum(not record["images"] for record in found),
        "no_truth": sum(bool(record["images"]) and not record["chosen"] for record in found),
    }
    if not usable:
        raise StageError(
            f"{path}: none of its {counted(sum(reasons.values()), 'record')} has a picture and a true answer; add them"
        )
    return usable, reasons


def _pair(record: Record) -> Record:
    """A prompt record as a preference record that has no rejected answer yet."""
    answer = (record["answer"] or "").strip()
    return {
        **{name: value for name, value in record.items() if name != "answer"},
        "prompt": Conversation(read_prompt(record["prompt"])[0]).messages(),
        "chosen": [{"role": "assistant", "content": answer}] if answer else None,
    }


def _check_texts(context: StageContext, records: Sequence[Record]) -> None:
    """DataError, naming the record, for texts that do not go into the model's chat format: before the first is worked on."""
    texts = config_only(context.model, context.date).texts
    for record in records:
        texts.check_conversation(record["id"], record_conversation(record))
        texts.answer_text(record["id"], "chosen", response_text(record, "chosen"))


def _asked(record: Record) -> Record:
    """A preference record as what the model is asked."""
    given = {column: record[column] for column in TEMPLATE_COLUMNS if record.get(column) is not None}
    return {"id": record["id"], "prompt": stored_prompt(record), "images": record["images"], **given}


def _finished(context: StageContext, answers: Sequence[Record], left_out: Mapping[str, int]) -> dict[str, Any]:
    """Write the pairs that are kept; the summary. StageError where there are none."""
    options = context.options
    kept: list[Record] = []
    reasons: Counter[str] = Counter(left_out)
    for record in answers:
        sampled = record["sampled"]
        if plain_words(sampled["response"]) == plain_words(response_text(record, "chosen")):
            reasons["same_words"] += 1
        elif sampled["similarity"] >= options.max_similarity and options.unresolved == "drop":
            reasons["too_similar"] += 1
        else:
            kept.append(_kept(record))
    if not kept:
        raise StageError(
            f"hallucinate left no pair: all {len(answers):,} answers say what the truth says; raise hallucinate.hide or "
            "hallucinate.temperature"
        )
    _write(context, kept)
    sampled = [record["sampled"] for record in answers]
    tries = Counter(each["tries"] for each in sampled)
    return {
        "pairs": len(kept),
        "similarity": similarity_name(options.embedding),
        "hide": options.hide,
        "tries": {str(number): tries[number] for number in sorted(tries)},
        "unguided": sum(not each["guided"] for each in sampled),
        "similar": sum(each["similarity"] >= options.max_similarity for each in sampled),
        "swapped": sum(each["swapped"] for each in sampled),
        "mean_similarity": statistics.fmean(each["similarity"] for each in sampled),
        **lost(len(answers) + sum(left_out.values()), reasons),
    }


def _kept(record: Record) -> Record:
    """A record with its hallucinated answer as the rejected one; of the sampling, what the page shows."""
    sampled = record["sampled"]
    own = {GIVEN: record["rejected"]} if "rejected" in record else {}
    wrong = [{"role": "assistant", "content": sampled["response"]}]
    rest = {name: value for name, value in record.items() if name != "sampled"}
    return {
        **rest,
        **own,
        "rejected": wrong,
        "hallucinated": wrong,
        "similarity": sampled["similarity"],
        "tries": sampled["tries"],
    }


def _as_main(context: StageContext) -> bool:
    """Whether this is an arm that asks for nothing else than the main one, which is done."""
    if context.arm is None or not (_main(context) / "summary.json").is_file():
        return False
    own = context.run.fingerprint_of(context.name)
    return own is not None and own == context.run.fingerprint_of(STAGE)


def _taken_over(context: StageContext) -> dict[str, Any]:
    """The main arm's pairs as this arm's."""
    _write(context, _main_pairs(context))
    summary = context.run.summary(STAGE)
    return {name: value for name, value in summary.items() if name not in ("fingerprint", "seconds")}


def _given(context: StageContext) -> dict[str, Any]:
    """The main arm's records with the data's own rejected answers. ConfigError where they have none."""
    records = _main_pairs(context)
    without = next((record["id"] for record in records if GIVEN not in record), None)
    if without is not None:
        raise ConfigError(
            f"arms.{context.arm}: hallucinate.rejected: record {without} came without a rejected answer of its own; leave the arm out, or "
            "give data with rejected answers"
        )
    _write(context, [{**record, "rejected": record[GIVEN]} for record in records])
    return {"pairs": len(records)}


def _is_given(context: StageContext) -> bool:
    return bool(context.options.rejected == "given")


def _main(context: StageContext) -> Path:
    return context.run.path / STAGE


def _main_pairs(context: StageContext) -> list[Record]:
    """The main arm's pairs, pictures as whole paths."""
    return list(read_pairs(_main(context) / "pairs.jsonl", views=context.further_views))


def _write(context: StageContext, records: Sequence[Record]) -> None:
    columns = ("images", "rejected_images", *context.further_views)
    lines = []
    for record in records:
        paths = {
            # As `answers.jsonl` has them, from anywhere.
            name: relative_images([placed(image, context.folder) for image in record[name]], context.folder, context.run.path)
            for name in columns
            if record.get(name)
        }
        lines.append(json.dumps({**record, **paths}, ensure_ascii=False) + "\n")
    write_atomic(context.folder / "pairs.jsonl", "".join(lines))
