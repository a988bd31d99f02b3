"""Micro-batches dealt to the processes of a training: those of one process, each counted once."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard, SeedableRandomSampler
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, Sampler

from mmdpo_trainers.training.config import PreferenceConfig

COUNTS = "counts"
"""Key of a micro-batch: whether its records count, or repeat others so that every process has as many micro-batches."""


class ShardedBatches(Sampler[list[tuple[int, bool]]]):
    """Every `world`-th batch of another batch sampler, from number `rank` on, as pairs (index, whether it counts).

    Where the number of batches is no multiple of `world`, the last ones are followed by repeats that do not count. So micro-step j of W
    processes has the batches that one process has in its micro-steps W j to W j + W - 1, and an optimizer step those of one process with W times
    the accumulation.
    """

    def __init__(self, batches: Any, rank: int, world: int) -> None:
        self.batches, self.rank, self.world = batches, rank, world
        # What accelerate's loaders look at.
        self.batch_size = getattr(batches, "batch_size", None)
        self.drop_last = False

    def set_epoch(self, epoch: int) -> None:
        """Take the order of this epoch."""
        for sampler in (self.batches, getattr(self.batches, "sampler", None)):
            if sampler is not None and hasattr(sampler, "set_epoch"):
                sampler.set_epoch(epoch)

    def __len__(self) -> int:
        return -(-len(self.batches) // self.world)

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        every = [list(batch) for batch in self.batches]
        for number in range(self.rank, len(self) * self.world, self.world):
            counts = number < len(every)
            # The last batch is the cheapest to repeat, as it may be smaller than the others.
            yield [(index, counts) for index in every[number if counts else -1]]


class CountedRecords(Dataset[tuple[Any, bool]]):
    """A dataset read by the pairs of `ShardedBatches`."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: tuple[int, bool]) -> tuple[Any, bool]:
        index, counts = place
        return self.dataset[index], counts


class CountedCollator:
    """The collator for `CountedRecords`: its micro-batch, and whether it counts."""

    def __init__(self, collator: Callable[[Sequence[Any]], dict[str, Any]]) -> None:
        self.collator = collator

    def __call__(self, records: Sequence[tuple[Any, bool]]) -> dict[str, Any]:
        return {**self.collator([record for record, _ in records]), COUNTS: records[0][1]}


def sharded_loader(dataset: Any, batches: Any, collator: Any, args: PreferenceConfig, *, lasting: bool = False) -> DataLoader:
    """The data loader of this process. batches: a batch sampler, as one process would use it. lasting: keep its workers between epochs."""
    workers = args.dataloader_num_workers
    # `accelerator.prepare` would deal the batches out a second time.
    return DataLoaderShard(  # type: ignore[no-any-return]
        CountedRecords(dataset),
        batch_sampler=ShardedBatches(batches, args.process_index, args.world_size),
        collate_fn=CountedCollator(collator),
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=lasting and args.dataloader_persistent_workers and workers > 0,
        prefetch_factor=args.dataloader_prefetch_factor,
    )


def train_loader(dataset: Any, batches: Any, collator: Any, args: PreferenceConfig, accelerator: Accelerator) -> DataLoader:
    """The data loader of a training, in this process. batches: a batch sampler, as one process would use it."""
    if args.world_size > 1:
        return sharded_loader(dataset, batches, collator, args, lasting=True)
    workers = args.dataloader_num_workers
    loader = DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=collator,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory,
        persistent_workers=args.dataloader_persistent_workers and workers > 0,
        prefetch_factor=args.dataloader_prefetch_factor,
    )
    return accelerator.prepare(loader)  # type: ignore[no-any-return]


def batches_of(sampler: Any, size: int, *, drop_last: bool = False, data_seed: int | None = None) -> BatchSampler:
    """Batches of `size` records; random ones in the order in which accelerate has them in one process."""
    if isinstance(sampler, RandomSampler):
        sampler = SeedableRandomSampler(sampler.data_source, data_seed=data_seed)
    return BatchSampler(sampler, size, drop_last)
