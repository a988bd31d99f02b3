"""The reference model's log-probabilities, computed once and kept in a file beside the data, by content of the records."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmdpo_trainers.data.pair_records import record_name
from mmdpo_trainers.errors import DataError, RunFolderError, StaleCacheError
from mmdpo_trainers.files.fingerprint import Fingerprint
from mmdpo_trainers.processes import collectives, ranks
from mmdpo_trainers.processes.progress import Progress
from mmdpo_trainers.training import head, model_parts
from mmdpo_trainers.training.batches.collator import PreferenceBatch, PreferenceCollator
from mmdpo_trainers.training.batches.packing import batch_tokens, group_batches, measure, pack_by_tokens

logger = logging.getLogger(__name__)

_OPENING = b'{"reference_cache": '
_BLOCK = 64 * 2**20
_VOLATILE = frozenset({"_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures"})

Logps = dict[str, float]
"""Branch -> summed log-probability of its response."""


class ReferenceCache:
    """Log-probabilities of the reference by content key, in a JSON-lines file.

    The first line is the header: what the numbers depend on beside the records (see `reference_header`). Every other line is one
    record, `{"key": …, "logps": {branch: number}}`; numbers come back exactly. A key covers all that the reference saw of its
    record, so a record that was changed has another one and is missing here. Whole lines are appended under a lock and flushed to
    disk: a kill at any byte loses what was being written and nothing else, and several processes may share the file. The first
    number written for a key stays.

    Args:
        path: the file; made by the first `add`.
        header: JSON-able.

    Raises StaleCacheError naming what changed where the file has another header; RunFolderError where it is no such file.
    """

    def __init__(self, path: str | os.PathLike[str], header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.header: dict[str, Any] = json.loads(json.dumps(dict(header)))
        self._logps: dict[str, Logps] = {}
        self._file: BinaryIO | None = None
        """Kept open: as long as it is, no other file can get its inode number."""
        self._end = 0
        """Where the part of the file that was read ends."""
        self.follow()

    def __len__(self) -> int:
        return len(self._logps)

    def __contains__(self, key: str) -> bool:
        return key in self._logps

    def missing(self, keys: Iterable[str]) -> list[str]:
        """Those keys that are not in the cache, each once, in order."""
        return [key for key in dict.fromkeys(keys) if key not in self._logps]

    def get(self, key: str) -> Logps:
        """Branch -> log-probability. Raises KeyError where the key is not in the cache."""
        if key not in self._logps:
            raise KeyError(f"{self.path} holds no record with key {key}; its content changed since the reference was run over it")
        return self._logps[key]

    def add(self, logps: Mapping[str, Logps]) -> None:
        """Append records and wait until they are on disk; keys that the file holds by now keep what they have.

        Raises ValueError naming key and branch of a value that is not finite; StaleCacheError where another process has put a
        cache with another header in place of this one.
        """
        for key, branches in logps.items():
            for branch, value in branches.items():
                if not math.isfinite(value):
                    raise ValueError(f"logps: expected finite numbers, got {value} for {branch} of key {key}")
        with self._locked() as file:
            os.ftruncate(file.fileno(), self._end)
            fresh = {key: dict(logps[key]) for key in self.missing(logps)}
            lines: list[dict[str, Any]] = [] if self._end else [{"reference_cache": self.header}]
            lines += [{"key": key, "logps": values} for key, values in fresh.items()]
            data = "".join(json.dumps(line) + "\n" for line in lines).encode()
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            self._end += len(data)
            self._logps.update(fresh)

    def follow(self) -> None:
        """Read what other processes appended."""
        if self.path.exists():
            self._follow(self.path.open("rb"))

    def part(self, rank: int) -> ReferenceCache:
        """The file in which one of several processes keeps what it computes until `merge`."""
        return ReferenceCache(self.path.with_name(f"{self.path.name}.part-{rank}"), self.header)

    def merge(self) -> None:
        """Append what parts hold and remove them, those of a pass that was killed included, and what another launch has so far."""
        for path in sorted(self.path.parent.glob(f"{self.path.name}.part-*")):
            try:
                part = ReferenceCache(path, self.header)
                # Until it is gone nobody appends to it: who holds it open begins it anew.
                with part._locked():
                    self.add(part._logps)
                    path.unlink()
            except StaleCacheError:
                logger.warning("%s: removed, it is of another reference", path)
                path.unlink()

    @contextlib.contextmanager
    def _locked(self) -> Iterator[BinaryIO]:
        """The file, for appending by this process alone, with all that others appended read."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            file = self.path.open("a+b")
            fcntl.flock(file, fcntl.LOCK_EX)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), self.path.stat()):
                    break
            # It was replaced while this process waited.
            file.close()
        try:
            self._follow(file)
            yield file
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)

    def _follow(self, file: BinaryIO) -> None:
        """Read on where reading ended; from the start where the file is another one than before."""
        stat = os.fstat(file.fileno())
        if self._file is None or not os.path.samestat(os.fstat(self._file.fileno()), stat):
            self._end, self._logps = 0, {}
        if self._file is not None:
            self._file.close()
        self._file = file
        file.seek(self._end)
        for line in file:
            entry = self._parse(line, is_last=self._end + len(line) >= stat.st_size)
            if entry is None:
                break
            if self._end == 0:
                self._check_header(entry)
            else:
                self._logps.setdefault(str(entry["key"]), entry["logps"])
            self._end += len(line)

    def _parse(self, line: bytes, *, is_last: bool) -> dict[str, Any] | None:
        """One line; None: it was not wholly written."""
        try:
            entry = json.loads(line) if line.endswith(b"\n") else None
        except (json.JSONDecodeError, UnicodeDecodeError):
            entry = None
        if entry is None and is_last:
            return None
        expected = "reference_cache" if self._end == 0 else "logps"
        if not isinstance(entry, dict) or expected not in entry:
            raise RunFolderError(
                f"{self.path}, byte {self._end}: expected a line of cached reference log-probabilities, got {line[:60]!r}; delete the "
                "file to have it computed anew, or give reference_cache another path"
            )
        return entry

    def _check_header(self, entry: Mapping[str, Any]) -> None:
        changes = Fingerprint(self.header).differences(entry["reference_cache"])
        if changes:
            raise StaleCacheError(
                f"{self.path} was computed with another reference ({'; '.join(changes)}), so its log-probabilities do not hold. Run "
                "`mmdpo reference --refresh`, or delete the file, to compute them anew; or give reference_cache another path"
            )


