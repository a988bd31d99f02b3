"""The reference's pass over the data: once over every record that its cache does not hold."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from mmdpo_trainers.data.pair_records import record_name
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.processes import collectives, ranks
from mmdpo_trainers.processes.progress import Progress
from mmdpo_trainers.training import head, model_parts
from mmdpo_trainers.training.batches.collator import PreferenceBatch, PreferenceCollator
from mmdpo_trainers.training.batches.packing import batch_tokens, group_batches, measure, pack_by_tokens
from mmdpo_trainers.training.config import PreferenceConfig
from mmdpo_trainers.training.reference.cache import Logps, ReferenceCache
from mmdpo_trainers.training.reference.model_hash import reference_header
from mmdpo_trainers.training.reference.reference import Reference
from mmdpo_trainers.training.sharded.sharding import check_whole

_LOOKED_UP = 64
"""Records whose pictures are decoded side by side."""


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


class ReferencePass:
    """The passes of a trainer's reference, over each dataset once.

    Args:
        args: of the trainer; nothing is done unless they ask for cached log-probabilities and a loss looks at the reference.
        processor: the model's.
        autocast, logps: as of `precompute`.
        in_shards: whether weights are whole only while their module runs.
    """

    def __init__(
        self,
        args: PreferenceConfig,
        *,
        processor: Any,
        progress: Progress,
        autocast: Callable[[], contextlib.AbstractContextManager[Any]],
        logps: Callable[[PreferenceBatch], Tensor],
        in_shards: bool,
    ) -> None:
        self.args, self.processor, self.progress = args, processor, progress
        self.autocast, self.logps, self.in_shards = autocast, logps, in_shards
        self._known: dict[int, Any] = {}
        """Datasets whose records the cache holds."""
        self._header: dict[str, Any] | None = None

    @property
    def _wanted(self) -> bool:
        return self.args.precompute_ref_log_probs and self.args.needs_reference

    def name(self, model: nn.Module) -> None:
        """Take the hash of the reference's weights, which needs them whole: before they are put in shards."""
        if self._wanted and self._header is None:
            self._header = self._header_of(model)

    def over(self, reference: Reference, collator: PreferenceCollator, datasets: Sequence[Any]) -> list[Precomputed]:
        """Run the reference over what is new in datasets. Raises StaleCacheError where the cache was made by another reference."""
        args = self.args
        results: list[Precomputed] = []
        if not self._wanted:
            return results
        new = [each for each in datasets if each is not None and id(each) not in self._known]
        with reference.active() if new else contextlib.nullcontext():
            if reference.cache is None:
                reference.cache = ReferenceCache(args.reference_path, self._header or self._header_of(reference.model))
                collator.runs_reference = False
            for dataset in new:
                done = precompute(
                    reference.cache,
                    reference.model,
                    collator,
                    dataset,
                    max_tokens=args.max_tokens_per_batch,
                    batch_size=args.per_device_eval_batch_size,
                    autocast=self.autocast,
                    num_workers=args.dataloader_num_workers,
                    progress=self.progress,
                    logps=self.logps,
                    in_step=self.in_shards,
                )
                self.progress.print(f"reference: {done}")
                self._known[id(dataset)] = dataset
                results.append(done)
        return results

    def _header_of(self, model: nn.Module) -> dict[str, Any]:
        check_whole(model, "precompute_ref_log_probs names the reference by its weights")
        autocast = "bfloat16" if self.args.bf16 else "float16" if self.args.fp16 else False
        return reference_header(model, processor=self.processor, autocast=autocast)


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
        for start in range(0, len(dataset), _LOOKED_UP):
            records = [dataset[index] for index in range(start, min(start + _LOOKED_UP, len(dataset)))]
            collator.learn_keys(records)
            for record in records:
                keys.append(collator.key(record))
                task.advance()
    # One list for all: another launch may append to the cache between two readings of it.
    wanted = set(collectives.all_gather(cache.missing(keys))[0])
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
    target = cache.part(ranks.rank()) if collectives.is_distributed() else cache
    left = sum(costs)
    with progress.task("reference", total=sum(map(len, batches))) as task:
        begun = time.monotonic()
        for indices_of_batch, cost, on_cpu in zip(batches, costs, loader, strict=True):
            batch: PreferenceBatch = on_cpu.to(device)
            found = _logps(model, batch, autocast) if logps is None else logps(batch)
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


def _logps(model: nn.Module, batch: PreferenceBatch, autocast: Callable[[], contextlib.AbstractContextManager[Any]]) -> Tensor:
    with autocast():
        hidden = model_parts.hidden_states(model, batch, model_parts.image_features(model, batch))
    return head.response_logps(model, hidden, batch)


def _merge(cache: ReferenceCache) -> None:
    """Bring the parts of all processes, of this pass or of a killed one, into the cache, and read it in every process."""
    if collectives.is_distributed():
        ranks.barrier()
    if not collectives.is_distributed() or ranks.is_rank_0():
        cache.merge()
    if collectives.is_distributed():
        ranks.barrier()
        cache.follow()


def _share(numbers: list[int], *, in_step: bool) -> list[int]:
    """Those of a list that this process does; in_step: with the last again where others have one more."""
    if not collectives.is_distributed():
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
