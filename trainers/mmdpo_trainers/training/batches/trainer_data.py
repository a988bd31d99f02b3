"""What a trainer makes of its data before it starts: the collator for its model, and records that are short enough."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import datasets
from torch.utils.data import IterableDataset, Subset

from mmdpo_trainers.data.pair_records import Branch, check_content, record_name, shows_corrupted
from mmdpo_trainers.data.pairs import check_contents
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.files.atomic import read_json, write_atomic
from mmdpo_trainers.models.chat_format import prints_date
from mmdpo_trainers.models.template_date import TemplateDate
from mmdpo_trainers.processes import collectives
from mmdpo_trainers.processes.progress import Progress
from mmdpo_trainers.training.batches.collator import PreferenceCollator, model_collator
from mmdpo_trainers.training.batches.views import PicturePool
from mmdpo_trainers.training.config import PreferenceConfig

logger = logging.getLogger(__name__)

TEMPLATE_DATE = "template_date.json"
"""File of `output_dir`: the date that the chat template is told, where it prints one."""


def collator_of(
    base: Any,
    processor: Any,
    args: PreferenceConfig,
    pool: Any,
    *,
    tree_packing: bool,
    branches: Mapping[str, Branch] | None = None,
) -> PreferenceCollator:
    """The collator that `args` describes, for a model without its adapter. pool: a dataset, whose pictures corruption "other" draws from.

    branches: in place of those of `args`.
    """
    branches = branches or args.branches
    corrupts = shows_corrupted(branches)
    return model_collator(
        base,
        processor,
        date=template_date(processor, args),
        tree_packing=tree_packing,
        branches=branches,
        corruption=args.picture_corruption if corrupts else None,
        no_image=args.no_image,
        changed_token_weight=args.changed_token_weight,
        picture_pool=PicturePool(pool) if pool is not None and args.corruption == "other" and corrupts else (),
    )


def template_date(processor: Any, args: PreferenceConfig) -> TemplateDate | None:
    """The date that the chat template is told: that of `args`, or for a template that prints one the day of the first start.

    With another day's date a continued training would see other prompts than its reference did.
    """
    if args.template_date is not None:
        return TemplateDate.read(args.template_date)
    if not prints_date(processor):
        return None
    found = None
    if args.process_index == 0:
        path = Path(str(args.output_dir)) / TEMPLATE_DATE
        if not path.exists():
            write_atomic(path, {"template_date": str(TemplateDate.now())})
        found = str(read_json(path)["template_date"])
    return TemplateDate.read(str(collectives.gathered(found)[0]))


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
        "corruption 'other'": args.corruption == "other" and shows_corrupted(args.branches),
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
