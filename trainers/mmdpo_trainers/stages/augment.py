"""augment: single-image data to multi-image prompts, for training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mmdpo_trainers.data.multi_image import check_options, plan_prompts
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.prompts import need_regions, source_files, training_records, training_texts, write_prompts


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
    """Write `prompts.jsonl`, `singles.jsonl` (the same records as single-image prompts), `images/` and `problems.jsonl`."""
    options = context.config.augment
    check_options(options, options.formats, max_pixels=context.config.data.max_pixels)
    source = training_records(context)
    records = source.records
    wanted = options.num_prompts if options.num_prompts is not None else max(1, round(options.per_record * len(records)))
    plan = plan_prompts(records, context.seed, options.formats)
    texts = training_texts(context, wanted)
    return write_prompts(context, "augment", source, [(plan, wanted)], formats=options.formats, singles=True, texts=texts)
