"""Online and mixed DPO: micro-batches whose pairs are made of answers that the policy gives in this step."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from mmdpo_trainers.answers.raters import Rater
from mmdpo_trainers.config.sections.online import OnlineConfig
from mmdpo_trainers.data.pair_records import record_conversation, record_name, response_text
from mmdpo_trainers.data.pairs import check_contents
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.template_date import TemplateDate
from mmdpo_trainers.processes import collectives
from mmdpo_trainers.training import model_parts
from mmdpo_trainers.training.batches.collator import template_date
from mmdpo_trainers.training.batches.packing import is_streaming
from mmdpo_trainers.training.config import PreferenceConfig
from mmdpo_trainers.training.online import kept
from mmdpo_trainers.training.online.choice import Answer, check_options, choose, choose_negative, is_online, values_of
from mmdpo_trainers.training.online.sampler import as_prompt, sample
from mmdpo_trainers.training.sharded.batches import COUNTS

Record = Mapping[str, Any]

_RECORDS = "records"
_PAIR = ("chosen", "rejected")


@dataclass(frozen=True)
class Uncollated:
    """Records of a micro-batch that is made when its step begins; opaque to what moves batches to devices."""

    records: list[Record]


def uncollated(records: Sequence[Record]) -> dict[str, Uncollated]:
    """In place of the collator, in the data loader."""
    return {_RECORDS: Uncollated(list(records))}


@dataclass
class _Place:
    """A record of a step, and what becomes of it."""

    batch: int
    record: Record
    online: bool
    made: Record | None = None
    """The record as it is trained on; None: it is left out of the step."""
    line: dict[str, Any] | None = None


class OnlinePairs:
    """What makes a `PreferenceTrainer` sample: given to it as `online`.

    In each optimizer step each record is online with probability alpha (arXiv 2407.02477's mixed DPO; 1 is its online DPO, OnlineDPO of
    arXiv 2402.04792, with `options.samples` answers in place of two). The policy as it is before the step, adapter on, answers the online
    records of all the step's micro-batches, in batches of their own size; the rater ranks the answers; the best against the worst is
    the record's pair in this step, or with `use: negative` the worst is an extra rejected answer (`PreferenceConfig.extra_negative`).
    A pair's text goes through the collator as that of any record, and the reference runs over it in the step.

    Nothing depends on random states or on earlier steps but the weights: a continued training samples what an uninterrupted one does.
    Every answer is kept in `online.jsonl` of `output_dir`, see `kept.append`. Logged, beside what the trainer logs: `online/share`, of the
    records trained on those with a sampled answer; `online/ties`, `online/unrated` and `online/cut`, shares of the records sampled for that
    gave no pair; `online/skipped`, share of all records; `online/mean_rating`; `online/tokens` an answer; `online/sampling_time`, seconds a
    step.

    Args:
        options: `alpha` must be given.
        rater: ranks the answers; whoever made it closes it.

    Raises ValueError for settings that do not fit together.
    """

    def __init__(self, options: OnlineConfig, rater: Rater) -> None:
        options = dataclasses.replace(options, use=options.use or "pair", without_pair=options.without_pair or "offline")
        check_options(options)
        if options.attribute is not None and options.attribute not in rater.attributes:
            raise ValueError(f"online.attribute: expected one of {', '.join(rater.attributes)}, got {options.attribute!r}")
        self.options, self.rater = options, rater
        self.alpha = float(options.alpha or 0.0)
        self.nothing_to_learn = False
        """Whether the present step has no record."""

    def records(self, dataset: Any, args: PreferenceConfig) -> Any:
        """The training data, checked, with the column that an extra negative is to take. With alpha 1 records may be prompts alone."""
        self._check(dataset, args)
        return dataset if dataset is None else _Records(dataset, self._column(args))

    def evaluated(self, dataset: Any, args: PreferenceConfig) -> Any:
        """Data to evaluate on, whose extra negatives are their rejected answers where they have no other."""
        if isinstance(dataset, dict):
            return {name: self.evaluated(each, args) for name, each in dataset.items()}
        if _are_prompts(dataset):
            raise ValueError(
                "eval_dataset: prompts without chosen and rejected have no loss; leave it out (held_out: 0 in a run's section train)"
            )
        return dataset if dataset is None else _Records(dataset, self._column(args))

    def bind(self, trainer: Any) -> None:
        """Take what sampling needs from a trainer that is made. ValueError where its weights are in shards."""
        if trainer.sharding.in_shards:
            raise ValueError(
                "online: weights in shards (ZeRO-3, FSDP2) are whole in no process, and answers cannot be sampled; use DDP or ZeRO-2, or "
                "alpha 0"
            )
        self.trainer, args = trainer, trainer.args
        self.column = self._column(args)
        self.path = Path(str(args.output_dir)) / kept.ONLINE
        self.loaded = LoadedModel(
            model_parts.base_of(trainer.model),
            trainer.processing_class,
            Path(),
            date=template_date(trainer.processing_class, args) or TemplateDate.now(),
        )

    def begin(self) -> None:
        """When training starts or goes on: take back what was sampled after the checkpoint."""
        if self.trainer.args.process_index == 0:
            kept.rewind(self.path, self.trainer.state.global_step)
        collectives.barrier()

    def batches(self, samples: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The micro-batches of a step, of what `uncollated` gave for each."""
        trainer = self.trainer
        step, seed = trainer.state.global_step + 1, trainer.args.seed
        counted = [sample.get(COUNTS, True) for sample in samples]
        # A micro-batch that repeats others' records counts for nothing: it needs no answers.
        places = [
            _Place(number, record, counted[number] and is_online(self.alpha, seed, step, record_name(record)))
            for number, sample in enumerate(samples)
            for record in sample[_RECORDS].records
        ]
        started = time.perf_counter()
        self._sample([place for place in places if place.online], step)
        seconds = time.perf_counter() - started
        for place in places:
            if counted[place.batch] and not place.online:
                place.made = self._offline(place.record)
        self._keep(places, step)
        mine = [place for place in places if counted[place.batch]]
        self._log(mine, seconds)
        found = [place for place in mine if place.made is not None]
        self.nothing_to_learn = not collectives.any_rank(bool(found), trainer.args.device)
        return [self._collated(sample, [place for place in places if place.batch == n]) for n, sample in enumerate(samples)]

    def _check(self, dataset: Any, args: PreferenceConfig) -> None:
        check_fit(self.options, args)
        if is_streaming(dataset):
            raise ValueError(
                "train_dataset: online answers need records by number, got streaming data; load them (streaming=False)"
            )
        prompts_only = _are_prompts(dataset)
        if prompts_only and (self.alpha < 1 or self.options.use == "negative"):
            raise ValueError(
                f"train_dataset: prompts without chosen and rejected need online.alpha 1 and online.use pair, got {self.alpha} and "
                f"{self.options.use}"
            )
        if prompts_only and args.max_length is not None:
            raise ValueError(
                "max_length: prompts alone are not measured; leave it out, and bound answers by online.max_new_tokens"
            )

    def _column(self, args: PreferenceConfig) -> str | None:
        """The column of the extra negative."""
        return args.branches[str(args.extra_negative)].response if self.options.use == "negative" else None

    def _offline(self, record: Record) -> Record:
        if not _has_pair(record):
            raise DataError(
                f"record {record_name(record)}: it has no chosen and rejected, and online.alpha={self.alpha} trains on them; add them, or "
                "set alpha to 1"
            )
        return record

    def _sample(self, places: Sequence[_Place], step: int) -> None:
        """Answers to the records of these places, rated, and what they make of the records."""
        if not places:
            return
        options, trainer = self.options, self.trainer
        prompts = [as_prompt(place.record) for place in places]
        autocast = trainer.accelerator.autocast
        answers = sample(self.loaded, prompts, options, seed=trainer.args.seed, step=step, autocast=autocast)
        texts = [[answer.text for answer in own] for own in answers]
        if self.column is not None:
            texts = [[*own, response_text(place.record, "chosen")] for own, place in zip(texts, places, strict=True)]
        for place, own, ratings in zip(places, answers, self.rater.rate(prompts, texts), strict=True):
            found = [rating.value(options.attribute) for rating in ratings]
            self._decide(place, own, found, step)
            problems = [rating.problem for rating in ratings if rating.problem is not None]
            if problems and place.line is not None:
                place.line["problems"] = problems

    def _decide(self, place: _Place, answers: Sequence[Answer], ratings: Sequence[float | None], step: int) -> None:
        options, record = self.options, place.record
        values = values_of(answers, ratings[: len(answers)], options.missing_eos_penalty)
        chosen: int | None = None
        if self.column is None:
            outcome, chosen, rejected = choose(answers, values, options.min_gap)
        else:
            own = response_text(record, "chosen")
            outcome, rejected = choose_negative(answers, values, own, ratings[-1], options.min_gap)
        if rejected is not None:
            turns = {self.column or "rejected": answers[rejected].text}
            turns |= {} if chosen is None else {"chosen": answers[chosen].text}
            place.made = {**record, **{name: [{"role": "assistant", "content": text}] for name, text in turns.items()}}
        elif options.without_pair == "offline" and _has_pair(record):
            place.made = record
        trained = "sampled" if rejected is not None else "offline" if place.made is not None else "skipped"
        name = record_name(record)
        place.line = {
            "id": f"{step}/{name}",
            "step": step,
            "record": name,
            "answers": [answer.text for answer in answers],
            "ended": [answer.ended for answer in answers],
            "tokens": [answer.tokens for answer in answers],
            "ratings": values,
            "outcome": outcome,
            "chosen": chosen,
            "rejected": rejected,
            "trained": trained,
        }

    def _keep(self, places: Sequence[_Place], step: int) -> None:
        """Add the step's lines of all processes, in the order of one process; an error where the first step's answers have no rating."""
        args = self.trainer.args
        mine = [(place.batch * args.world_size + args.process_index, place.line) for place in places if place.line is not None]
        lines = [
            line for _, line in sorted((pair for own in collectives.all_gather(mine) for pair in own), key=lambda pair: pair[0])
        ]
        if step == 1 and lines and all(line["outcome"] == "unrated" for line in lines):
            problem = next((text for line in lines for text in line.get("problems", ())), "too few are")
            raise DataError(
                f"record {lines[0]['record']}: no answer sampled in the first step could be rated ({problem}); see the section `rate`"
            )
        if args.process_index == 0:
            kept.append(self.path, lines)

    def _log(self, places: Sequence[_Place], seconds: float) -> None:
        averages = self.trainer._averages["train"]
        lines = [place.line for place in places if place.line is not None]
        made = [place for place in places if place.made is not None]
        sampled = sum(line["trained"] == "sampled" for line in lines)
        shares = {name: sum(line["outcome"] == word for line in lines) for name, word in _OUTCOMES.items()}
        ratings = [value for line in lines for value in line["ratings"] if value is not None]
        tokens = [count for line in lines for count in line["tokens"]]
        averages.add({"online/share": sampled / max(len(made), 1)}, len(made))
        averages.add({"online/skipped": 1 - len(made) / max(len(places), 1)}, len(places))
        averages.add({f"online/{name}": count / max(len(lines), 1) for name, count in shares.items()}, len(lines))
        averages.add({"online/mean_rating": sum(ratings) / max(len(ratings), 1)}, len(ratings))
        averages.add({"online/tokens": sum(tokens) / max(len(tokens), 1)}, len(tokens))
        averages.add({"online/sampling_time": seconds}, 1)

    def _collated(self, sample: Mapping[str, Any], places: Sequence[_Place]) -> dict[str, Any]:
        """A micro-batch; where no record is left, the first one, which counts for nothing."""
        rest = {name: value for name, value in sample.items() if name != _RECORDS}
        records = [place.made for place in places if place.made is not None]
        if not records:
            records, rest = [_stand_in(places[0].record)], {**rest, COUNTS: False}
        return {**self.trainer.data_collator(records), **rest}


