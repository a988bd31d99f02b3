"""Attention ratios of the answers: recorded while they were generated, or measured by a teacher-forced pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from mmdpo_trainers.answers.attention_ratios import attention_ratios, mean_ratios, ratio_settings, ratios_of
from mmdpo_trainers.answers.config_only import check_prompts
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.models.families import image_layers
from mmdpo_trainers.processes import ranks
from mmdpo_trainers.stages.batches import Record, count_formats, own_records, require, run_batches
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.models import LazyModel, load_base


def inputs(context: StageContext) -> list[Path]:
    return [context.responses]


def run(context: StageContext) -> dict[str, Any]:
    """Score every response; writes `scores.jsonl`. Responses that carry attention recorded with the same settings need no model."""
    options = context.options
    records, left_out = own_records(context, context.responses, "responses")
    require(records, {"response": str}, context.responses)
    check_prompts(context.model, records)
    settings = ratio_settings(_image_layers(context.model), **options.recording)
    model = LazyModel(lambda: load_base(context))

    def work(number: int, batch: Sequence[Record]) -> list[dict[str, Any]]:
        if all(_is_recorded(record, settings) for record in batch):
            return [_ratios_of_recorded(record, options.statistic) for record in batch]
        return attention_ratios(model(), batch, statistic=options.statistic, **settings)

    path = run_batches(context, "scores.jsonl", records, options.batch_size, work, "score")
    if not ranks.is_rank_0():
        return {}
    written = list(read_jsonl(path))
    return {
        "layer": settings["layer"],
        "statistic": options.statistic,
        "recorded": sum(_is_recorded(record, settings) for record in records),
        "scores": count_formats(written),
        "mean_ratio": mean_ratios(written),
        "without_ratio": sum(record["ratio"] is None for record in written),
        **left_out,
    }


def _is_recorded(record: Mapping[str, Any], settings: Mapping[str, Any]) -> bool:
    recorded = record.get("recorded")
    return recorded is not None and all(recorded.get(name) == value for name, value in settings.items())


def _ratios_of_recorded(record: Mapping[str, Any], statistic: str) -> dict[str, Any]:
    recorded = record["recorded"]
    return ratios_of(record, recorded["attention"], recorded["tokens"], statistic)


def _image_layers(model: Path) -> Sequence[int]:
    return image_layers(AutoConfig.from_pretrained(model, local_files_only=True))
