"""Which records are used, those that are short enough, and which of them share a micro-batch: packed to a token budget, or by number,
with records about the same pictures together."""

from __future__ import annotations

import bisect
import logging
import random
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import datasets
from torch.utils.data import IterableDataset, Sampler, Subset

from mmdpo_trainers.data.dataset_checks import equal_answers, equal_answers_line
from mmdpo_trainers.data.pair_records import check_content, record_name, shows_corrupted
from mmdpo_trainers.data.pairs import check_contents
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.processes.progress import Progress
from mmdpo_trainers.training.batches.collator import PreferenceCollator
from mmdpo_trainers.training.config import PreferenceConfig

logger = logging.getLogger(__name__)

_WINDOW = 1024
"""Pieces packed together. A window is a random draw from all of them, so a batch's records come from anywhere in the data."""

Groups = Sequence[Hashable] | None


def batch_tokens(batch: Sequence[int], lengths: Sequence[int], groups: Groups = None, shared: Sequence[int] | None = None) -> int:
    """Tokens of a batch's tree: every record's own, what records of one group share counted once.

    It is never less than what `TokenTree` packs: groups may share more than what `shared` tells, and so may different groups.
    """
    total = sum(lengths[index] for index in batch)
    if groups is None or shared is None:
        return total
    common: dict[Hashable, list[int]] = defaultdict(list)
    for index in batch:
        common[groups[index]].append(shared[index])
    return total - sum(sum(values) - max(values) for values in common.values())


def pack_by_tokens(
    lengths: Sequence[int], budget: int, *, groups: Groups = None, shared: Sequence[int] | None = None, seed: int = 0
) -> list[list[int]]:
    """Batches of record indices, none above `budget` tokens, every record in exactly one.

    A group that fits the budget stays in one batch, a larger one is cut into as few pieces as its random order gives. Pieces are
    shuffled, and in windows of 1024 put, the longest first, into the fullest batch that has room for them (best fit decreasing).
    The result follows from the arguments alone.

    Args:
        lengths: tokens of each record's own tree, prompt and responses.
        budget: most tokens of a batch.
        groups: per record a key; equal keys are kept together. None: every record for itself.
        shared: per record how many of its leading tokens all records of its group share, such as the pictures; None: nothing.
        seed: of the order.

    Raises ValueError naming the indices of records that are longer than the budget, or arguments of different lengths.
    """
    _check_lengths(lengths, groups, shared)
    above = [index for index, length in enumerate(lengths) if length > budget]
    if above:
        named = ", ".join(f"{index} ({lengths[index]})" for index in above[:5])
        raise ValueError(
            f"budget: expected room for the longest record, got {budget} tokens; {len(above)} are longer, by index: {named}; raise "
            "the budget, or leave these records out"
        )
    pieces = [
        piece
        for members in _shuffled_groups(len(lengths), groups, seed)
        for piece in _cut(members, lengths, budget, [0] * len(lengths) if shared is None or groups is None else shared)
    ]
    random.Random(f"{seed}/pieces").shuffle(pieces)
    costs = [batch_tokens(piece, lengths, groups, shared) for piece in pieces]
    batches: list[list[int]] = []
    for start in range(0, len(pieces), _WINDOW):
        window = range(start, min(start + _WINDOW, len(pieces)))
        batches += [[index for piece in bin for index in pieces[piece]] for bin in _best_fit(window, costs, budget)]
    return batches


