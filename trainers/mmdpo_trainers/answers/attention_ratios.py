"""Attention ratios: how much of an answer's attention on pictures goes to the asked-about one.

Measured by a teacher-forced pass that ends after the last layer asked for, or recorded while the answer is generated; the two agree within
rounding. Either records one layer, or all that see pictures in the same pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

import torch
from torch import Tensor

from mmdpo_kernels import AttentionRecorder, image_segments, record_attention
from mmdpo_trainers.answers.layer_choice import middle_layer
from mmdpo_trainers.answers.packed import packed
from mmdpo_trainers.data.compose import box_to_region, official_grid_region, official_pip_region
from mmdpo_trainers.errors import DataError, StageError
from mmdpo_trainers.models.encode import EncodedPrompts, encode_prompts, in_forwards
from mmdpo_trainers.models.families import Family, View, inside, plain_grid
from mmdpo_trainers.models.loaded import LoadedModel

Layer = int | Literal["all", "best"] | None
"""What `score.layer` may say."""

REGION_FORMATS = ("grid", "pip")
"""Formats whose target is a rectangle of the one picture, not a picture of its own."""


@torch.no_grad()
def attention_ratios(
    loaded: LoadedModel,
    records: Sequence[Mapping[str, Any]],
    *,
    layer: int | None = None,
    statistic: str = "mass",
    regions: str = "box",
    drop_first_row: bool = False,
) -> list[dict[str, Any]]:
    """Attention ratios of one batch of answers (`response_ids`, or the text `response`), on a patched model.

    One teacher-forced pass, ended after `layer` (0-based; default the middle, 16 of 32). Its attention is averaged over heads and
    over the rows that predict the answer's tokens, the end token included where the model wrote one; `drop_first_row` leaves out
    the row that predicts the first token, as MIA-DPO's code does, which sees decoding steps only. Keys are the image tokens.

    Returns per record what `ratios_of` does.
    """
    recorded = recorded_answers(loaded, records, layer=layer, regions=regions, drop_first_row=drop_first_row)
    return [
        ratios_of(record, each["attention"], each["tokens"], statistic) for record, each in zip(records, recorded, strict=True)
    ]


@torch.no_grad()
def recorded_answers(
    loaded: LoadedModel, records: Sequence[Mapping[str, Any]], *, layer: Layer, regions: str, drop_first_row: bool
) -> list[dict[str, Any]]:
    """What `recorded_generation` would have recorded of a batch of answers, by a teacher-forced pass on a patched model."""
    settings = ratio_settings(loaded.image_layers, layer=layer, regions=regions, drop_first_row=drop_first_row)

    def work(indices: list[int]) -> list[dict[str, Any]]:
        return _of_one_forward(loaded, [records[index] for index in indices], settings)

    return in_forwards(loaded, records, work)


def _of_one_forward(
    loaded: LoadedModel, records: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]
) -> list[dict[str, Any]]:
    answers = [record["response"] if record.get("response_ids") is None else record["response_ids"] for record in records]
    encoded = encode_prompts(loaded, records, padding_side="right", answers=answers)
    if not sees_images(loaded, encoded):
        return [nothing_recorded(settings) for _ in records]
    segments = target_segments(loaded, records, encoded, regions=settings["regions"])
    rows = response_rows(records, encoded, drop_first_row=settings["drop_first_row"])
    layers = layers_of(settings)
    with record_attention(
        loaded.model,
        segments,
        rows,
        layers=layers,
        num_segments=_num_segments(encoded),
        # Heads apart where they are asked for; a mean is less to write.
        reduce="mean" if "layer" in settings else None,
        stop_early=True,
        cross_segments=encoded.cross_segments,
    ) as recorder:
        loaded.model(**encoded.inputs, use_cache=False)
    mass, counted = recorder.mass, rows.sum(dim=1)
    if "layer" in settings:
        by_head = mass[layers[0]][None, :, None]
    else:
        by_head = torch.stack([mass[layer].sum(2).to(counted.device) for layer in layers]) / counted.clamp(min=1)[:, None, None]
    return _recorded(loaded, records, encoded, settings, by_head, counted.tolist())


def _recorded(
    loaded: LoadedModel,
    records: Sequence[Mapping[str, Any]],
    encoded: EncodedPrompts,
    settings: Mapping[str, Any],
    mass: Tensor,
    counted: Sequence[int],
) -> list[dict[str, Any]]:
    """Per record the settings, its attention and its pictures' tokens. mass: (L, B, H, N), averaged over each record's `counted` rows."""
    tokens = encoded.tokens_per_image
    kept = [2 if r["format"] in REGION_FORMATS else len(t) for r, t in zip(records, tokens, strict=True)]
    mass = mass.double().cpu()
    mean = mass.mean(2).transpose(0, 1)  # (B, L, N)
    if "layer" in settings:
        return [
            {**settings, "attention": mean[index, 0, :n].tolist() if counted[index] > 0 else None, "tokens": tokens[index]}
            for index, n in enumerate(kept)
        ]
    groups = mass.unflatten(2, (head_groups(loaded.model.config, mass.shape[2]), -1)).mean(3)  # (L, B, G, N)
    found = []
    for index, (record, n) in enumerate(zip(records, kept, strict=True)):
        if counted[index] <= 0:
            found.append(nothing_recorded(settings, tokens[index]))
            continue
        shares = groups[:, index, :, 0 if record["format"] in REGION_FORMATS else record["target"]] / groups[:, index].sum(-1)
        attention = [[_short(value) for value in row] for row in mean[index, :, :n].tolist()]
        found.append({**settings, "attention": attention, "heads": packed(shares.numpy()), "tokens": tokens[index]})
    return found


def nothing_recorded(settings: Mapping[str, Any], tokens: Sequence[int] = ()) -> dict[str, Any]:
    """The recording of an answer without a row to count, or of a prompt without pictures."""
    return {**settings, "attention": None, **({} if "layer" in settings else {"heads": None}), "tokens": list(tokens)}


def head_groups(config: Any, heads: int) -> int:
    """Into how many groups a layer's heads fall: query heads that share keys and values are one; in multi-head attention each its own."""
    groups = getattr(config.get_text_config(), "num_key_value_heads", None) or heads
    return groups if heads % groups == 0 else heads


