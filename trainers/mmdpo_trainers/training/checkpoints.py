"""What a trainer writes and reads back: whole checkpoints, adapters and models that `from_pretrained` reads.

Which checkpoints are ours is told by a marker written first, which are whole by one written last that lists every file with its size.
"""

from __future__ import annotations

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor, nn

from mmdpo_trainers.errors import RunFolderError
from mmdpo_trainers.files.atomic import FULL, free_mib, read_json, write_atomic
from mmdpo_trainers.models.quantized import save_settings
from mmdpo_trainers.processes import collectives
from mmdpo_trainers.training.model_parts import base_of
from mmdpo_trainers.training.sharded.sharding import Sharding, whole_shapes
from mmdpo_trainers.training.training_log import LOG_STATE, LoggingTrainer

logger = logging.getLogger(__name__)

STARTED = "started.json"
MARKER = "complete.json"

_NAME = re.compile(r"checkpoint-(\d+)")


def start(folder: str | os.PathLike[str]) -> None:
    """Put an empty checkpoint, marked as begun here, in place of an earlier one.

    Raises RunFolderError where the folder holds something that was not begun here.
    """
    folder = Path(folder)
    if folder.is_dir() and not _is_ours(folder) and any(folder.iterdir()):
        raise RunFolderError(f"{folder} was not written by this trainer; move it away, or train into another folder")
    temporary = folder.with_name(f".{folder.name}.new")
    write_atomic(temporary / STARTED, {})
    replace_folder(temporary, folder)


def _is_ours(folder: Path) -> bool:
    return (folder / STARTED).is_file() or (folder / MARKER).is_file()


def mark_complete(folder: str | os.PathLike[str]) -> None:
    """Flush every file of a checkpoint to disk, then write its marker."""
    folder = Path(folder)
    sizes = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MARKER):
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
        sizes[file.relative_to(folder).as_posix()] = file.stat().st_size
    write_atomic(folder / MARKER, {"files": sizes})


@contextlib.contextmanager
def writing(folder: str | os.PathLike[str]) -> Iterator[None]:
    """Write a checkpoint inside. Raises RunFolderError where the disk is full, naming what is kept."""
    folder = Path(folder)
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        if not _is_full(error):
            raise
        last = newest(folder.parent, other_than=folder)
        kept = "there is none before it" if last is None else f"{last} is whole, and training continues from it"
        raise RunFolderError(
            f"{folder}: the disk is full ({free_mib(folder)} MiB are free), and this checkpoint is half written "
            f"({' '.join(str(error).split())}); {kept}. Make room, or lower save_total_limit, and start again"
        ) from error


def _is_full(error: BaseException) -> bool:
    """Also where a library has put the system's error into words of its own."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    # torch.save reports no reason, only that it could not write.
    words = (
        "No space left",
        "os error 28",
        "File too large",
        "os error 27",
        "quota exceeded",
        "PytorchStreamWriter failed",
        "unexpected pos",
    )
    return any(word.lower() in str(error).lower() for word in words)


def defect(folder: str | os.PathLike[str]) -> str | None:
    """Why a checkpoint cannot be resumed from, or None where it is whole."""
    folder = Path(folder)
    if not (folder / MARKER).is_file():
        return "it was not written to its end"
    try:
        sizes = read_json(folder / MARKER)["files"]
    except RunFolderError as error:
        return str(error)
    for name, size in sizes.items():
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes of {size}"
    return None


def latest_complete(output_dir: str | os.PathLike[str], *, report: Callable[[str], None] = print) -> Path | None:
    """The last whole checkpoint of a folder, or None.

    Each that is not whole is reported; those that `start` began and nobody ended are removed.
    """
    found = []
    for folder in sorted(Path(output_dir).glob("checkpoint-*")):
        match = _NAME.fullmatch(folder.name)
        if match is None or not folder.is_dir():
            continue
        reason = defect(folder)
        if reason is None:
            found.append((int(match[1]), folder))
        elif (folder / MARKER).exists():
            report(f"{folder}: skipped, {reason}")
        elif (folder / STARTED).is_file():
            report(f"{folder}: removed, {reason}")
            _remove(folder)
        else:
            report(f"{folder}: skipped, it was not written by this trainer")
    return max(found)[1] if found else None


def newest(output_dir: str | os.PathLike[str], *, other_than: Path | None = None) -> Path | None:
    """The whole checkpoint completed last, or None; nothing is reported or removed."""
    whole = [path for path in Path(output_dir).glob("checkpoint-*") if path != other_than and defect(path) is None]
    return max(whole, key=lambda path: (path / MARKER).stat().st_mtime_ns, default=None)


def remove_old(output_dir: str | os.PathLike[str], limit: int | None, *, keep: str | None = None) -> None:
    """Remove the checkpoints completed first until `limit` complete ones are left, never `keep`.

    Folders without the last marker are neither counted nor removed. limit: None or 0 removes nothing.
    """
    if not limit:
        return
    markers = sorted(Path(output_dir).glob(f"checkpoint-*/{MARKER}"), key=lambda marker: marker.stat().st_mtime_ns)
    folders = [marker.parent for marker in markers if _NAME.fullmatch(marker.parent.name)]
    removable = [folder for folder in folders[:-1] if keep is None or folder != Path(keep)]
    for folder in removable[: max(len(folders) - limit, 0)]:
        _remove(folder)


def _remove(folder: Path) -> None:
    """Under another name first: a kill must not leave a checkpoint without its markers."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def replace_folder(temporary: Path, final: Path) -> None:
    """Put a finished folder in its place. After a kill, `final` is the old one, the new one, or not there; never half of one."""
    if final.exists():
        doomed = final.with_name(f".{final.name}.old")
        shutil.rmtree(doomed, ignore_errors=True)
        os.replace(final, doomed)
        os.replace(temporary, final)
        shutil.rmtree(doomed)
    else:
        os.replace(temporary, final)