def group_batches(groups: Sequence[Hashable], batch_size: int, *, seed: int = 0) -> list[list[int]]:
    """Batches of `batch_size` record indices (the last may be smaller) made of whole groups where that is possible.

    groups: per record a key; equal keys are kept together. Groups are shuffled; what is left of them once no more batches can be
    filled with whole ones fills the rest. Raises ValueError where batch_size is below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: expected 1 or more, got {batch_size}")
    packed = pack_by_tokens([1] * len(groups), batch_size, groups=groups, seed=seed)
    full = [batch for batch in packed if len(batch) == batch_size]
    rest = [index for batch in packed if len(batch) < batch_size for index in batch]
    return full + [rest[start : start + batch_size] for start in range(0, len(rest), batch_size)]


class PackedBatchSampler(Sampler[list[int]]):
    """Fixed batches for `DataLoader(batch_sampler=…)`, in another order each epoch.

    The order follows from `seed` and the epoch given to `set_epoch`, never from a random number generator's state: a continued
    run that sets the epoch and passes over the first batches sees those that an uninterrupted one does.
    """

    def __init__(self, batches: Sequence[Sequence[int]], seed: int = 0) -> None:
        self.batches = [list(batch) for batch in batches]
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take the order of this epoch, from the next iteration on."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        order = list(range(len(self.batches)))
        random.Random(f"{self.seed}/epoch {self.epoch}").shuffle(order)
        return iter([self.batches[number] for number in order])


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """What packing needs to know of records; one entry a record each."""

    lengths: list[int]
    """Tokens of a tree of its own."""
    groups: list[str]
    """Key of its pictures; records without pictures have keys of their own, and so have all where none are grouped."""
    shared: list[int]
    """Leading tokens that all records of its group share."""


def measure(
    dataset: Any,
    collator: PreferenceCollator,
    indices: Sequence[int],
    progress: Progress | None = None,
    *,
    grouped: bool = True,
) -> Sizes:
    """Sizes of the records at `indices`. Raises DataError naming a record that cannot be used.

    grouped=False: every record is a group of its own, and no picture is decoded to tell it from others.
    """
    lengths, groups = [], []
    members: dict[str, list[int]] = defaultdict(list)
    with (progress or Progress()).task("measure records", total=len(indices)) as task:
        for index in indices:
            record = dataset[index]
            lengths.append(collator.tree_tokens(record))
            groups.append(collator.image_key(record) if grouped else str(index))
            members[groups[-1]].append(index)
            task.advance()
    # Read again, group by group: records may hold their pictures.
    common = {
        key: collator.shared_tokens([dataset[index] for index in group]) if len(group) > 1 else 0
        for key, group in members.items()
    }
    return Sizes(lengths=lengths, groups=groups, shared=[common[key] for key in groups])


def batch_sampler(dataset: Any, collator: PreferenceCollator, args: PreferenceConfig, progress: Progress) -> PackedBatchSampler:
    """The micro-batches that `max_tokens_per_batch` and `group_by_pictures` ask for; what they come to is printed.

    Raises DataError naming the records that are longer than the token budget.
    """
    sizes = measure(dataset, collator, range(len(dataset)), progress, grouped=args.group_by_pictures)
    groups = sizes.groups if args.group_by_pictures else None
    budget = args.max_tokens_per_batch
    if budget is None:
        batches = group_batches(sizes.groups, args.per_device_train_batch_size, seed=args.seed)
    else:
        long = [index for index, length in enumerate(sizes.lengths) if length > budget]
        if long:
            named = ", ".join(f"{record_name(dataset[index])} ({sizes.lengths[index]})" for index in long[:5])
            raise DataError(
                f"max_tokens_per_batch={budget}: {len(long)} records are longer by themselves, such as {named}; raise it to "
                f"{max(sizes.lengths)}, or leave long records out with max_length"
            )
        batches = pack_by_tokens(sizes.lengths, budget, groups=groups, shared=sizes.shared, seed=args.seed)
    report = packing_report(batches, sizes.lengths, groups=groups, shared=sizes.shared, budget=budget)
    progress.print(f"train: {report}")
    return PackedBatchSampler(batches, seed=args.seed)


@dataclass(frozen=True, kw_only=True)
class PackingReport:
    """What a packing comes to."""

    records: int
    batches: int
    groups: int
    tokens: int
    """Of all batches, shared ones once a batch."""
    apart: int
    """Of all records, each in a tree of its own."""
    budget: int | None = None

    @property
    def saved(self) -> float:
        """Share of the tokens that packing records of a group together saves."""
        return 1 - self.tokens / self.apart if self.apart else 0.0

    def __str__(self) -> str:
        together = f" about {self.groups} sets of pictures" if self.groups < self.records else ""
        text = f"{self.records} records{together} in {self.batches} batches of {self.tokens / max(self.batches, 1):.0f} tokens"
        if self.budget is not None:
            text += f" ({self.tokens / max(self.batches * self.budget, 1):.0%} of {self.budget})"
        return text + (f", {self.saved:.0%} fewer tokens through shared pictures" if self.tokens < self.apart else "")


def packing_report(
    batches: Sequence[Sequence[int]],
    lengths: Sequence[int],
    *,
    groups: Groups = None,
    shared: Sequence[int] | None = None,
    budget: int | None = None,
) -> PackingReport:
    """Sizes of a packing, for the log; arguments as of `pack_by_tokens`."""
    records = sum(map(len, batches))
    return PackingReport(
        records=records,
        batches=len(batches),
        groups=records if groups is None else len({groups[index] for batch in batches for index in batch}),
        tokens=sum(batch_tokens(batch, lengths, groups, shared) for batch in batches),
        apart=sum(lengths[index] for batch in batches for index in batch),
        budget=budget,
    )


def is_streaming(dataset: Any) -> bool:
    """Whether a dataset has no records by number, but gives one after the other."""
    return isinstance(dataset, IterableDataset | datasets.IterableDataset)


def check_datasets(train: Any, evaluation: Any, args: PreferenceConfig) -> None:
    """ValueError for data of another kind, naming the argument, and for settings that need all records at hand with streaming data."""
    several = isinstance(evaluation, dict)
    named = {f"eval_dataset[{name!r}]": each for name, each in evaluation.items()} if several else {"eval_dataset": evaluation}
    for name, each in {"train_dataset": train, **named}.items():
        if each is not None:
            _check_dataset(name, each, args)
    if is_streaming(train) and args.max_steps < 1:
        raise ValueError(f"max_steps: streaming data (train_dataset) have no length; expected 1 or more, got {args.max_steps}")


def _check_dataset(name: str, dataset: Any, args: PreferenceConfig) -> None:
    if isinstance(dataset, dict):
        first = next(iter(dataset), "train")
        raise ValueError(
            f"{name}: expected one dataset, got {type(dataset).__name__} of {', '.join(dataset)}; pass one, as in dataset[{first!r}]"
        )
    if not is_streaming(dataset) and (
        isinstance(dataset, str) or not all(hasattr(dataset, part) for part in ("__len__", "__getitem__"))
    ):
        raise ValueError(
            f"{name}: expected a datasets.Dataset, an IterableDataset or a list of records, got {type(dataset).__name__}; read files with "
            "datasets.load_dataset"
        )
    if not is_streaming(dataset):
        return
    whole = {
        "precompute_ref_log_probs": args.precompute_ref_log_probs and args.needs_reference,
        "max_tokens_per_batch": args.max_tokens_per_batch,
        "group_by_pictures": args.group_by_pictures,
        "corruption 'other'": args.draws_pictures and shows_corrupted(args.branches),
        f"{args.world_size} processes": args.world_size > 1,
    }
    for setting in (setting for setting, used in whole.items() if used):
        raise ValueError(
            f"{name}: {setting} needs all records at hand, got streaming data; load them (streaming=False), or leave it out"
        )


def short_enough(
    dataset: Any, collator: PreferenceCollator, args: PreferenceConfig, progress: Progress, left_out: list[str]
) -> Any:
    """The records of a dataset, or of each in a dictionary of them, within `max_length`; names of the others are added to `left_out`.

    Raises DataError naming the first that has content which is not read, or that is longer, where `too_long` is "error".
    """
    if is_streaming(dataset):
        return _ShortOnes(dataset, collator, args, left_out)
    check_contents(dataset)
    if equal := equal_answers(dataset, args.loss_type):
        logger.warning(equal_answers_line(equal, len(dataset)))
    limit = args.max_length
    if dataset is None or limit is None:
        return dataset
    if isinstance(dataset, dict):
        return {name: short_enough(each, collator, args, progress, left_out) for name, each in dataset.items()}
    with progress.task("measure records", total=len(dataset)) as task:
        kept, long = [], []
        for index in range(len(dataset)):
            record = dataset[index]
            if _fits(record, collator, args):
                kept.append(index)
            else:
                long.append(record_name(record))
            task.advance()
    if long:
        logger.warning("%d records are longer than max_length=%d and left out: %s", len(long), limit, ", ".join(long[:10]))
        left_out += long
    return dataset.select(kept) if hasattr(dataset, "select") else Subset(dataset, kept)


def _fits(record: Mapping[str, Any], collator: PreferenceCollator, args: PreferenceConfig) -> bool:
    """Whether a record is within `max_length`; DataError where it is not and `too_long` is "error"."""
    limit = args.max_length
    if limit is None:
        return True
    length = collator.length(record)
    if length <= limit:
        return True
    if args.too_long == "error":
        raise DataError(
            f"record {record_name(record)}: {length} tokens are more than max_length={limit}; raise it, shorten the record, "
            "or leave such records out with too_long='drop'"
        )
    return False


class _ShortOnes(IterableDataset[Any]):
    """Those records of streaming data that are within `max_length`, their contents checked; others are named as they come by."""

    def __init__(self, dataset: Any, collator: PreferenceCollator, args: PreferenceConfig, left_out: list[str]) -> None:
        self.dataset, self.collator, self.args, self.left_out = dataset, collator, args, left_out

    def __iter__(self) -> Iterator[Any]:
        for record in self.dataset:
            check_content(record)
            if _fits(record, self.collator, self.args):
                yield record
                continue
            logger.warning("record %s is longer than max_length=%d and left out", record_name(record), self.args.max_length)
            self.left_out.append(record_name(record))

    def set_epoch(self, epoch: int) -> None:
        """Let a shuffled dataset know the epoch."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)


