"""Answers of vLLM to evaluation prompts, all of them before attention is measured: a GPU has no room for the engine and a model beside it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmdpo_trainers.answers.attention_ratios import recorded_answers
from mmdpo_trainers.answers.response import FIELDS
from mmdpo_trainers.answers.transformers_engine import generate_responses
from mmdpo_trainers.answers.vllm_engine import VllmEngine, check_vllm
from mmdpo_trainers.errors import StageError
from mmdpo_trainers.files.atomic import free_mib
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.models.encode import load_images
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import resolve_dtype
from mmdpo_trainers.models.merged import save_merged, save_whole
from mmdpo_trainers.models.published import weight_bytes
from mmdpo_trainers.processes import ranks
from mmdpo_trainers.stages.batches import Record, run_batches
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.models import what_was_trained

OWN, MODEL = "prompts", "model"
"""Key of the evaluation prompts that are no benchmark's, and the folder of what was trained as a whole model."""


@dataclass(frozen=True)
class Questions:
    """What is asked in one go, as the model sees it. key: `OWN`, or a benchmark's."""

    key: str
    records: Sequence[Record]
    max_new_tokens: int
    about: str

    @property
    def file(self) -> str:
        return "responses.jsonl" if self.key == OWN else f"responses-{self.key}.jsonl"


def engine_answers(context: StageContext, questions: Sequence[Questions]) -> dict[str, Mapping[str, Record]]:
    """Key -> id of a record -> what `response_of` says of its greedy answer; they are in `responses*.jsonl`, which a killed stage continues.

    What was trained is written as a whole model beside those files until all is answered.
    """
    check_vllm(context.config, "evaluate")
    found: dict[str, Mapping[str, Record]] = {}
    folder = Path(ranks.on_rank_0(lambda: str(_model(context, questions))))
    with contextlib.ExitStack() as stack:
        started: list[VllmEngine] = []

        def engine() -> VllmEngine:
            if not started:
                pictures = (len(record["images"]) for each in questions for record in each.records)
                started.append(_engine(context, folder, max(pictures)))
                stack.callback(started[0].close)
            return started[0]

        for each in questions:

            def work(number: int, batch: Sequence[Record], longest: int = each.max_new_tokens) -> list[dict[str, Any]]:
                pictures = [load_images(record) for record in batch]
                return engine().generate_responses(batch, max_new_tokens=longest, pictures=pictures)

            path = run_batches(context, each.file, each.records, context.options.batch_size, work, each.about)
            found[each.key] = {record["id"]: {name: record[name] for name in FIELDS} for record in read_jsonl(path)}
    ranks.on_rank_0(lambda: shutil.rmtree(context.folder / MODEL, ignore_errors=True))
    return found


def answered(
    model: Callable[[], LoadedModel],
    records: Sequence[Mapping[str, Any]],
    given: Mapping[str, Mapping[str, Any]] | None,
    *,
    max_new_tokens: int,
    record: Mapping[str, Any] | None,
) -> list[dict[str, Any]]:
    """Greedy answers, with `recorded` attention if it is asked for (`record`, see `generate_responses`).

    given: answers that are there, by the records' ids; the model, which is loaded if need be, records those to several pictures alone, by a
    teacher-forced pass.
    """
    if given is None:
        return generate_responses(model(), records, max_new_tokens=max_new_tokens, record=record)
    answers = [dict(given[each["id"]]) for each in records]
    several = [place for place, each in enumerate(records) if each["num_images"] > 1]
    if record is not None and several:
        found = recorded_answers(model(), [{**records[place], **answers[place]} for place in several], **record)
        for place, recorded in zip(several, found, strict=True):
            answers[place]["recorded"] = recorded
    return answers


def _engine(context: StageContext, folder: Path, most_images: int) -> VllmEngine:
    return VllmEngine(
        folder,
        dtype=context.config.dtype,
        device=context.device,
        most_images=most_images,
        arguments=context.options.engine_args,
        date=context.date,
        section="evaluate",
    )


def _model(context: StageContext, questions: Sequence[Questions]) -> Path:
    """The folder that vLLM reads: the base's, or of what was trained one that is written now, where there is anything left to answer."""
    if context.moment != "after":
        return context.model
    trained, target, half = what_was_trained(context), context.folder / MODEL, context.folder / f".{MODEL}"
    shutil.rmtree(half, ignore_errors=True)
    files = {context.folder / each.file: len(each.records) for each in questions}
    if target.is_dir() or all(file.is_file() and sum(1 for _ in read_jsonl(file)) == count for file, count in files.items()):
        return target
    dtype = resolve_dtype(context.config.dtype)
    needed = weight_bytes(context.model, None if isinstance(dtype, str) else dtype) // 2**20
    if needed >= (free := free_mib(context.folder)):
        raise StageError(
            f"{target}: vLLM reads what was trained as a whole model, which takes about {needed:,} MiB, and {free:,} MiB are free there; make "
            "room, or set evaluate.engine to transformers"
        )
    if (trained / "adapter_config.json").is_file():
        save_merged(context.model, trained, half, dtype=dtype)
    else:
        save_whole(trained, context.model, half, dtype=dtype)
    return half.rename(target)
