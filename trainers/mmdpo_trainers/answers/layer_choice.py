"""At which decoder layer the attention ratio tells a model's right answers from its wrong ones, and which layer to go by.

MIA-DPO reads layer 16 of 32 of LLaVA-1.5. Where another model shows what it looks at, its own answers say: for each layer, the area under the
ROC curve of the ratio against right and wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mmdpo_trainers.answers.packed import unpacked
from mmdpo_trainers.config.options import Match
from mmdpo_trainers.data.match import is_right
from mmdpo_trainers.data.records import FORMATS
from mmdpo_trainers.data.roc import Area, area, youden
from mmdpo_trainers.data.seeds import batch_seed
from mmdpo_trainers.files.atomic import read_json

FILE = "layers.json"
ALL = "all"
"""All formats together."""
LEAST = 10
"""Right and wrong answers that each half needs, or nothing is chosen by it."""
_NEARLY_ALL = 0.99
"""Share of the answers that a layer must have a ratio of to be chosen: layers with a sliding window may not see the pictures any more."""
_WELL, _FAIRLY, _HARDLY = 0.9, 0.75, 0.6

Stratum = tuple[str, int]
"""Format and number of pictures. With more pictures ratios are smaller and mistakes more: across numbers, the ratio would tell the number."""


@dataclass
class Answers:
    """Answers of which it is known whether they are right, with their ratios at all layers."""

    layers: list[int]
    strata: list[Stratum] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)
    first_half: list[bool] = field(default_factory=list)
    """Whether a layer may be chosen by it; the others tell how good the chosen one is."""
    ratios: list[list[float | None]] = field(default_factory=list)
    heads: list[np.ndarray] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, records: Iterable[Mapping[str, Any]], layers: Sequence[int], match: Match, seed: int) -> Answers:
        """From score records with `ratios` and a recording of all `layers`. All prompts made of one source record are in one half.

        Left out and counted: answers about one picture, which has all attention (`single`), those without a truth (`no_truth`) or of which
        nobody can tell (`unclear`), and those without rows (`no_ratio`).
        """
        found = cls(list(layers))
        for record in records:
            truth, response = (str(record.get(key) or "").strip() for key in ("answer", "response"))
            right = is_right(response, truth, options=record.get("options"), match=match) if truth and response else None
            if record["num_images"] < 2:
                found.left_out["single"] += 1
            elif not truth:
                found.left_out["no_truth"] += 1
            elif right is None:
                found.left_out["unclear"] += 1
            elif record["recorded"]["attention"] is None:
                found.left_out["no_ratio"] += 1
            else:
                found.strata.append((record["format"], record["num_images"]))
                found.right.append(right)
                found.first_half.append(batch_seed(seed, "layers", record.get("source_id") or record["id"]) % 2 == 0)
                found.ratios.append(record["ratios"])
                found.heads.append(unpacked(record["recorded"]["heads"], len(layers)))
        return found


class _Arrays:
    """The same as arrays, cut by stratum."""

    def __init__(self, answers: Answers) -> None:
        self.ratios = np.array(answers.ratios, np.float64).reshape(len(answers.right), len(answers.layers))
        self.heads = np.stack(answers.heads) if answers.heads else np.empty((0, len(answers.layers), 0), np.float32)
        self.right, self.first = np.array(answers.right, bool), np.array(answers.first_half, bool)
        names = sorted(set(answers.strata), key=lambda stratum: (FORMATS.index(stratum[0]), stratum[1]))
        number = np.array([names.index(stratum) for stratum in answers.strata])
        self.strata = {stratum: number == place for place, stratum in enumerate(names)}

    @property
    def formats(self) -> list[str]:
        return list(dict.fromkeys(format for format, _ in self.strata))

    def of(self, format: str) -> list[np.ndarray]:
        return [which for stratum, which in self.strata.items() if format in (ALL, stratum[0])]

    def area(self, format: str, column: np.ndarray, part: np.ndarray | bool = True) -> Area | None:
        """Of one column of numbers, within the strata of a format."""
        right, wrong = ([column[which & part & kind] for which in self.of(format)] for kind in (self.right, ~self.right))
        return area(right, wrong)

    def counts(self, format: str, part: np.ndarray | bool = True) -> dict[str, int]:
        which = np.any(self.of(format), axis=0) & part
        return {"right": int((which & self.right).sum()), "wrong": int((which & ~self.right).sum())}


def middle_layer(layers: Sequence[int]) -> int:
    """The middle one of some layers, 0-based and in order; where others lie between them, the one that is nearest to the middle of the
    decoder, which ends with the last of them."""
    if layers[-1] - layers[0] < len(layers):
        return layers[len(layers) // 2]
    middle = (layers[-1] + 1) // 2
    return min(layers, key=lambda layer: abs(layer - middle))


def layer_curves(answers: Answers, *, best_by: str, go_by: int | None) -> dict[str, Any]:
    """What `layers.json` holds.

    go_by: the layer to go by, None: the best, of all formats or of each (`best_by`), as `score.layer` says.

    Returns:
        layers, left_out; answers: format -> right and wrong; auc: format (and `all`) -> one area a layer, None where there is nothing to
        tell; heads: format -> (L, G) areas of the groups of heads; best: format -> the `layer` that is best on one half, its area there
        (`auc_chosen`), and on the other half (`auc`), None where there are fewer than `LEAST` right or wrong answers in a half; best_head: the
        same of single heads, all formats; chosen:
        format -> layer to go by; thresholds: format -> number of pictures -> see `_thresholds`.
    """
    arrays, layers = _Arrays(answers), answers.layers
    names = [*arrays.formats, ALL] if arrays.formats else []
    best = {name: _best(arrays, name, layers) for name in names}
    middle = middle_layer(layers)
    overall = best.get(ALL)
    chosen = {ALL: go_by if go_by is not None else overall["layer"] if overall else middle}
    for name in arrays.formats:
        own = best[name] if go_by is None and best_by == "format" else None
        chosen[name] = own["layer"] if own else chosen[ALL]
    return {
        "layers": layers,
        "answers": {name: arrays.counts(name) for name in names},
        "left_out": dict(answers.left_out),
        "auc": {name: [_shown(arrays.area(name, arrays.ratios[:, place])) for place in range(len(layers))] for name in names},
        "heads": {name: _of_heads(arrays, name) for name in names},
        "best": best,
        "best_head": _best_head(arrays, layers) if overall else None,
        "go_by": "best" if go_by is None else go_by,
        "chosen": chosen,
        "thresholds": {name: _thresholds(arrays, name, layers.index(chosen[name])) for name in arrays.formats},
    }


def _best(arrays: _Arrays, name: str, layers: Sequence[int]) -> dict[str, Any] | None:
    first = arrays.first
    if min((*arrays.counts(name, first).values(), *arrays.counts(name, ~first).values())) < LEAST:
        return None
    which = np.any(arrays.of(name), axis=0) & first
    seen = (~np.isnan(arrays.ratios[which])).sum(0)
    areas = [
        arrays.area(name, arrays.ratios[:, place], first) if seen[place] >= _NEARLY_ALL * seen.max() else None
        for place in range(len(layers))
    ]
    place = max(range(len(layers)), key=lambda place: -1.0 if (found := areas[place]) is None else found.value)
    held_out = arrays.area(name, arrays.ratios[:, place], ~first)
    if areas[place] is None or held_out is None:
        return None
    return {"layer": layers[place], "auc_chosen": _shown(areas[place]), "auc": _shown(held_out)}


def _best_head(arrays: _Arrays, layers: Sequence[int]) -> dict[str, Any] | None:
    """The group of heads that does best alone on one half, and its area on the other."""
    areas = {
        (place, head): found.value
        for place in range(arrays.heads.shape[1])
        for head in range(arrays.heads.shape[2])
        if (found := arrays.area(ALL, arrays.heads[:, place, head], arrays.first)) is not None
    }
    if not areas:
        return None
    place, head = max(areas, key=lambda each: areas[each])
    return {"layer": layers[place], "head": head, "auc": _shown(arrays.area(ALL, arrays.heads[:, place, head], ~arrays.first))}


def _of_heads(arrays: _Arrays, name: str) -> list[list[float | None]]:
    groups = range(arrays.heads.shape[2])
    areas = [[arrays.area(name, arrays.heads[:, place, group]) for group in groups] for place in range(arrays.heads.shape[1])]
    return [[None if each is None else round(each.value, 4) for each in row] for row in areas]


def _thresholds(arrays: _Arrays, name: str, place: int) -> dict[str, dict[str, Any]]:
    """Number of pictures -> `threshold`, the best one of the first half (`youden`), and of the other half the share of wrong answers among
    those under it (`wrong_under`), beside that among all (`wrong`), and the share of the wrong that are under it (`found`)."""
    found = {}
    for (format, count), which in arrays.strata.items():
        column = arrays.ratios[:, place]
        which = which & ~np.isnan(column)
        right, wrong = (column[which & arrays.first & kind] for kind in (arrays.right, ~arrays.right))
        rest = which & ~arrays.first
        if format != name or min(len(right), len(wrong)) < LEAST or not rest.any():
            continue
        threshold = round(youden(right, wrong), 4)
        under, bad = column[rest] < threshold, ~arrays.right[rest]
        found[str(count)] = {
            "threshold": threshold,
            "wrong_under": _part(int((under & bad).sum()), int(under.sum())),
            "wrong": _part(int(bad.sum()), len(bad)),
            "found": _part(int((under & bad).sum()), int(bad.sum())),
            "held_out": len(bad),
        }
    return found


def _part(some: int, of: int) -> float | None:
    return round(some / of, 4) if of else None


def _shown(found: Area | None) -> dict[str, Any] | None:
    return None if found is None else {key: round(value, 4) for key, value in asdict(found).items()}


def chosen_layers(run: Path, layer: Any) -> dict[str, int]:
    """Format (and `all`) -> the layer that stage score of a run has chosen; empty where it was not asked to, or has not done so."""
    return dict(read_json(run / "score" / FILE, missing={}).get("chosen", {})) if layer == "best" else {}


def verdicts(curves: Mapping[str, Any]) -> list[str]:
    """What the curves say, in sentences."""
    if not curves["auc"]:
        return [f"Nothing to compare: no answer to several pictures of which it is known whether it is right{_left_out(curves)}."]
    counts = curves["answers"][ALL]
    said = [f"{counts['right']:,} right and {counts['wrong']:,} wrong answers were compared{_left_out(curves)}."]
    best = curves["best"][ALL]
    if best is None:
        said.append(
            f"That is too few to choose a layer by: each half needs {LEAST} right and {LEAST} wrong ones. Use more prompts."
        )
    else:
        said.append(_of_best(best))
        said += _of_head(curves["best_head"], best)
    said += _of_gaps(curves)
    for name, layer in curves["chosen"].items():
        found = curves["auc"][name][curves["layers"].index(layer)]
        if found is not None and (name != ALL or best is None or layer != best["layer"]):
            said += _of_used(name, layer, found)
    return said


def _of_gaps(curves: Mapping[str, Any]) -> Iterator[str]:
    """What has no area, and why."""
    for name, areas in curves["auc"].items():
        if name != ALL and not any(areas):
            counts = curves["answers"][name]
            yield (
                f"Format {name} has no AUC: it takes two right and two wrong answers about the same number of pictures, and there are "
                f"{counts['right']:,} right and {counts['wrong']:,} wrong ones."
            )
    unseen = [str(layer) for layer, found in zip(curves["layers"], curves["auc"][ALL], strict=True) if found is None]
    if unseen and len(unseen) < len(curves["layers"]):
        yield f"No AUC at layer {', '.join(unseen)}: too few answers see the pictures from there."


def _of_best(best: Mapping[str, Any]) -> str:
    found, layer = best["auc"], best["layer"]
    figures = f"AUC {found['value']:.2f}, {found['low']:.2f} to {found['high']:.2f}"
    measured = f"on the half of the answers that it was not chosen by ({found['right']:,} right, {found['wrong']:,} wrong)"
    if found["value"] >= _WELL:
        return f"This model's attention tells right answers from wrong ones well: layer {layer}, {figures} {measured}."
    if found["value"] >= _FAIRLY:
        return f"This model's attention tells right answers from wrong ones fairly: best at layer {layer}, {figures} {measured}."
    if found["value"] >= _HARDLY:
        return f"This model's attention tells right answers from wrong ones only weakly: best at layer {layer}, {figures} {measured}."
    return (
        f"This model's attention does not tell right answers from wrong ones at any layer: the best is {layer}, {figures} {measured}. "
        "Pairs selected by it are hardly better than pairs drawn from all wrong answers."
    )


def _of_head(head: Mapping[str, Any] | None, best: Mapping[str, Any]) -> list[str]:
    """Where one head does clearly better than the mean over heads, which the ratio is."""
    if head is None or head["auc"] is None or head["auc"]["low"] <= best["auc"]["value"]:
        return []
    found = head["auc"]
    return [
        f"One head alone does better than the mean over heads that the ratio is: head {head['head']} of layer {head['layer']}, AUC "
        f"{found['value']:.2f}, {found['low']:.2f} to {found['high']:.2f} on the same half."
    ]


def _of_used(name: str, layer: int, found: Mapping[str, Any]) -> list[str]:
    """Warnings about a layer that is gone by."""
    where = f"at layer {layer}" if name == ALL else f"at layer {layer} in {name}"
    if found["high"] < 0.5:
        return [f"The other way round {where}: wrong answers look more at the asked-about picture (AUC {found['value']:.2f})."]
    if found["value"] >= _HARDLY:
        return []
    figures = f"AUC {found['value']:.2f}, {found['low']:.2f} to {found['high']:.2f}"
    if found["high"] >= _FAIRLY:
        return [f"These answers are too few to say whether this model's attention tells right from wrong {where} ({figures})."]
    return [f"This model's attention does not tell right from wrong {where} ({figures})."]


def _left_out(curves: Mapping[str, Any]) -> str:
    words = {
        "unclear": "unclear whether right",
        "no_truth": "without a true answer",
        "single": "about a single picture",
        "no_ratio": "without a ratio",
    }
    found = [f"{count:,} {words[reason]}" for reason, count in curves["left_out"].items()]
    return f"; left out: {', '.join(found)}" if found else ""
