"""Where the answers look: attention of a few answers on every patch, before and after training, computed once and kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmdpo_trainers.answers.layer_choice import chosen_layers
from mmdpo_trainers.data.image_paths import placed
from mmdpo_trainers.data.records import Moment
from mmdpo_trainers.files.atomic import read_json, write_atomic

from .contents import MULTI_IMAGE, Record, RunContents, by_format, spread

if TYPE_CHECKING:
    from mmdpo_trainers.config.sections.answers import ScoreConfig
    from mmdpo_trainers.models.loaded import LoadedModel

MOMENTS: tuple[Moment, ...] = ("before", "after")


@dataclass(frozen=True, kw_only=True)
class HeatExample:
    """One question under both models.

    answers: moment -> its record in answers.jsonl. maps: moment -> per picture (rows, columns) float32, attention of the answer's
    rows on each patch, mean over heads and rows, as shares of the attention on all patches of all pictures (they sum to 1, but for marks
    at the ends of rows of patches).
    ratios: moment -> share on the target picture or, in a collage, on the target's region.
    """

    answers: Mapping[str, Record]
    maps: Mapping[str, list[np.ndarray]]
    ratios: Mapping[str, float]

    @property
    def record(self) -> Record:
        return self.answers["before"]


@dataclass(frozen=True, kw_only=True)
class HeatMaps:
    """The examples, the decoder layer they come from, and whether the model sees the centred square of a picture only."""

    layer: int
    centre_crop: bool
    examples: list[HeatExample]


def choose(contents: RunContents, count: int) -> list[tuple[Record, Record]]:
    """Questions to show, about `count` in all, as (answer before, answer after), spread evenly over each multi-image format.

    Half of a format's places go to answers that turned from wrong to right, the rest to answers that did not change, so that
    the page does not show mended answers only.
    """
    after = {record["id"]: record for record in contents.after}
    groups = by_format(r for r in contents.before if r["id"] in after and r["format"] in MULTI_IMAGE)
    each = -(-count // len(groups)) if groups else 0
    chosen = []
    for records in groups.values():
        pairs = [(record, after[record["id"]]) for record in records]
        mended = spread([pair for pair in pairs if pair[1]["correct"] and not pair[0]["correct"]], -(-each // 2))
        same = [pair for pair in pairs if pair[1]["correct"] == pair[0]["correct"]]
        chosen += mended + spread(same, each - len(mended))
    return chosen


def heat_maps(
    contents: RunContents, *, load: Callable[[Moment], LoadedModel], count: int, batch_size: int, score: ScoreConfig, cache: Path
) -> HeatMaps | None:
    """Heat maps of about `count` questions; None where no question was answered both before and after training, or pictures
    have no tokens that show their parts.

    load: moment -> its model, patched; called only where nothing is kept. score: which layer, rows and regions the ratio is of.
    cache: JSON file that keeps the maps; it is used again while questions, answers and settings stay the same.
    """
    chosen = choose(contents, count)
    if not chosen:
        return None
    questions = [[before["id"], before["prompt"], before["response"], after["response"]] for before, after in chosen]
    settings = [score.layer, chosen_layers(contents.folder, score.layer), score.regions, score.drop_first_row]
    key = hashlib.sha256(json.dumps([questions, settings]).encode()).hexdigest()
    if not cache.is_file() or read_json(cache).get("key") != key:
        examples: dict[str, list[dict[str, Any]]] = {}
        for moment, records in zip(MOMENTS, zip(*chosen, strict=True), strict=True):
            loaded = load(moment)
            if not _shows_parts(loaded):
                return None
            batches = (records[start : start + batch_size] for start in range(0, len(records), batch_size))
            examples[moment] = [entry for batch in batches for entry in _map(loaded, batch, contents.folder, moment, score)]
            facts = {"layer": _layer(loaded, score, contents.folder), "centre_crop": _crops(loaded)}
            # Two large models need not fit beside each other.
            del loaded
        write_atomic(cache, json.dumps({"key": key, **facts, "examples": examples}))
    return _read(cache, chosen)


def _read(cache: Path, chosen: Sequence[tuple[Record, Record]]) -> HeatMaps:
    kept = read_json(cache)
    examples = []
    for index, pair in enumerate(chosen):
        entries = {moment: kept["examples"][moment][index] for moment in MOMENTS}
        examples.append(
            HeatExample(
                answers=dict(zip(MOMENTS, pair, strict=True)),
                maps={moment: [np.asarray(heat, np.float32) for heat in entry["maps"]] for moment, entry in entries.items()},
                ratios={moment: entry["ratio"] for moment, entry in entries.items()},
            )
        )
    return HeatMaps(layer=kept["layer"], centre_crop=kept["centre_crop"], examples=examples)


def _layer(loaded: LoadedModel, score: ScoreConfig, run: Path) -> int:
    from mmdpo_trainers.answers.attention_ratios import resolve_layer

    return resolve_layer(loaded.image_layers, score.layer, chosen_layers(run, score.layer))


def _shows_parts(loaded: LoadedModel) -> bool:
    """Whether it is known of the model's image tokens which parts of a picture they show."""
    from PIL import Image

    return bool(loaded.family.encode_images(loaded.processor, [Image.new("RGB", (64, 64))]).views[0])


def _crops(loaded: LoadedModel) -> bool:
    return loaded.family.crops_centre(loaded.processor)


def _map(loaded: LoadedModel, records: Sequence[Record], run: Path, moment: Moment, score: ScoreConfig) -> list[dict[str, Any]]:
    """Per record `maps` (pictures, rows, columns) as nested lists, and `ratio`; the rows counted are those of the score stage."""
    import torch

    from mmdpo_kernels import record_attention
    from mmdpo_trainers.answers.attention_ratios import REGION_FORMATS, response_rows, target_segments
    from mmdpo_trainers.models.encode import encode_prompts
    from mmdpo_trainers.models.families.images import heat_map

    folder = run / "evaluate" / moment
    located = [{**record, "images": [placed(image, folder) for image in record["images"]]} for record in records]
    answers = [record["response"] if record.get("response_ids") is None else record["response_ids"] for record in records]
    batch = encode_prompts(loaded, located, padding_side="right", answers=answers)
    segments = target_segments(loaded, located, batch, regions=score.regions)
    rows = response_rows(located, batch, drop_first_row=score.drop_first_row)
    layer = _layer(loaded, score, run)
    recording = record_attention(loaded.model, segments, rows, layers=[layer], reduce="tokens", stop_early=True)
    with torch.no_grad(), recording as recorder:
        loaded.model(**batch.inputs, use_cache=False)
    found = []
    each = zip(records, recorder.mass[layer].double().cpu(), segments.cpu(), batch.views, strict=True)
    for record, mass, segment, pictures in each:
        total = mass[segment >= 0].sum().clamp_min(torch.finfo(torch.float64).tiny)
        target = 0 if record["format"] in REGION_FORMATS else record.get("target") or 0
        shares = (mass[segment >= 0] / total).split([sum(view.tokens for view in views) for views in pictures])
        maps = [heat_map(views, share).tolist() for views, share in zip(pictures, shares, strict=True)]
        rounded = [[[round(value, 7) for value in line] for line in picture] for picture in maps]
        found.append({"maps": rounded, "ratio": round(float(mass[segment == target].sum() / total), 6)})
    return found
