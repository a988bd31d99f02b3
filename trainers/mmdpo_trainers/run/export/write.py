"""Writing an export: checks, base and adapter, merge, files, card, comparison; the folder is there whole, or not at all."""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mmdpo_trainers.answers.config_only import config_only
from mmdpo_trainers.errors import ConfigError, StageError
from mmdpo_trainers.files.atomic import FULL, free_mib, read_json, write_atomic
from mmdpo_trainers.files.locks import take
from mmdpo_trainers.models import quantized
from mmdpo_trainers.models.loading import load_model, resolve_dtype
from mmdpo_trainers.models.merged import adapted, check_empty, merge
from mmdpo_trainers.models.published import SHARD, copy_files, weight_bytes, write_weights
from mmdpo_trainers.processes.progress import Progress
from mmdpo_trainers.run.export import card, hub, lmms_eval, verify
from mmdpo_trainers.run.export.source import Source

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin", quantized.FILE)
_STEPS = 5


@dataclass(frozen=True, kw_only=True)
class Options:
    """How something is exported."""

    dtype: str = "auto"
    """Number type of the weights; auto: the base's own."""
    device: str = "auto"
    """Where they are merged and compared."""
    adapter_only: bool = False
    """The adapter by itself, for PEFT and vLLM's LoRA, in place of a whole model."""
    max_shard_size: str = SHARD
    verify: bool = True
    push_to_hub: str | None = None
    """Id on the Hub that the folder is uploaded to."""
    private: bool | None = None
    """Whether a repository that is made for it is private; None: the account's own default."""
    lmms_eval: str | None = None
    """Folder for evaluation prompts as a task of lmms-eval."""
    lmms_eval_input: str | None = None
    """Prompts with answers for it, in place of the run's own."""


def export(source: Source, out: str | Path, options: Options = Options(), progress: Progress | None = None) -> Path:
    """Write what `source` is to the folder `out`, which is returned. Raises MmdpoError; whatever happens, `out` is whole or not there."""
    target, progress = Path(out).expanduser().absolute(), progress or Progress()
    _check(source, target, options)
    lmms_eval.check(source, options.lmms_eval, options.lmms_eval_input)
    if options.push_to_hub is not None:
        hub.check(options.push_to_hub)
    with _in_place(target) as folder, progress.task("export", _STEPS) as task:
        if options.adapter_only:
            verdict = None
            _copy_adapter(source, folder)
        else:
            verdict = _write_model(source, folder, options, task)
        task.advance(note="model card")
        card.write(source, folder, verdict=verdict, adapter_only=options.adapter_only)
    said = "not compared with base and adapter" if verdict is None else str(verdict)
    progress.print(f"{out}: {said}" if not options.adapter_only else f"{out}: the adapter, to be read beside {source.name}")
    if options.lmms_eval is not None:
        date = None if source.context is None else source.context.date
        progress.print(lmms_eval.write_task(source, config_only(source.base, date), options.lmms_eval, options.lmms_eval_input))
    if options.push_to_hub is not None:
        url = hub.upload(target, options.push_to_hub, private=options.private)
        progress.print(f"uploaded to {url}")
    return target


def _check(source: Source, target: Path, options: Options) -> None:
    check_empty(target)
    resolve_dtype(options.dtype)
    if options.adapter_only and not source.is_adapter:
        raise ConfigError(f"--adapter-only: {source.trained} is a whole model, of which no adapter was trained; leave it out")
    needed = _bytes(source, options) // 2**20
    free = free_mib(target.parent)
    if needed >= free:
        raise StageError(
            f"{target}: the export takes about {needed:,} MiB, and {free:,} MiB are free there; make room, or export to another disk"
        )


def _bytes(source: Source, options: Options) -> int:
    if options.adapter_only:
        return sum((source.trained / name).stat().st_size for name in _ADAPTER_FILES if (source.trained / name).is_file())
    dtype = resolve_dtype(options.dtype)
    return weight_bytes(source.base if source.is_adapter else source.trained, None if isinstance(dtype, str) else dtype)


@contextlib.contextmanager
def _in_place(target: Path) -> Iterator[Path]:
    """A folder beside `target` that becomes it once the block is through; what an earlier, interrupted export left there goes."""
    temporary, lock = (target.parent / f".{target.name}.{kind}" for kind in ("exporting", "lock"))
    target.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("ab") as file:
        take(file, lambda: f"{target} is being written by another process; wait for it, or choose another folder")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        try:
            yield temporary
            _flush(temporary)
            if target.is_dir():
                target.rmdir()
            os.replace(temporary, target)
        except OSError as error:
            if error.errno not in FULL:
                raise
            raise StageError(
                f"{target} cannot be written: the disk is full ({free_mib(target)} MiB are free there); make room"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            lock.unlink(missing_ok=True)


def _flush(folder: Path) -> None:
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())


def _write_model(source: Source, folder: Path, options: Options, task: Any) -> verify.Verdict | None:
    """The merged or whole model, in the form that its base has; what came of the comparison."""
    task.advance(note="reading the model")
    date = None if source.context is None else source.context.date
    kind: dict[str, Any] = {"dtype": options.dtype, "device": options.device, "date": date}
    if source.is_adapter:
        loaded = load_model(source.base, **kind)
        model = adapted(loaded, source.trained)
    else:
        loaded, model = load_model(source.trained, processor=source.base, **kind), None
    expected = None
    if options.verify:
        task.advance(note="answers of base and adapter")
        expected = verify.expected_of(loaded, source.context)
    task.advance(note="merging and writing")
    if model is not None:
        loaded = merge(loaded, model)
        del model
    if expected is not None:
        expected = verify.with_merged(expected, loaded, source.is_adapter)
    write_weights(loaded.model, folder, max_shard_size=options.max_shard_size)
    copy_files(source.base, folder, loaded.dtype)
    if expected is None:
        return None
    task.advance(note="reading it back")
    # There is room for the model once.
    del loaded
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return verify.verify(folder, expected)


def _copy_adapter(source: Source, folder: Path) -> None:
    for name in _ADAPTER_FILES:
        if (source.trained / name).is_file():
            shutil.copyfile(source.trained / name, folder / name)
    settings = folder / _ADAPTER_FILES[0]
    # The folder on this machine, which is nobody else's.
    write_atomic(settings, {**read_json(settings), "base_model_name_or_path": source.name})
    copy_files(source.base, folder)
