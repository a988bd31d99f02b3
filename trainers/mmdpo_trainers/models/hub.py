"""A model by its name: a shipped one, a local folder, or an id on the Hugging Face hub, which is a folder of the local cache in the end.

Files are data alone: weights, settings, tokenizer, chat template. No program of a repository is fetched or run.
"""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

from huggingface_hub import constants, errors, snapshot_download

from mmdpo_trainers.config.shipped import SHIPPED
from mmdpo_trainers.errors import StageError

MAIN = constants.DEFAULT_REVISION
_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")
_SETTINGS = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken", "README.md", "LICENSE*")
"""Its licence among them, which an export states."""
_WEIGHTS = ("*.safetensors",)
_OLD_WEIGHTS = ("pytorch_model*.bin",)
"""Fetched where a repository has nothing else."""
_OTHERS = ("onnx/*", "original/*", "consolidated*")
"""The same weights in layouts of other programs."""


def is_hub_id(model: str | Path) -> bool:
    """Whether a model's name can only be an id on the hub: owner/name, where there is no such folder."""
    return isinstance(model, str) and _ID.fullmatch(model) is not None and not Path(model).is_dir() and model not in SHIPPED


def resolve_model_path(path: str | Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder that a `--model` value means.

    path: a shipped model's name, a local folder, or the id of a model on the hub: then the folder in the Hugging Face cache (`HF_HOME`),
    where what is wanted lies there, else it is downloaded. revision: of an id, the branch, tag or commit; None: main, as it is in the
    cache. weights: False where settings and tokenizer are enough.

    Raises StageError where there is none, saying what was looked for and what to do.
    """
    if is_hub_id(path):
        return _hub_folder(str(path), revision or MAIN, weights)
    if revision is not None:
        raise StageError(
            f"revision: expected none beside a folder, got {revision!r} with model {str(path)!r}; it is for an id on the hub"
        )
    if str(path) in SHIPPED:
        folder = SHIPPED[str(path)]
        if not folder.is_dir():
            raise StageError(f"the shipped base model is not installed ({folder} is missing); give --model a folder")
        return folder
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise StageError(
            f"model {str(path)!r}: no such folder here ({folder.absolute()}), and no id on the Hugging Face hub, which is owner/name; give "
            f"--model one of these (`hf download OWNER/NAME --local-dir FOLDER` makes a folder), or {', '.join(SHIPPED)}"
        )
    return folder


def commit_of(folder: Path) -> str | None:
    """The commit that a folder of the Hugging Face cache holds; None for any other folder."""
    return folder.name if folder.parent.name == "snapshots" else None


def _hub_folder(model: str, revision: str, weights: bool) -> Path:
    """The snapshot in the cache, with all that is wanted in it."""
    cached = _cached(model, revision)
    if cached is not None and not _lacking(cached, weights):
        return cached
    try:
        found = _download(model, revision, weights)
    except Exception as error:  # whatever the network library of the day raises
        raise StageError(_explained(model, revision, error, cached, weights)) from error
    if _lacking(found, weights):
        # Without network huggingface_hub hands out what is in the cache, whole or not.
        raise StageError(_explained(model, revision, None, found, weights))
    return found


def _cached(model: str, revision: str) -> Path | None:
    with contextlib.suppress(errors.LocalEntryNotFoundError, errors.HFValidationError):
        return Path(snapshot_download(model, revision=revision, local_files_only=True, allow_patterns=["config.json"]))
    return None


def _download(model: str, revision: str, weights: bool) -> Path:
    def fetch(patterns: tuple[str, ...]) -> Path:
        return Path(snapshot_download(model, revision=revision, allow_patterns=list(patterns), ignore_patterns=list(_OTHERS)))

    folder = fetch((*_SETTINGS, *(_WEIGHTS if weights else ())))
    if weights and "weights" in _lacking(folder, weights):
        folder = fetch((*_SETTINGS, *_OLD_WEIGHTS))
    return folder


def _lacking(folder: Path, weights: bool) -> list[str]:
    """What of a whole checkpoint is not in a folder, in words."""

    def some(*names: str) -> bool:
        return any(path.is_file() for name in names for path in folder.glob(name))

    lacking = [] if some("config.json") else ["config.json"]
    if not some("processor_config.json", "preprocessor_config.json"):
        lacking.append("processor_config.json or preprocessor_config.json")
    if not some("tokenizer.json", "tokenizer.model", "vocab.json"):
        lacking.append("tokenizer.json")
    if weights and not (some(*_WEIGHTS, *_OLD_WEIGHTS) and all((folder / name).is_file() for name in _shards(folder))):
        lacking.append("weights")
    return lacking


def _shards(folder: Path) -> set[str]:
    """Files that an index of weights names; the first index counts, as for transformers."""
    for name in ("model.safetensors.index.json", "pytorch_model.bin.index.json"):
        if (folder / name).is_file():
            values: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
            return set(values.get("weight_map", {}).values())
    return set()


def _explained(model: str, revision: str, error: Exception | None, cached: Path | None, weights: bool) -> str:
    """One line about a model that is not in the cache and was not downloaded."""
    where = f"the Hugging Face cache ({constants.HF_HUB_CACHE})"
    there = (
        f"no revision {revision} in {where}" if cached is None else f"no {' and no '.join(_lacking(cached, weights))} in {cached}"
    )
    looked = f"model {model!r}: no such folder here, {there}"
    named = "" if revision == MAIN else f" --revision {revision}"
    by_hand = f"`hf download {model}{named}` where there is network, or give --model a folder"
    if isinstance(error, errors.GatedRepoError):
        return f"{looked}, and the hub wants its terms accepted: do that at {constants.ENDPOINT}/{model}, then `hf auth login`"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{looked}, nor on the hub; give a branch, tag or commit that the model has there"
    if isinstance(error, errors.RepositoryNotFoundError):
        return f"{looked}, and no such model on the hub that is open to you; mend the id, or `hf auth login` where it is private"
    if constants.HF_HUB_OFFLINE:
        return f"{looked}, and HF_HUB_OFFLINE keeps it from being downloaded; unset that, or {by_hand}"
    if error is None:
        return f"{looked}, and the hub has none there either, or was not reached; give the id of a whole checkpoint, or {by_hand}"
    cause = error.__cause__ or error
    return f"{looked}, and it cannot be downloaded from {constants.ENDPOINT} ({type(cause).__name__}: {cause}); {by_hand}"