def remove_cache(path: str | os.PathLike[str]) -> None:
    """Delete a cache, where there is one. Raises RunFolderError where the file is something else."""
    path = Path(path)
    if not path.exists():
        return
    with path.open("rb") as file:
        found = file.read(len(_OPENING))
    if found != _OPENING[: len(found)]:
        raise RunFolderError(f"{path} is no cache of reference log-probabilities and stays; give reference_cache another path")
    path.unlink()


def reference_header(model: nn.Module, *, processor: Any = None, autocast: str | bool = False) -> dict[str, Any]:
    """What cached log-probabilities depend on beside the records: a `ReferenceCache`'s header.

    model: the reference; a PEFT model stands for its base. processor: how pictures are scaled and normalised. autocast: the
    number type of its forward passes, where that is not the weights'.
    """
    base = model_parts.base_of(model)
    header = {
        "weights": model_fingerprint(model),
        "dtype": str(next(base.parameters()).dtype).removeprefix("torch."),
        "config": _digest(_lasting(base.config.to_diff_dict())) if hasattr(base, "config") else None,
        "autocast": autocast,
    }
    if processor is not None:
        header["pictures"] = _digest(processor.image_processor.to_dict())
    return header


def model_fingerprint(model: nn.Module) -> str:
    """Hash (xxh3, 128 bits) of a model's weights and persistent buffers: names, dtypes, shapes and bytes; adapters left out.

    The same whether or not the model is in PEFT or patched, and on whatever device it is. About as fast as memory is read.
    """
    weights = _weights(model_parts.base_of(model))
    with ThreadPoolExecutor(min(4, torch.get_num_threads())) as pool:
        # Tied weights have several names and one content.
        contents = {(t.data_ptr(), t.dtype, t.shape, t.stride(), t.device): t for t in weights.values()}
        digests = dict(zip(contents, pool.map(_content, contents.values()), strict=True))
    whole = xxhash.xxh3_128()
    for name, t in sorted(weights.items()):
        content = digests[t.data_ptr(), t.dtype, t.shape, t.stride(), t.device]
        whole.update(f"{name} {t.dtype} {tuple(t.shape)} {content}\n".encode())
    return whole.hexdigest()