def _short(value: float) -> float:
    """To six digits, which float32 attention has."""
    return float(f"{value:.6g}")


def sees_images(loaded: LoadedModel, encoded: EncodedPrompts) -> bool:
    """Whether the layers that see pictures run: those of cross-attention are left out where a batch has none."""
    return encoded.cross_segments is not None or not loaded.family.cross_attention


def ratios_of(
    record: Mapping[str, Any], attention: Sequence[float] | None, tokens: Sequence[int], statistic: str
) -> dict[str, Any]:
    """The ratios that follow from one record's attention.

    Returns:
        attention: A, the mass per picture; for `grid` and `pip` [region, rest of the picture]. Empty where no row is left to count.
        ratio_mass: A[target] / sum(A).
        ratio_mean: the same of the mean over each picture's tokens (MIA-DPO's code), equal to `ratio_mass` where all pictures
            have the same number of tokens; in `grid` and `pip` the code sums over the rectangle, so there it is `ratio_mass`.
        ratio: the one that `statistic` (`mass` or `mean`) names. All three None where no row is left to count.
    """
    if attention is None:
        return {"ratio": None, "ratio_mass": None, "ratio_mean": None, "attention": []}
    in_regions = record["format"] in REGION_FORMATS
    target = 0 if in_regions else record["target"]
    mass = _share(attention, target)
    mean = mass if in_regions else _share([a / n for a, n in zip(attention, tokens, strict=True)], target)
    return {"ratio": mass if statistic == "mass" else mean, "ratio_mass": mass, "ratio_mean": mean, "attention": list(attention)}


def ratios_at(record: Mapping[str, Any], recorded: Mapping[str, Any], statistic: str, layer: int) -> dict[str, Any]:
    """`ratios_of` one of the layers that were recorded of a record's answer."""
    attention = recorded["attention"]
    if attention is not None and "layers" in recorded:
        attention = attention[recorded["layers"].index(layer)]
    return ratios_of(record, attention, recorded["tokens"], statistic)


def records_what(recorded: Mapping[str, Any] | None, settings: Mapping[str, Any]) -> bool:
    """Whether a recording was made with these settings, of all the layers in them."""
    if recorded is None or any(recorded.get(name) != settings[name] for name in ("regions", "drop_first_row")):
        return False
    made = layers_of(recorded)
    return "heads" in recorded and made == layers_of(settings) if "layers" in settings else settings["layer"] in made


