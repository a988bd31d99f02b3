"""The model card of an export: its metadata by huggingface_hub, its text from what the run's files say. No path of this machine is in it."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from mmdpo_trainers.config.values import read_yaml
from mmdpo_trainers.files.atomic import read_json, write_atomic
from mmdpo_trainers.files.fingerprint import content_hash
from mmdpo_trainers.run.export import facts
from mmdpo_trainers.run.export.scrub import scrubbed
from mmdpo_trainers.run.export.source import Source
from mmdpo_trainers.stages.context import StageContext

RUN_CONFIG = "mmdpo_run.yaml"
"""The run's settings beside the card, without paths of this machine."""
_NOT_STATED, _NO_CARD = (
    "not stated by the base",
    "not stated by the base, whose folder has no README.md; see where it was published",
)
_PACKAGES = ("mmdpo-kernels", "torch", "transformers", "peft", "accelerate", "tokenizers", "safetensors")


def write(source: Source, folder: Path, *, verdict: object = None, adapter_only: bool = False) -> None:
    """Write README.md, and the run's settings beside it. verdict: what the comparison after writing found; None: there was none."""
    metadata = _metadata(source, adapter_only)
    body = "\n\n".join(part for part in _sections(source, verdict, adapter_only, metadata) if part)
    head = ModelCardData(**metadata).to_yaml()
    write_atomic(folder / "README.md", str(ModelCard(f"---\n{head}\n---\n\n{body}\n")))
    if source.context is not None:
        values = {**read_yaml(source.context.run.path / "config.yaml"), "run_dir": None}
        write_atomic(folder / RUN_CONFIG, yaml.safe_dump(scrubbed(values), sort_keys=False, allow_unicode=True))


def _metadata(source: Source, adapter_only: bool) -> dict[str, Any]:
    found: dict[str, Any] = {
        "library_name": "peft" if adapter_only else "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["mmdpo-kernels", "preference-optimization"],
        **_licence(source.base),
    }
    if source.context is not None:
        found["tags"].append(source.context.method.name.replace("_", "-"))
    if "/" in source.name:
        # Elsewhere it is no model that the Hub could show.
        found |= {"base_model": source.name, "base_model_relation": "adapter" if adapter_only else "finetune"}
    return found


def _licence(base: Path) -> dict[str, str]:
    """What the base's own card says of its licence, or its config.json."""
    card, stated = base / "README.md", {}
    if card.is_file():
        try:
            stated = ModelCard.load(card, ignore_metadata_errors=True).data.to_dict()
        except (ValueError, yaml.YAMLError, UnicodeDecodeError):
            # A card that cannot be read states nothing.
            stated = {}
    found = {name: str(stated[name]) for name in ("license", "license_name", "license_link") if stated.get(name)}
    own = read_json(base / "config.json", missing={}).get("license") if not found else None
    return {"license": str(own)} if own else found


def _sections(source: Source, verdict: object, adapter_only: bool, metadata: dict[str, Any]) -> list[str]:
    context = source.context
    title = context.method.title if context is not None else "An adapter"
    what = "An adapter of" if adapter_only else "A whole model:" if source.is_adapter else "A whole model, trained from"
    how = f"{title} ({context.method.about})" if context is not None else "an adapter whose training is not recorded here"
    merged = " with the adapter merged into its weights" if source.is_adapter and not adapter_only else ""
    licence = metadata.get("license", _NOT_STATED if (source.base / "README.md").is_file() else _NO_CARD)
    if metadata.get("license_name"):
        licence += f" ({metadata['license_name']})"
    parts = [
        f"# {source.card_name}",
        f"{what} `{source.name}`{merged}. Made by {how} with mmdpo-kernels.",
        _usage(source, adapter_only),
        "## Base",
        _pairs(_base(source)),
        f"Licence of the base: {licence}. What was made of it is bound by that licence.",
    ]
    if context is None:
        parts += ["## Training", _adapter_settings(source), "Data, method and figures: not recorded with the adapter."]
    else:
        parts += _training(context)
    checked = (
        f"After writing: {verdict}." if verdict is not None else "The written files were not compared with base and adapter."
    )
    parts += [
        "## Versions",
        _pairs(_versions()),
        checked if not adapter_only else "",
        "## Again",
        _commands(source, adapter_only),
    ]
    return parts