@dataclass(frozen=True, kw_only=True)
class Precomputed:
    """What `precompute` did."""

    records: int
    computed: int
    cached: int
    """Records found in the cache, or the same in content as another one."""
    tokens: int
    seconds: float

    def __str__(self) -> str:
        found = f"{self.records} records: {self.cached} cached"
        return f"{found}, {self.computed} computed in {_duration(self.seconds)}" if self.computed else found


@torch.no_grad()
def precompute(
    cache: ReferenceCache,
    model: nn.Module,
    collator: PreferenceCollator,
    dataset: Any,
    *,
    max_tokens: int | None = None,
    batch_size: int = 8,
    autocast: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext,
    num_workers: int = 0,
    progress: Progress | None = None,
    logps: Callable[[PreferenceBatch], Tensor] | None = None,
    in_step: bool = False,
) -> Precomputed:
    """Run the reference over the records that the cache does not hold, appending each batch to it.

    Records about the same pictures are run together, batches with the most tokens first, so that one too large for the device shows
    at once. Several processes deal the batches out; each appends to a part of its own, and the first one merges them.

    Args:
        model: computes the reference as it is: a PEFT model with its adapter off, or a model of its own.
        collator: makes the batches, with the corruptions that the reference is to see; its `key` names the records.
        dataset: records by index.
        max_tokens: tokens of a batch, needs a collator of trees; a longer record is run by itself. None: `batch_size` records.
        autocast: the context of forward passes; the output head stays out of it.
        num_workers: processes that prepare batches while the model runs.
        logps: (n, b) log-probabilities of a batch, in place of the model's own forward.
        in_step: the model's weights are in shards, so that all processes must run as many batches.

    Raises DataError naming the record that cannot be used, or whose log-probability is not finite.
    """
    progress = progress or Progress()
    started = time.monotonic()
    _merge(cache)
    keys = []
    with progress.task("reference: look up records", total=len(dataset)) as task:
        for index in range(len(dataset)):
            keys.append(collator.key(dataset[index]))
            task.advance()
    # One list for all: another launch may append to the cache between two readings of it.
    wanted = set(collectives.gathered(cache.missing(keys))[0])
    if not wanted:
        return Precomputed(records=len(keys), computed=0, cached=len(keys), tokens=0, seconds=time.monotonic() - started)
    # The first record of each content.
    firsts = sorted(dict(zip(reversed(keys), reversed(range(len(keys))), strict=True)).values())
    # Batches are made of all records: continued after a kill they are those of an undisturbed pass, and so is the last bit.
    batches, costs = _batches(dataset, firsts, collator, max_tokens, batch_size, progress)
    due = [number for number, batch in enumerate(batches) if any(keys[index] in wanted for index in batch)]
    tokens = sum(costs[number] for number in due)
    mine = _share(due, in_step=in_step)
    batches, costs = [batches[number] for number in mine], [costs[number] for number in mine]
    as_seen = functools.partial(collator.batch, model="reference")
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=as_seen, num_workers=num_workers)  # type: ignore[arg-type]
    device = next(model.parameters()).device
    target = cache.part(ranks.rank()) if collectives.several() else cache
    left = sum(costs)
    with progress.task("reference", total=sum(map(len, batches))) as task:
        begun = time.monotonic()
        for indices_of_batch, cost, on_cpu in zip(batches, costs, loader, strict=True):
            batch: PreferenceBatch = on_cpu.to(device)
            if logps is not None:
                found = logps(batch)
            else:
                with autocast():
                    hidden = model_parts.hidden_states(model, batch, model_parts.picture_features(model, batch))
                found = head.response_logps(model, hidden, batch)
            rows = found.double().tolist()
            for index, row in zip(indices_of_batch, rows, strict=True):
                _check_finite(dataset[index], dict(zip(batch.branches, row, strict=True)))
            # The batch's own keys: they are of what was run, even if a file changed since the records were looked up.
            target.add({key: dict(zip(batch.branches, row, strict=True)) for key, row in zip(batch.keys, rows, strict=True)})
            left -= cost
            remaining = (time.monotonic() - begun) * left / (sum(costs) - left)
            task.advance(len(indices_of_batch), f"about {_duration(remaining)} left" if left else "")
    _merge(cache)
    return Precomputed(
        records=len(keys),
        computed=len(wanted),
        cached=len(keys) - len(wanted),
        tokens=tokens,
        seconds=time.monotonic() - started,
    )