@dataclass
class GenerationRecord:
    """Attention of the rows that emitted tokens in one `generate` call."""

    loaded: LoadedModel
    recorder: AttentionRecorder
    records: Sequence[Mapping[str, Any]]
    encoded: EncodedPrompts
    settings: dict[str, Any]

    def take(self, generated: Sequence[int]) -> list[dict[str, Any]]:
        """Per record the `settings`, `attention` as in `ratios_of` (a list of these, one a layer, where several were recorded, and then
        `heads`, the target's share by layer and group of heads, see `packed`), and `tokens` per picture.

        generated: tokens of each answer.
        """
        first, recorded = int(self.settings["drop_first_row"]), self.recorder.mass
        counts = [count - first for count in generated]
        sums = torch.stack([recorded[layer][:, :, first:].sum(2).cpu() for layer in layers_of(self.settings)])  # (L, B, H, N)
        mass = sums / torch.tensor(counts).clamp(min=1)[:, None, None]
        return _recorded(self.loaded, self.records, self.encoded, self.settings, mass, counts)


@contextmanager
def recorded_generation(
    loaded: LoadedModel,
    records: Sequence[Mapping[str, Any]],
    encoded: EncodedPrompts,
    *,
    layer: Layer,
    regions: str,
    drop_first_row: bool,
) -> Iterator[GenerationRecord]:
    """Record, while the block runs `generate` on `encoded`, what `recorded_answers` would find on its answers."""
    settings = ratio_settings(loaded.image_layers, layer=layer, regions=regions, drop_first_row=drop_first_row)
    segments = target_segments(loaded, records, encoded, regions=regions)
    with record_attention(
        loaded.model,
        segments,
        None,
        layers=layers_of(settings),
        num_segments=_num_segments(encoded),
        reduce=None,
        eos_token_ids=loaded.end_ids,
        cross_segments=encoded.cross_segments,
    ) as recorder:
        yield GenerationRecord(loaded, recorder, records, encoded, settings)


def ratio_settings(layers: Sequence[int], *, layer: Layer, regions: str, drop_first_row: bool) -> dict[str, Any]:
    """What recorded attention depends on, the layer resolved (`layer`, or for `all` and `best` `layers`): equal settings, equal attention."""
    which = {"layers": list(layers)} if layer in ("all", "best") else {"layer": check_layer(layers, layer)}
    return {**which, "regions": regions, "drop_first_row": drop_first_row}


def layers_of(settings: Mapping[str, Any]) -> list[int]:
    """The layers of a recording, or of settings for one."""
    return [settings["layer"]] if "layer" in settings else list(settings["layers"])


def check_layer(layers: Sequence[int], layer: Layer) -> int:
    """As `resolve_layer`. Raises StageError where it is none of `layers`, see `image_layers`."""
    layer = resolve_layer(layers, layer)
    if layer not in layers:
        all_of_them = (
            f"{layers[0]} to {layers[-1]}" if isinstance(layers, range) else f"one of {list(layers)}, which see pictures,"
        )
        raise StageError(f"score.layer: expected {all_of_them} for this model, got {layer}")
    return layer


def resolve_layer(
    layers: Sequence[int], layer: Layer = None, chosen: Mapping[str, int] = MappingProxyType({}), format: str = "all"
) -> int:
    """The decoder layer that an option means, 0-based.

    None: the middle one of those that see pictures, 16 of 32, MIA-DPO's choice; where only some attend, the one of these that is nearest to
    the decoder's middle. `best`: what was `chosen` for the format, or for all formats; where nothing was chosen yet, and for `all`, the
    middle one too.
    """
    if layer == "best" and chosen:
        return chosen.get(format, chosen["all"])
    return middle_layer(layers) if layer is None or isinstance(layer, str) else layer


def check_regions(family: Family, regions: str, formats: Mapping[str, str] = MappingProxyType({})) -> None:
    """StageError for rectangles of another family, and for formats (format -> the setting that asks for it) that it cannot measure."""
    if regions == "official_code" and not family.official_regions:
        raise StageError(
            f"score.regions: official_code is how MIA-DPO's code cuts LLaVA-1.5's 24x24 patches; pictures of {family.name} "
            "have patch grids of their own; set it to box"
        )
    reason = None
    if family.cross_attention:
        reason = "only whole pictures can be told apart"
    elif type(family).views is Family.views:
        reason = "nothing is known of where its image tokens lie"
    asked = next((name for name in REGION_FORMATS if name in formats), None)
    if reason is not None and asked is not None:
        raise StageError(
            f"{formats[asked]}: a {asked} asks about a part of a picture, and with {family.name} {reason}; leave the format out"
        )


