"""What is exported: weights that were trained, the base that they belong to, and the run that they are of, where there is one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.values import read_yaml
from mmdpo_trainers.errors import ConfigError, RunFolderError, StageError
from mmdpo_trainers.methods import check_method
from mmdpo_trainers.models.hub import commit_of, is_hub_id, resolve_model_path
from mmdpo_trainers.models.loading import check_folder
from mmdpo_trainers.models.merged import check_mergeable
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder

_ADAPTER = "adapter_config.json"


@dataclass(frozen=True, kw_only=True)
class Source:
    """What is exported."""

    trained: Path
    """Folder of a PEFT adapter, or of a whole model."""
    base: Path
    """Folder of the model that was trained."""
    name: str
    """What the card calls the base: its id on the Hub, or the name of its folder."""
    context: StageContext | None = None
    """Stage train of the run, with the arm's settings; None: it is not known how the weights were made."""
    card_name: str = ""
    """What the card calls the export."""

    @property
    def is_adapter(self) -> bool:
        return (self.trained / _ADAPTER).is_file()

    @property
    def commit(self) -> str | None:
        """The base's commit on the Hub, where its folder says so: one of the cache, or a download of `hf download --local-dir`."""
        for file in sorted((self.base / ".cache" / "huggingface" / "download").glob("*.metadata")):
            return file.read_text(encoding="utf-8").split("\n")[0].strip() or None
        return commit_of(self.base)


def find_source(
    given: str | Path, out: str | Path, *, arm: str | None = None, base: str | None = None, base_name: str | None = None
) -> Source:
    """What a run folder, an adapter's or a whole model's stands for.

    arm: of a run, None: the main one. base: the folder of the base, which only an adapter by itself needs. base_name: see `Source.name`.
    Raises MmdpoError where it is none of them, is not trained yet, or cannot be exported.
    """
    folder = Path(given).expanduser()
    if not folder.is_dir():
        raise StageError(f"{given}: no such folder; expected a run folder, or that of a PEFT adapter")
    of_run = (folder / "config.yaml").is_file()
    if arm is not None and not of_run:
        raise ConfigError(f"--arm {arm}: {given} is no run folder (it has no config.yaml), so it has no arms; leave it out")
    context = _context(folder, arm) if of_run else None
    trained = folder if context is None else _trained(context)
    its_base, asked = _base(trained, context, base)
    found = Source(
        trained=trained,
        base=its_base,
        name=base_name or (asked if not Path(asked).is_dir() else _hub_name(its_base) or its_base.name),
        context=context,
        card_name=Path(out).name,
    )
    if found.is_adapter:
        check_mergeable(its_base, trained)
    else:
        check_folder(trained)
    return found


def _context(folder: Path, arm: str | None) -> StageContext:
    path = folder / "config.yaml"
    config = check_method(RunConfig.from_dict(read_yaml(path), where=str(path)), str(path))
    return StageContext(run=RunFolder(folder), config=config.for_arm(arm), stage="train", arm=arm)


def _trained(context: StageContext) -> Path:
    if context.rewards:
        raise StageError(
            f"{context.run.path}: it trained a reward model, whose head rates answers and is part of no model of transformers; export a run "
            "of another method, or rate answers with rate.source: model"
        )
    context.run.summary(context.name)
    if not context.trained.is_dir():
        raise RunFolderError(f"{context.trained} is gone: put it back, or pass --restart train to train anew")
    return context.trained


def _base(trained: Path, context: StageContext | None, given: str | None) -> tuple[Path, str]:
    """The base's folder, and what it was asked for by."""
    if given is not None:
        return resolve_model_path(given), given
    if context is not None:
        return context.model, context.config.model
    if not (trained / _ADAPTER).is_file():
        return trained, str(trained)
    recorded = json.loads((trained / _ADAPTER).read_text(encoding="utf-8")).get("base_model_name_or_path") or ""
    if is_hub_id(recorded):
        return resolve_model_path(recorded), recorded
    if not Path(recorded).is_dir():
        raise ConfigError(
            f"--base: expected the folder of the model that the adapter {trained} belongs to; its own adapter_config.json names "
            f"{recorded or 'none'}, which is no folder here"
        )
    return Path(recorded), recorded


def _hub_name(folder: Path) -> str | None:
    """The id of a snapshot in the Hub's cache, by how the cache names its folders."""
    repository = folder.parent.parent.name if commit_of(folder) else ""
    return repository.removeprefix("models--").replace("--", "/", 1) if repository.startswith("models--") else None