def _merge(cache: ReferenceCache) -> None:
    """Bring the parts of all processes, of this pass or of a killed one, into the cache, and read it in every process."""
    if collectives.several():
        ranks.barrier()
    if not collectives.several() or ranks.is_main():
        cache.merge()
    if collectives.several():
        ranks.barrier()
        cache.follow()


def _share(numbers: list[int], *, in_step: bool) -> list[int]:
    """Those of a list that this process does; in_step: with the last again where others have one more."""
    if not collectives.several():
        return numbers
    world = ranks.world_size()
    share = numbers[ranks.rank() :: world]
    return share + numbers[-1:] * (in_step and len(share) < -(-len(numbers) // world))


def _batches(
    dataset: Any,
    indices: list[int],
    collator: PreferenceCollator,
    max_tokens: int | None,
    batch_size: int,
    progress: Progress,
) -> tuple[list[list[int]], list[int]]:
    """Batches of dataset indices with their tokens, the largest first."""
    sizes = measure(dataset, collator, indices, progress)
    if max_tokens is None:
        batches = group_batches(sizes.groups, batch_size)
    else:
        budget = max(max_tokens, *sizes.lengths)
        batches = pack_by_tokens(sizes.lengths, budget, groups=sizes.groups, shared=sizes.shared)
    costs = {number: batch_tokens(batch, sizes.lengths, sizes.groups, sizes.shared) for number, batch in enumerate(batches)}
    order = sorted(costs, key=lambda number: -costs[number])
    return [[indices[place] for place in batches[number]] for number in order], [costs[number] for number in order]


def _check_finite(record: Mapping[str, Any], logps: Logps) -> None:
    for branch, value in logps.items():
        if not math.isfinite(value):
            raise DataError(
                f"record {record_name(record)}: the reference's log-probability of {branch} is {value}; load the model in a wider "
                "number type (dtype), or remove the record"
            )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _weights(base: nn.Module) -> dict[str, Tensor]:
    """The state dict under the names it had before PEFT put its layers in, without what they added."""
    inner: dict[str, str] = {}
    for name, module in base.named_modules():
        if isinstance(module, BaseTunerLayer):
            inner[f"{name}."] = f"{name}.base_layer."
        elif isinstance(module, TrainableTokensWrapper):
            # Its own name for the wrapped module is not in the state dict.
            inner[f"{name}."] = f"{name}.token_adapter."
        elif isinstance(module, AuxiliaryTrainingWrapper):
            inner[f"{name}."] = f"{name}.original_module."
    # Inner layers first: what is around them opens their names too.
    layers = sorted(inner.items(), key=lambda layer: -len(layer[0]))
    found = {}
    for name, tensor in base.state_dict().items():
        own = _name_without_adapters(name, layers)
        if own is not None and isinstance(tensor, Tensor):
            found[own] = tensor
    return found


def _name_without_adapters(name: str, layers: Sequence[tuple[str, str]]) -> str | None:
    """A state-dict name without the layers PEFT put around modules; None: it belongs to one of these layers."""
    for outer, kept in layers:
        if name.startswith(outer):
            if not name.startswith(kept):
                return None
            name = outer + name.removeprefix(kept)
    return name


def _content(tensor: Tensor) -> str:
    """Hash of a tensor's bytes."""
    flat = tensor.detach().contiguous().reshape(-1).view(torch.uint8) if tensor.numel() else torch.empty(0, dtype=torch.uint8)
    digest = xxhash.xxh3_128()
    for block in flat.split(_BLOCK):
        digest.update(memoryview(block.cpu().numpy()))
    return digest.hexdigest()


def _lasting(values: dict[str, Any]) -> dict[str, Any]:
    """A model configuration without what does not change its numbers."""
    return {
        name: _lasting(value) if isinstance(value, dict) else value
        for name, value in values.items()
        if name not in _VOLATILE and not name.startswith("_attn")
    }


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()[:32]