def target_segments(
    loaded: LoadedModel, records: Sequence[Mapping[str, Any]], encoded: EncodedPrompts, *, regions: str = "box"
) -> Tensor:
    """(B, S) int32: the picture's index of each image token; in `grid` and `pip` 0 inside the target's region and 1 outside.

    regions: `box`, the record's own box on its picture's patches, or `official_code`, MIA-DPO's rectangles, which are LLaVA's only.

    Raises DataError naming a `grid` or `pip` record without one picture or without a place in it, StageError for rectangles of
    another family.
    """
    check_regions(loaded.family, regions)
    if encoded.cross_segments is not None:
        in_regions = next((record for record in records if record["format"] in REGION_FORMATS), None)
        if in_regions is not None:
            raise DataError(
                f"record {in_regions['id']}: a {in_regions['format']} asks about a part of a picture, and with {loaded.family.name} only "
                "whole pictures can be told apart; leave the format out of augment.formats"
            )
        return torch.full_like(encoded.inputs["input_ids"], -1)
    return image_segments(
        encoded.inputs["input_ids"],
        loaded.image_token_id,
        encoded.tokens_per_image,
        regions=[_region(record, views, regions) for record, views in zip(records, encoded.views, strict=True)],
        patch_grids=[row[0] if row else None for row in encoded.patch_grids],
    )


def mean_ratios(records: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Mean `ratio` by format, over the records that have one."""
    found: dict[str, list[float]] = {}
    for record in records:
        if record.get("ratio") is not None:
            found.setdefault(record["format"], []).append(record["ratio"])
    return {name: sum(ratios) / len(ratios) for name, ratios in found.items()}


def _num_segments(encoded: EncodedPrompts) -> int:
    return max(2, *map(len, encoded.tokens_per_image))


def _region(record: Mapping[str, Any], pictures: Sequence[Sequence[View]], regions: str) -> list[int] | Tensor | None:
    """The asked-about part of the one picture of a `grid` or `pip`, as `image_segments` takes it; None for the other formats."""
    if record["format"] not in REGION_FORMATS:
        return None
    if len(pictures) != 1:
        raise DataError(
            f"record {record['id']}: a {record['format']} is one picture with a region in it, got {len(pictures)} pictures"
        )
    grid = plain_grid(pictures[0])
    if regions == "official_code" and grid is not None:
        if record["format"] == "pip":
            return official_pip_region(grid)
        return official_grid_region(record["target"], record["num_images"], grid)
    region = region_on(record, pictures[0])
    if region is not None:
        return region
    if not pictures[0]:
        raise DataError(
            f"record {record['id']}: a {record['format']} asks about a part of a picture, and nothing is known of where this model's image "
            "tokens lie; leave the format out of augment.formats, or declare the family's `views`"
        )
    what = "picture, which is tiled" if grid is None else f"picture's {grid[0]}x{grid[1]} patches"
    raise DataError(
        f"record {record['id']}: a {record['format']} needs `box`, or `region` on its {what}; "
        "add one, or with LLaVA set score.regions to official_code"
    )


def region_on(record: Mapping[str, Any], views: Sequence[View]) -> list[int] | Tensor | None:
    """The record's region among a picture's image tokens: [row0, col0, row1, col1] where they are one grid, else (tokens) bool.

    `region` where it was cut for this `patch_grid`, else made from `box`; None where there is neither, or nothing is known of the tokens.
    Raises ValueError for a box that leaves the picture.
    """
    grid = plain_grid(views)
    if grid is not None and record.get("region") is not None and list(record.get("patch_grid") or ()) == list(grid):
        return list(record["region"])
    if record.get("box") is None or not views:
        return None
    return inside(views, tuple(record["box"])) if grid is None else box_to_region(record["box"], grid)


def response_rows(records: Sequence[Mapping[str, Any]], encoded: EncodedPrompts, *, drop_first_row: bool) -> Tensor:
    """(B, S) bool: a row predicts the token after it, so the first row is the prompt's last."""
    rows = torch.zeros_like(encoded.inputs["input_ids"], dtype=torch.bool)
    for index, (record, (start, stop)) in enumerate(zip(records, encoded.response_spans, strict=True)):
        rows[index, start - 1 + drop_first_row : stop - 1 + record.get("ended", True)] = True
    return rows


def _share(values: Sequence[float], target: int) -> float | None:
    total = sum(values)
    return values[target] / total if total > 0 else None
