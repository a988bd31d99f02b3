"""Answers of vLLM to evaluation prompts, all of them before attention is measured: a GPU has no room for the engine and a model beside it."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.answers.response import FIELDS
from mmdpo_trainers.answers.vllm_engine import VllmEngine, check_vllm
from mmdpo_trainers.errors import StageError
from mmdpo_trainers.files.atomic import free_mib
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.models.encode import load_images
from mmdpo_trainers.models.loading import resolve_dtype
from mmdpo_trainers.models.merged import save_merged, save_whole
from mmdpo_trainers.models.published import weight_bytes
from mmdpo_trainers.processes import ranks
from mmdpo_trainers.stages.batches import Record, run_batches
from mmdpo_trainers.stages.context import StageContext

FILE, MODEL = "responses.jsonl", "model"


def engine_answers(
    context: StageContext, records: Sequence[Record], asked: Callable[[Sequence[Record]], Sequence[Record]]
) -> Mapping[str, Record]:
    """Id of a record -> what `response_of` says of its greedy answer; they are in `responses.jsonl`, which a killed stage continues.

    asked: records -> the prompts that the model sees. What was trained is written as a whole model beside that file until all is answered.
    """
    check_vllm(context.config, "evaluate")
    options, engine = context.options, contextlib.ExitStack()
    folder = Path(ranks.on_rank_0(lambda: str(_model(context, len(records)))))
    started: list[VllmEngine] = []

    def work(number: int, batch: Sequence[Record]) -> list[dict[str, Any]]:
        if not started:
            started.append(
                VllmEngine(
                    folder,
                    dtype=context.config.dtype,
                    device=context.device,
                    most_images=max(len(record["images"]) for record in records),
                    arguments=options.engine_args,
                    date=context.date,
                    section="evaluate",
                )
            )
            engine.callback(started[0].close)
        return started[0].generate_responses(
            asked(batch),
            max_new_tokens=options.max_new_tokens,
            do_sample=False,
            temperature=1.0,
            top_p=1.0,
            seeds=[0] * len(batch),
            pictures=[load_images(record) for record in batch],
        )

    with engine:
        path = run_batches(context, FILE, records, options.batch_size, work, f"answers {context.moment or ''}".strip())
    ranks.on_rank_0(lambda: shutil.rmtree(context.folder / MODEL, ignore_errors=True))
    return {record["id"]: {name: record[name] for name in FIELDS} for record in read_jsonl(path)}


def _model(context: StageContext, records: int) -> Path:
    """The folder that vLLM reads: the base's, or of what was trained one that is written now, where there is anything left to answer."""
    if context.moment != "after":
        return context.model
    trained, target, half = context.trained, context.folder / MODEL, context.folder / f".{MODEL}"
    if not trained.is_dir():
        raise StageError(f"{trained} does not exist: run train first")
    shutil.rmtree(half, ignore_errors=True)
    done = context.folder / FILE
    if target.is_dir() or (done.is_file() and sum(1 for _ in read_jsonl(done)) == records):
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
