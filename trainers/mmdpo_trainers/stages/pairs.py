"""pairs: preference pairs that exist already, for training and kept from it; with the built-in world questions about pictures too."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmdpo_trainers.data.image_paths import image_files, placed
from mmdpo_trainers.data.images import content_key, embedded_bytes, image_exists
from mmdpo_trainers.data.layouts import LayoutReader
from mmdpo_trainers.data.left_out import counted, lost
from mmdpo_trainers.data.looks import learn_digests
from mmdpo_trainers.data.pair_records import is_prompt, record_image_digest, record_name, stored_prompt
from mmdpo_trainers.data.pairs import read_pairs, refuse_missing
from mmdpo_trainers.data.recipes import is_recipe
from mmdpo_trainers.data.records import relative_images
from mmdpo_trainers.errors import ConfigError, DataError, StageError
from mmdpo_trainers.files.atomic import write_atomic
from mmdpo_trainers.methods import online_settings
from mmdpo_trainers.shapes import prior_world
from mmdpo_trainers.stages.context import StageContext

SHAPES_PRIOR = "shapes_prior"


def inputs(context: StageContext) -> list[Path]:
    """The user's preference data, if there is any."""
    source = context.options.source
    if source == SHAPES_PRIOR:
        return []
    if not Path(source).exists():
        raise ConfigError(f"pairs.source: {source} does not exist; give preference data, or {SHAPES_PRIOR}")
    return [Path(source)]


