"""Attention ratios of the answers: recorded while they were generated, or measured by a teacher-forced pass; at one layer, or at all.

With all layers it is also said at which of them the ratio tells right answers from wrong ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from transformers import AutoConfig

from mmdpo_trainers.answers.attention_ratios import (
    mean_ratios,
    ratio_settings,
    ratios_at,
    recorded_answers,
    records_what,
    resolve_layer,
)
from mmdpo_trainers.answers.config_only import check_prompts
from mmdpo_trainers.answers.layer_choice import FILE, Answers, layer_curves, verdicts
from mmdpo_trainers.answers.perplexity import answer_perplexities
from mmdpo_trainers.files.atomic import write_atomic
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.methods.selection import match_of
from mmdpo_trainers.models.families import image_layers
from mmdpo_trainers.processes import ranks
from mmdpo_trainers.stages.batches import Record, count_formats, own_records, require, run_batches
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.models import LazyModel, load_base


def inputs(context: StageContext) -> list[Path]:
    return [context.responses]


def run(context: StageContext) -> dict[str, Any]:
    """Score every response; writes `scores.jsonl`. Responses that carry attention recorded with the same settings need no model.

    Where all layers are recorded a line keeps them (`recorded`, and `ratios` by layer), and `layers.json` says how each does.
    """
    options = context.options
    records, left_out = own_records(context, context.responses, "responses")
    require(records, {"response": str}, context.responses)
    check_prompts(context.model, records, context.date)
    layers = image_layers(AutoConfig.from_pretrained(context.model, local_files_only=True, trust_remote_code=False))
    settings = ratio_settings(layers, **options.recording)
    layer = resolve_layer(layers, options.layer)
    model = LazyModel(lambda: load_base(context))

    def recorded_in(batch: Sequence[Record]) -> bool:
        return all(records_what(record.get("recorded"), settings) for record in batch)

    def work(number: int, batch: Sequence[Record]) -> list[dict[str, Any]]:
        given = recorded_in(batch)
        recorded = [record["recorded"] for record in batch] if given else recorded_answers(model(), batch, **options.recording)
        scored = [_scored(record, each, options.statistic, layer) for record, each in zip(batch, recorded, strict=True)]
        # A server may not have told the log-probabilities of its answers.
        untold = [place for place, record in enumerate(batch) if record.get("perplexity", 0.0) is None]
        if untold:
            found = answer_perplexities(model(), [batch[place] for place in untold])
            for place, perplexity in zip(untold, found, strict=True):
                scored[place]["perplexity"] = perplexity
        return scored

    # Where a model has to look at the answers, the next batch's pictures are opened meanwhile.
    opened = not recorded_in(records)
    path = run_batches(context, "scores.jsonl", records, options.batch_size, work, "score", opened=opened)
    if not ranks.is_rank_0():
        return {}
    curves = None if "layer" in settings else _curves(context, path, settings["layers"], layer)
    written = list(read_jsonl(path))
    return {
        "layer": settings["layer"] if curves is None else curves["chosen"],
        "statistic": options.statistic,
        "recorded": sum(records_what(record.get("recorded"), settings) for record in records),
        "scores": count_formats(written),
        "mean_ratio": mean_ratios(written),
        "without_ratio": sum(record["ratio"] is None for record in written),
        **({} if curves is None else {key: curves[key] for key in ("layers", "answers", "auc", "best")}),
        **left_out,
    }


def _scored(record: Record, recorded: Mapping[str, Any], statistic: str, layer: int) -> dict[str, Any]:
    """What is added to a response. A single layer's recording is all in `attention`, several layers' stays beside it."""
    ratios = ratios_at(record, recorded, statistic, layer)
    if "layers" not in recorded or recorded["layers"] == [layer]:
        return ratios
    by_layer = [ratios_at(record, recorded, statistic, each)["ratio"] for each in recorded["layers"]]
    return {
        "recorded": dict(recorded),
        "ratios": [None if ratio is None else round(ratio, 6) for ratio in by_layer],
        **ratios,
    }


def _curves(context: StageContext, path: Path, layers: Sequence[int], middle: int) -> dict[str, Any]:
    """Say at which layer the ratio tells right from wrong, and have `ratio` be that of the layer to go by."""
    options = context.options
    answers = Answers.of(read_jsonl(path), layers, match_of(context.config.select), context.seed)
    curves = layer_curves(answers, best_by=options.best_by, go_by=None if options.layer == "best" else middle)
    if any(layer != middle for layer in curves["chosen"].values()):
        # The file is written batch by batch before anything is chosen; a run that was killed here chooses the same again.
        lines = []
        for record in read_jsonl(path):
            layer = resolve_layer(layers, options.layer, curves["chosen"], record["format"])
            record |= ratios_at(record, record["recorded"], options.statistic, layer)
            lines.append(json.dumps(record, ensure_ascii=False) + "\n")
        write_atomic(path, "".join(lines))
    write_atomic(context.folder / FILE, curves)
    context.progress.console.print(layers_table(curves))
    for sentence in verdicts(curves):
        context.progress.console.print(sentence, highlight=False, markup=False, soft_wrap=True)
    return curves


def layers_table(curves: Mapping[str, Any]) -> Table:
    """AUC by layer and format, with 95 % intervals; what is gone by is marked."""
    table = Table(title="AUC of the ratio, right against wrong answers (* gone by, - none)", title_justify="left", pad_edge=False)
    table.add_column("layer", justify="right")
    for name in curves["auc"]:
        table.add_column(name, justify="right")
    for place, layer in enumerate(curves["layers"]):
        cells = []
        for name, found in curves["auc"].items():
            mark = "*" if curves["chosen"].get(name) == layer else " "
            cells.append(
                "-" if (each := found[place]) is None else f"{each['value']:.2f} {each['low']:.2f}-{each['high']:.2f}{mark}"
            )
        table.add_row(str(layer), *cells)
    return table