def _check_lengths(lengths: Sequence[int], groups: Groups, shared: Sequence[int] | None) -> None:
    for name, values in (("groups", groups), ("shared", shared)):
        if values is not None and len(values) != len(lengths):
            raise ValueError(f"{name}: expected one a record ({len(lengths)}), got {len(values)}")
    for index, (length, common) in enumerate(zip(lengths, shared or (), strict=False)):
        if not 0 <= common <= length:
            raise ValueError(f"shared: expected 0 to the record's {length} tokens, got {common} for index {index}")


def _shuffled_groups(count: int, groups: Groups, seed: int) -> list[list[int]]:
    """The members of each group, in random order."""
    members: dict[Hashable, list[int]] = defaultdict(list)
    for index in range(count):
        members[index if groups is None else groups[index]].append(index)
    draw = random.Random(f"{seed}/groups")
    for each in members.values():
        draw.shuffle(each)
    return list(members.values())


def _cut(members: list[int], lengths: Sequence[int], budget: int, shared: Sequence[int]) -> Iterator[list[int]]:
    """A group's members in pieces that fit the budget."""
    piece: list[int] = []
    total = widest = 0
    for index in members:
        # One of the piece's common beginnings is stored, the longest.
        grown = total + lengths[index] - min(widest, shared[index])
        if piece and grown > budget:
            yield piece
            piece, grown, widest = [], lengths[index], 0
        piece.append(index)
        total, widest = grown, max(widest, shared[index])
    yield piece


def _best_fit(pieces: Sequence[int], costs: Sequence[int], budget: int) -> list[list[int]]:
    """Bins of pieces, none above the budget."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (tokens left, bin), sorted
    for piece in sorted(pieces, key=lambda piece: -costs[piece]):
        place = bisect.bisect_left(room, (costs[piece], -1))
        left, number = room.pop(place) if place < len(room) else (budget, len(bins))
        if number == len(bins):
            bins.append([])
        bins[number].append(piece)
        bisect.insort(room, (left - costs[piece], number))
    return bins