class SavingTrainer(LoggingTrainer):
    """`transformers.Trainer` with whole checkpoints, and weights by the names that models save them under."""

    sharding: Sharding

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        averages, loss = self._averages["train"].state(), collectives.all_gather(self._tr_loss.item())
        self.sharding.complete_optimizer(self.optimizer)
        with writing(folder):
            if self.args.process_index == 0:
                start(folder)
            collectives.barrier()
            limit, self.args.save_total_limit = self.args.save_total_limit, None
            try:
                # Its own removal of old checkpoints would not wait for the marker, nor spare what others wrote.
                super()._save_checkpoint(model, trial)
            finally:
                self.args.save_total_limit = limit
            # Every process has written what is its own.
            collectives.barrier()
            if self.args.process_index == 0:
                state = {
                    "loss": sum(loss) / len(loss),
                    "last_logged": self._globalstep_last_logged,
                    "averages": averages,
                    **self._further_state(),
                }
                write_atomic(folder / LOG_STATE, state)
                mark_complete(folder)
                remove_old(folder.parent, limit, keep=self.state.best_model_checkpoint)
            collectives.barrier()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `transformers.Trainer`: an adapter or a whole model that `from_pretrained` reads, gathered where weights are in shards."""
        if self.is_fsdp_enabled and not _internal_call:
            # By itself it writes nothing where checkpoints are in shards.
            state = self.accelerator.get_state_dict(self.model)
            self._save(output_dir, state_dict=state)
        else:
            super().save_model(output_dir, _internal_call)
        collectives.barrier()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Tensor] | None = None) -> None:
        """As in `transformers.Trainer`; a tied weight once, also where gathering has made two of it."""
        if state_dict is not None and not isinstance(self.model, PeftModel):
            once = dict(self.model.named_parameters())  # type: ignore[union-attr]
            twice = [name for name, _ in self.model.named_parameters(remove_duplicate=False) if name not in once]  # type: ignore[union-attr]
            state_dict = {name: tensor for name, tensor in state_dict.items() if name not in twice}
        policy: Any = self.model
        with whole_shapes(policy):
            super()._save(output_dir, state_dict)
        # transformers calls this in every process.
        if self.args.should_save:
            save_settings(base_of(policy).config, output_dir or str(self.args.output_dir))

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """As in `transformers.Trainer`; a whole model by `from_pretrained`, which knows under what names weights are saved."""
        target: Any = model if model is not None else self.model
        if isinstance(target, PeftModel) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            saved = type(target).from_pretrained(resume_from_checkpoint, dtype="auto", local_files_only=True)
            target.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        if isinstance(self.model, PeftModel) or self.is_fsdp_enabled or self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self._load_from_checkpoint(str(self.state.best_model_checkpoint))

    def _latest_checkpoint(self) -> str | None:
        """The last whole checkpoint. Looked for by one process, as what is half is removed."""
        folder = str(self.args.output_dir)
        found = latest_complete(folder, report=logger.warning) if self.args.process_index == 0 else None
        return collectives.all_gather(None if found is None else str(found))[0]

    def _kept(self) -> str:
        """What a message says of the checkpoints so far."""
        folder = str(self.args.output_dir)
        found = collectives.all_gather(newest(folder) if self.args.process_index == 0 else None)[0]
        return "there is no checkpoint yet" if found is None else f"{found} is whole, and training continues from it"
