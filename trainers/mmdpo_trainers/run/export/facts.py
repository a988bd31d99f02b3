"""What a run's files say of the model that it trained: data, figures before and after, how attention was used."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from mmdpo_trainers.files.atomic import read_json
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.methods import preset_args
from mmdpo_trainers.methods.held_out import flat_figures
from mmdpo_trainers.report.contents import label_of
from mmdpo_trainers.report.intervals import paired_change
from mmdpo_trainers.run.export.scrub import scrubbed
from mmdpo_trainers.stages.context import StageContext

Row = tuple[str, ...]


def summary_of(context: StageContext, stage: str, moment: Any = None) -> dict[str, Any]:
    """A stage's summary, of the arm where arms have the stage for themselves; empty where it has not run."""
    return dict(read_json(context.folder_of(stage, moment) / "summary.json", missing={}))


def data(context: StageContext) -> list[Row]:
    """What it was trained on, as (what, value)."""
    config, method = context.config, context.method
    rows: list[Row] = []
    if config.train.input:
        rows.append(("preference data", str(scrubbed(config.train.input))))
    else:
        for stage, name, value in (
            ("augment", "source data", config.data.source),
            ("generate", "prompts given", config.generate.input),
            ("score", "answers given", config.score.input),
            ("pairs", "preference pairs", config.pairs.source),
        ):
            if stage in method.stages and value:
                rows.append((name, str(scrubbed(value))))
    train = summary_of(context, "train")
    counts = ", ".join(f"{train[key]:,} {label}" for key, label in _COUNTS.items() if train.get(key))
    rows.append(("records", counts or "not recorded"))
    pairs = summary_of(context, context.method.pairs_stage).get("pairs")
    if isinstance(pairs, dict) and pairs and not config.train.input:
        rows.append(("pairs by kind", ", ".join(f"{label_of(name)} {count:,}" for name, count in pairs.items())))
    parts = read_json(context.folder_of("train") / "state.json", missing={}).get("parts", {})
    for name, digest in parts.items():
        if name.startswith("input "):
            rows.append((f"SHA-256 of `{name.removeprefix('input ')}`", f"`{digest}`"))
    return rows


_COUNTS = {
    "pairs": "trained on",
    "replay": "replayed single-image pairs",
    "held_out": "held out",
    "left_out": "left out as too long",
}


def trained_base(context: StageContext) -> str | None:
    """Fingerprint of the base's folder as it was when training began."""
    parts = read_json(context.folder_of("train") / "state.json", missing={}).get("parts", {})
    return parts.get("model")


def settings(context: StageContext) -> dict[str, Any]:
    """What training was told: the preset's values and the run's own over them."""
    config = context.config
    found: dict[str, Any] = {"preset": config.train.preset or context.method.default_preset, **preset_args(config)}
    found |= {"seed": config.seed, "dtype": config.dtype, "replay": config.train.replay}
    if config.quantization.load_in_4bit:
        found["quantization"] = {key: value for key, value in vars(config.quantization).items() if value}
    if config.chat_template_kwargs:
        found["chat_template_kwargs"] = config.chat_template_kwargs
    return dict(scrubbed(found))


def accuracy(context: StageContext) -> list[Row]:
    """Rows (questions, their number, before, after, change), with 95 % intervals."""
    before, after = (summary_of(context, "evaluate", moment) for moment in ("before", "after"))
    outcomes = [_outcomes(context, moment) for moment in ("before", "after")]
    rows: list[Row] = []
    for name in dict.fromkeys([*(before.get("accuracy") or {}), *(after.get("accuracy") or {})]):
        change = paired_change(*({id: right for id, (group, right) in each.items() if group == name} for each in outcomes))
        said = "-" if change is None else f"{change.value:+.3f} ({change.low:+.3f} to {change.high:+.3f})"
        count = (after.get("counts") or before.get("counts") or {}).get(name, 0)
        rows.append((label_of(name), f"{count:,}", _share(before, name), _share(after, name), said))
    return rows


def _outcomes(context: StageContext, moment: Any) -> dict[str, tuple[str, bool]]:
    """Question -> its group, and whether the answer was right."""
    path = context.folder_of("evaluate", moment) / "answers.jsonl"
    lines: Iterator[Mapping[str, Any]] = read_jsonl(path) if path.is_file() else iter(())
    return {str(line["id"]): (line.get("group") or line["format"], bool(line["correct"])) for line in lines}


def _share(summary: Mapping[str, Any], name: str) -> str:
    value, interval = (summary.get("accuracy") or {}).get(name), (summary.get("intervals") or {}).get(name)
    if value is None:
        return "-"
    return f"{value:.3f}" + (f" ({interval[0]:.3f} to {interval[1]:.3f})" if interval else "")


def held_out(context: StageContext) -> list[Row]:
    """Rows (figure, before, after) of pairs that were not trained on; these have no intervals."""
    before, after = (
        flat_figures({"held_out": summary_of(context, "evaluate", moment).get("held_out")}) for moment in ("before", "after")
    )
    names = [name for name in dict.fromkeys([*before, *after]) if not name.startswith("reward/") or name.endswith("/chosen")]
    return [
        (name.replace("/", " "), *(f"{each[name]:.3f}" if name in each else "-" for each in (before, after))) for name in names
    ]


def attention(context: StageContext) -> list[str]:
    """How attention was used in making the model, in sentences; that it was not, where it was not."""
    config, said = context.config, []
    given = config.train.input or config.select.input
    selects = "select" in context.method.stages and config.select.rule == "attention" and not config.train.input
    if selects:
        said += _selected(context, given)
    elif "score" in context.method.stages and not config.train.input:
        said.append(
            f"Attention was not used to choose the preference pairs of this model: they are those of the rule `{config.select.rule}`."
        )
    args = preset_args(config)
    if args.get("attention_target"):
        layer = args.get("attention_target_layer", args.get("attention_layer"))
        layer = summary_of(context, "train").get("attention_layer") if layer is None else layer
        said.append(
            f"The loss had an objective on where the chosen response looks: `{args['attention_target']}`, factor "
            f"{args.get('attention_target_weight', 1.0)}, decoder layer {layer} (counted from 0)."
        )
    return said or ["Attention was not used: neither the data nor the loss of this model rests on it."]


def _selected(context: StageContext, given: str | None) -> list[str]:
    score, select = summary_of(context, "score"), summary_of(context, "select")
    layer = score.get("layer", context.config.score.layer)
    if isinstance(layer, dict):
        one = set(layer.values())
        layer = one.pop() if len(one) == 1 else ", ".join(f"{label_of(name)} {value}" for name, value in layer.items())
    chosen = (
        " (chosen as the layer whose ratio tells right answers from wrong ones best)"
        if context.config.score.layer == "best"
        else ""
    )
    kind = "summed over" if context.config.score.statistic == "mass" else "averaged over"
    said = [
        "The rejected answers of the preference pairs are the model's own wrong ones that looked at another picture than the asked-about one. "
        f"Attention was read at decoder layer {layer}{chosen}, counted from 0, {kind} a picture's tokens, as the share of the asked-about "
        "picture."
    ]
    tables = {name: table for name, table in (select.get("thresholds") or {}).items() if name in (select.get("pairs") or {})}
    for name, table in tables.items():
        limits = ", ".join(f"{count} pictures {float(limit):.2f}" for count, limit in table.items())
        said.append(f"{label_of(name)}: {select['pairs'][name]:,} pairs; the ratio had to stay under: {limits}.")
    if given:
        said.append("The scored answers were given to the run, and not made by it.")
    return said