def run(context: StageContext) -> dict[str, Any]:
    """Write `pairs.jsonl` and `held_out.jsonl` (TRL's columns, the same in both), the built-in world also `prompts.jsonl`.

    For online training alone (alpha 1) the user's data may be prompts with truths: those held out are then `prompts.jsonl`.
    """
    missing: list[str] = []
    layouts = LayoutReader(context.options.columns, pairs=online_settings(context.config).alpha != 1)
    built_in = context.options.source == SHAPES_PRIOR
    made = _built_in(context) if built_in else _own(context, missing, layouts)
    if not made["pairs"]:
        raise StageError(
            f"pairs.held_out: {context.options.held_out} leaves no pairs of {context.options.source} to train on; records that share a "
            "picture stay on one side"
        )
    for name, records in made.items():
        if records:
            write_atomic(context.folder / f"{name}.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in records))
    counts = {name: dict(sorted(Counter(_kind(record) for record in records).items())) for name, records in made.items()}
    found = {"layout": layouts.layout} if layouts.layout else {}
    left = {"missing": len(missing), **layouts.left_out}
    return {**found, **counts, **lost(sum(left.values()) + sum(map(len, made.values())), left)}


def _kind(record: Mapping[str, Any]) -> str:
    """What the record is counted under."""
    return str(record.get("group") or record.get("kind") or "all")


def _built_in(context: StageContext) -> dict[str, list[dict[str, Any]]]:
    options, seed = context.options, context.seed
    unknown = set(options.questions) - {"disagree", "agree"}
    if unknown:
        raise ConfigError(f"pairs.questions: expected disagree and agree, got {', '.join(sorted(unknown))}")
    mix = {"counterfactual": options.counterfactual, "captions": options.captions}
    counts = {"pairs": options.pictures, "held_out": round(options.held_out * options.pictures)}
    drawn: dict[str, Iterable[tuple[dict[str, Any], Image.Image]]] = {
        split: prior_world.preference_records(count, seed=seed, split=split, **mix) for split, count in counts.items()
    }
    drawn["prompts"] = prior_world.evaluation_prompts(
        options.questions.get("disagree", 0), options.questions.get("agree", 0), seed=seed
    )
    folder = context.folder
    (folder / "images").mkdir(exist_ok=True)
    made: dict[str, list[dict[str, Any]]] = {}
    for name, items in drawn.items():
        made[name] = []
        for record, picture in items:
            picture.save(folder / record["images"][0])
            made[name].append(record)
    # For branches under a similar picture: a second one for each pair, with its own answer.
    for split, count in counts.items() if "similar_images" in context.further_views else ():
        for record, (columns, picture) in zip(
            made[split], prior_world.similar_columns(count, seed=seed, split=split, **mix), strict=True
        ):
            picture.save(folder / columns["similar_images"][0])
            record.update(columns)
    return made


def _own(context: StageContext, missing: list[str], layouts: LayoutReader) -> dict[str, list[dict[str, Any]]]:
    """The user's records, those that share a picture on the same side; which side follows from seed and pictures' content.

    missing: takes the names of those whose pictures do not exist, where it is allowed to leave them out.
    """
    source = Path(context.options.source)
    root = source.resolve() if source.is_dir() else source.resolve().parent
    allowed = context.config.allow_missing
    columns = ("images", "rejected_images", *context.further_views)
    prompts = online_settings(context.config).alpha == 1
    found = read_pairs(source, missing if allowed else None, views=context.further_views, prompts=prompts, layouts=layouts)
    if layouts.layout:
        context.progress.print(f"pairs: layout: {layouts.layout}; {counted(len(found), 'pair')}")
    records = [_stored(record, columns, root, context) for record in found]
    # Those of a dataset; read_pairs has looked at those of a file.
    gone = {str(record["id"]): path for record in records if (path := _missing(record, columns, context.folder)) is not None}
    if gone and (not allowed or len(gone) == len(records)):
        refuse_missing(source, gone, len(records))
    missing += gone
    records = [record for record in records if str(record["id"]) not in gone]
    if not records:
        raise StageError(f"pairs.source: {source} holds no records")
    learn_digests(placed(image, context.folder) for record in records for image in record["images"])
    groups = _connected([_pictures(record, context.folder) for record in records])
    ranked = sorted(set(groups), key=lambda group: hashlib.sha256(f"{context.seed}|{group}".encode()).hexdigest())
    held = _held(ranked, Counter(groups), share=context.options.held_out, most=context.options.max_held_out)
    # Prompts alone have no log-probabilities to compare: those held out are questions.
    sides: dict[str, list[dict[str, Any]]] = {"pairs": [], "held_out": []}
    for record, group in zip(records, groups, strict=True):
        if group in held and is_prompt(record):
            sides.setdefault("prompts", []).append({**record, "prompt": stored_prompt(record)})
        else:
            sides["held_out" if group in held else "pairs"].append(record)
    return sides


def _held(ranked: Sequence[str], sizes: Mapping[str, int], *, share: float, most: int | None) -> set[str]:
    """The groups to hold out, from the front: the share of them, with at most `most` records; one at least where there is a share."""
    held: set[str] = set()
    records = 0
    for group in ranked[: max(int(share > 0), round(share * len(ranked)))]:
        records += sizes[group]
        if held and most is not None and records > most:
            break
        held.add(group)
    return held


def _missing(record: Mapping[str, Any], columns: Sequence[str], folder: Path) -> str | None:
    """The first of the record's pictures that does not exist."""
    pictures = (placed(image, folder) for name in columns for image in record.get(name) or ())
    return next((path for picture in pictures for path in image_files(picture) if not image_exists(path)), None)


def _pictures(record: Mapping[str, Any], folder: Path) -> list[str]:
    """Content keys of the record's pictures; a record without pictures has itself."""
    return [record_image_digest(record, placed(image, folder)) for image in record["images"]] or [str(record["id"])]


def _connected(pictures: Sequence[Sequence[str]]) -> list[str]:
    """For each record the smallest key among those that it is joined to by pictures they share."""
    parent: dict[str, str] = {}

    def root(key: str) -> str:
        while parent.setdefault(key, key) != key:
            parent[key] = key = parent[parent[key]]
        return key

    for keys in pictures:
        for key in keys[1:]:
            low, high = sorted((root(keys[0]), root(key)))
            parent[high] = low
    return [root(keys[0]) for keys in pictures]


def _stored(record: Mapping[str, Any], columns: Sequence[str], root: Path, context: StageContext) -> dict[str, Any]:
    """The record as a line of the run's file: pictures, which are in `columns`, as paths, those inside a dataset as files of the run."""
    stored = {name: value for name, value in record.items() if name not in columns}
    for name in columns:
        paths = [_path(record, image, root, context.folder) for image in record.get(name) or ()]
        if paths or name == "images":
            stored[name] = relative_images(paths, context.folder, context.run.path)
    try:
        return dict(json.loads(json.dumps(stored)))
    except TypeError as error:
        raise DataError(
            f"record {record_name(record)}: {error}; columns other than pictures must be texts, numbers or lists"
        ) from error


def _path(record: Mapping[str, Any], image: Any, root: Path, folder: Path) -> Any:
    """A picture as a path or a recipe, from anywhere."""
    data = embedded_bytes(image)
    if data is not None:
        file = folder / "images" / content_key(data)
        if not file.exists():
            write_atomic(file, data, durable=False)
        return str(file)
    if is_recipe(image):
        return placed(image, root)
    if isinstance(image, Mapping):
        image = image.get("path")
    if not isinstance(image, str) or not image:
        raise DataError(
            f"record {record_name(record)}: a picture must be a path or stored in the dataset, got {str(image)[:80]!r}"
        )
    return str(root / image)
