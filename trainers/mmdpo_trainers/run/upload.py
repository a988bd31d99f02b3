"""`push_to_hub` of a run: what its main arm trained is exported and uploaded at the end, once there are figures for its card."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.errors import ConfigError
from mmdpo_trainers.files.atomic import read_json, write_atomic
from mmdpo_trainers.methods import preset_args
from mmdpo_trainers.processes.progress import Progress
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder

FOLDER, RECORD = "hub", "hub.json"
"""Folder of a run that is uploaded, and the file that says what has been."""


@dataclass(frozen=True)
class Upload:
    """Where a run's model goes, by the names of transformers' TrainingArguments."""

    id: str
    private: bool | None
    revision: str | None


def upload_of(config: RunConfig) -> Upload | None:
    """What `train.args` say of an upload; None: there is none. Raises ConfigError for what a run cannot do."""
    args = preset_args(config)
    for arm, overrides in config.arms.items():
        named = [
            name for name in (overrides.get("train") or {}).get("args") or {} if name == "push_to_hub" or name.startswith("hub_")
        ]
        if named:
            raise ConfigError(
                f"arms.{arm}.train.args.{named[0]}: only the main arm is uploaded; leave it out (`mmdpo export --arm` uploads another)"
            )
    if not args.get("push_to_hub"):
        return None
    if not isinstance(args.get("hub_model_id"), str):
        raise ConfigError(
            f"train.args.hub_model_id: expected the id to upload to, such as me/my-model, got {args.get('hub_model_id')!r}"
        )
    strategy = args.get("hub_strategy", "end")
    if strategy != "end":
        raise ConfigError(
            f"train.args.hub_strategy: expected end, or none, got {strategy!r}: a run uploads what it trained once, with the figures in its card"
        )
    return Upload(args["hub_model_id"], args.get("hub_private_repo"), args.get("hub_revision"))


def check(contexts: Sequence[StageContext], config: RunConfig) -> None:
    """Raise ConfigError, before any work, where the upload at the end of these stages could not be."""
    found = upload_of(config)
    if found is None or not any(context.stage == "train" for context in contexts):
        return
    from mmdpo_trainers.run.export import hub

    if contexts[0].rewards:
        raise ConfigError("train.args.push_to_hub: a reward model's head is part of no model of transformers; leave it out")
    hub.check(found.id, "train.args.push_to_hub to")


def push(run: RunFolder, config: RunConfig, progress: Progress) -> str | None:
    """Export and upload what the main arm trained, unless that has been done; returns its address, or None where there is no upload."""
    found = upload_of(config)
    if found is None:
        return None
    record: dict[str, Any] = {"id": found.id, "revision": found.revision, "trained": run.summary("train")["fingerprint"]}
    done = read_json(run.path / RECORD, missing={})
    if record.items() <= done.items():
        return str(done["url"])
    from mmdpo_trainers.run.export import hub
    from mmdpo_trainers.run.export.source import find_source
    from mmdpo_trainers.run.export.write import Options, export

    folder = run.path / FOLDER
    shutil.rmtree(folder, ignore_errors=True)
    source = find_source(run.path, found.id)
    export(source, folder, Options(adapter_only=source.is_adapter), progress)
    url = hub.upload(folder, found.id, private=found.private, revision=found.revision)
    write_atomic(run.path / RECORD, {**record, "url": url})
    return url
