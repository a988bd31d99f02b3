"""augment: single-image data to multi-image prompts, for training."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from mmdpo_trainers.data.multi_image import check_options, plan_prompts
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.prompt_sources import source_files, training_records, training_texts
from mmdpo_trainers.stages.prompts import need_regions, write_prompts


def inputs(context: StageContext) -> list[Path]:
    """The data file, and the model's config.json where it decides the patch grid. Pictures are not hashed: there may be millions."""
    data = context.config.data
    files = source_files(data.source)
    if context.config.augment.text_source:
        files += source_files(context.config.augment.text_source)
    if context.config.augment.patch_grid is None and need_regions(context.config.augment.formats):
        files.append(context.model / "config.json")
    return files


def run(context: StageContext) -> dict[str, Any]:
    """Write `prompts.jsonl`, `singles.jsonl` (the same records as single-image prompts) and `problems.jsonl`.

    No picture is written: prompts name files of the source, or recipes of what is made of them (`data/recipes.py`).
    """
    options = context.config.augment
    check_options(options, options.formats, max_pixels=context.config.data.max_pixels)
    with contextlib.closing(training_records(context)) as source:
        count = len(source.records)
        wanted = options.num_prompts if options.num_prompts is not None else max(1, round(options.per_record * count))
        plan = plan_prompts(source.records, context.seed, options.formats)
        texts = training_texts(context, wanted)
        return write_prompts(context, "augment", source, [(plan, wanted)], formats=options.formats, singles=True, texts=texts)