def check_fit(options: OnlineConfig, args: PreferenceConfig) -> None:
    """ValueError for a setting of training that sampling does not go with, or that it needs."""
    for name in ("max_tokens_per_batch", "group_by_pictures", "precompute_ref_log_probs", "no_image"):
        if getattr(args, name):
            why = {
                "precompute_ref_log_probs": "the reference runs over sampled answers in their step",
                "no_image": "the policy answers prompts with their pictures",
            }.get(name, "the lengths of answers are not known before they are sampled")
            raise ValueError(f"{name}: with online answers {why}; leave it out")
    if options.use == "negative" and args.extra_negative is None:
        raise ValueError(
            "online.use: a sampled negative needs a branch; set extra_negative: sampled and further_branches: {sampled: [images, sampled]}"
        )


_OUTCOMES = {"ties": "tie", "unrated": "unrated", "cut": "cut"}
"""Name in the log -> outcome."""


class _Records(Dataset[dict[str, Any]]):
    """Records as sampling takes them: texts checked, without a pair or with both of its sides, and the rejected answer in `column` unless
    there is one."""

    def __init__(self, dataset: Any, column: str | None) -> None:
        self.dataset, self.column = dataset, column
        if not _are_prompts(dataset):
            check_contents(dataset)
        elif isinstance(dataset, list):
            for record in dataset:
                record_conversation(record)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> dict[str, Any]:
        record = self.dataset[index]
        if self.column is None or record.get(self.column) is not None or not _has_pair(record):
            return dict(record)
        return {**record, self.column: record["rejected"]}


def _are_prompts(dataset: Any) -> bool:
    """Whether data are prompts alone, by their first record."""
    return dataset is not None and len(dataset) > 0 and not _has_pair(dataset[0])


def _has_pair(record: Record) -> bool:
    return all(record.get(name) is not None for name in _PAIR)


def _stand_in(record: Record) -> Record:
    """A record with texts of some kind: every micro-batch runs, as other processes may have records in theirs."""
    return record if _has_pair(record) else {**record, "chosen": ".", "rejected": ""}