def _training(context: StageContext) -> list[str]:
    accuracy, held_out = facts.accuracy(context), facts.held_out(context)
    arm = f" This is the control arm `{context.arm}`." if context.arm else ""
    match = facts.summary_of(context, "evaluate", "after").get("match")
    figures = [
        f"Share of right answers{f', compared by `{match}`' if match else ''}; Wilson intervals of 95 %, changes paired by question.",
        _table(("questions", "number", "before", "after", "change"), accuracy),
    ]
    pairs = [
        "Held-out pairs: gaps of log-probabilities to corrupted pictures, rewards of chosen responses. No intervals are made of these.",
        _table(("figure", "before", "after"), held_out),
    ]
    measured = [*(figures if accuracy else []), *(pairs if held_out else [])]
    return [
        "## Method",
        f"{context.method.title}: {context.method.about}.{arm}",
        "### Attention",
        *facts.attention(context),
        "## Data",
        _pairs(facts.data(context)),
        "## Settings",
        f"```yaml\n{yaml.safe_dump(facts.settings(context), sort_keys=False, allow_unicode=True)}```",
        f"All settings of the run are in `{RUN_CONFIG}`.",
        "## Figures",
        *(measured or ["The run was not evaluated."]),
    ]


def _base(source: Source) -> list[tuple[str, str]]:
    fingerprint, commit = content_hash(source.base), source.commit
    rows = [("model", f"`{source.name}`"), ("commit", f"`{commit}`" if commit else "not known")]
    rows.append(("fingerprint of its files", f"`{fingerprint}`"))
    recorded = None if source.context is None else facts.trained_base(source.context)
    if recorded not in (None, fingerprint, _mark(source)):
        rows.append(("fingerprint when it was trained", f"`{recorded}`; the folder has changed since"))
    return rows


def _mark(source: Source) -> str | None:
    """What the run tells this base from any other by, where it is the run's own."""
    return source.context.model_mark if source.context is not None and source.context.model == source.base else None


def _usage(source: Source, adapter_only: bool) -> str:
    if adapter_only:
        lines = (
            "from peft import PeftModel\n"
            "from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
            f'base = AutoModelForImageTextToText.from_pretrained("{source.name}", dtype="auto")\n'
            'model = PeftModel.from_pretrained(base, "this folder or its id")\n'
            f'processor = AutoProcessor.from_pretrained("{source.name}")\n'
        )
    else:
        lines = (
            "from transformers import AutoModelForImageTextToText, AutoProcessor\n\n"
            'model = AutoModelForImageTextToText.from_pretrained("this folder or its id", dtype="auto")\n'
            'processor = AutoProcessor.from_pretrained("this folder or its id")\n'
        )
    return f"```python\n{lines}```"


def _adapter_settings(source: Source) -> str:
    if not source.is_adapter:
        return "Nothing is known of it."
    values = read_json(source.trained / "adapter_config.json")
    names = ("peft_type", "r", "lora_alpha", "lora_dropout", "use_dora", "use_rslora", "modules_to_save")
    kept = {name: values[name] for name in names if values.get(name) not in (None, False)}
    return f"```yaml\n{yaml.safe_dump(kept, sort_keys=False)}```"


def _versions() -> list[tuple[str, str]]:
    rows = [("Python", platform.python_version())]
    for name in _PACKAGES:
        try:
            rows.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            rows.append((name, "not installed"))
    return rows


def _commands(source: Source, adapter_only: bool) -> str:
    option = " --adapter-only" if adapter_only else ""
    if source.context is None:
        return f"```\nmmdpo export ADAPTER {source.card_name} --base {_last(source.name)}{option}\n```"
    arm = f" --arm {source.context.arm}" if source.context.arm else ""
    folder = source.context.run.path.name
    return (
        "Give model and data in it the places where you keep them:\n\n"
        f"```\nmmdpo run {RUN_CONFIG} --run-dir {folder}\nmmdpo export {folder} {source.card_name}{arm}{option}\n```"
    )


def _last(name: str) -> str:
    return name.rsplit("/", 1)[-1]


def _pairs(rows: Sequence[tuple[str, ...]]) -> str:
    return "\n".join(f"- {row[0]}: {row[1]}" for row in rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
