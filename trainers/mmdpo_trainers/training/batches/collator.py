"""Preference records (TRL's columns) to model inputs: one token tree a micro-batch, or padded separate sequences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmdpo_kernels import SequenceLogps, SharedRows, TokenLogps, TokenTree
from mmdpo_trainers.data.conversation import Conversation
from mmdpo_trainers.data.corruption import Corruption, Model
from mmdpo_trainers.data.pair_records import (
    BRANCHES,
    PAIR,
    Branch,
    branch_table,
    corrupted_view,
    record_conversation,
    shows_corrupted,
)
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.files.atomic import read_json, write_atomic
from mmdpo_trainers.models.chat_format import prints_date
from mmdpo_trainers.models.families import EncodedImages, Family, family_of
from mmdpo_trainers.models.template_date import TemplateDate
from mmdpo_trainers.models.token_rules import response_end
from mmdpo_trainers.processes import collectives
from mmdpo_trainers.training.batches.attention_targets import AttentionTargets, TargetList
from mmdpo_trainers.training.batches.examples import Example, ExampleMaker, TokenSequence
from mmdpo_trainers.training.batches.ratio_spans import RatioSpan, RatioSpans, segments_of
from mmdpo_trainers.training.batches.views import ImagePool
from mmdpo_trainers.training.config import PreferenceConfig

TEMPLATE_DATE = "template_date.json"
"""File of `output_dir`: the date that the chat template is told, where it prints one."""


@dataclass(frozen=True, kw_only=True)
class PreferenceBatch:
    """Model inputs of a micro-batch of n records with b branches each; its sequences are record by record, branch by branch (n b)."""

    ids: list[str]
    keys: list[str]
    """Content key of each record, see `PreferenceCollator.key`."""
    kinds: list[str | None]
    """Each record's `kind`."""
    branches: tuple[str, ...]
    """What each record is scored on, "chosen" and "rejected" first: names of `data.pair_records.BRANCHES` and of further branches."""
    input_ids: Tensor
    """(1, S) of the tree, or (n b, L) padded on the right; int64."""
    attention_mask: Tensor
    """(1, 1, 1, S) int32, the tree, or (1, 1, 2, S) with its reach; or (n b, L) int64."""
    sequence_counts: Tensor
    """As `input_ids`, int64: how many sequences hold the token; 0 for padding, and for a token that no token sees."""
    position_ids: Tensor | None
    """(1, S), or for M-RoPE (3, 1, S) or (3, n b, L); int64. None: the model's own."""
    pictures: EncodedImages | None
    """Each distinct picture once; None: there are none."""
    feature_rows: Tensor
    """(K,) int64: for each image token of `input_ids`, in reading order, its row among the features of all pictures."""
    rows: Tensor
    """(R,) int64: rows of the flattened hidden states that predict response tokens, sequence by sequence."""
    targets: Tensor
    """(R,) int64: the response tokens."""
    shared_rows: SharedRows
    """The same pairs with each row once."""
    last_rows: Tensor
    """(n b,) int64: row of each sequence's last token, the end token of its response."""
    token_weights: Tensor | None
    """(R,) float64 weights of the response tokens; None: all alike."""
    lengths: Tensor
    """(n, b) int64: response tokens of each sequence, the end token included."""
    chosen_tokens: int
    """Tokens of all chosen responses."""
    margins: list[Any]
    """Each record's `margin`, as it has it; None: it has none."""
    segments: Tensor
    """As `input_ids`, int32: attention segment of each token, -1 = none."""
    recorded_rows: Tensor
    """As `input_ids`, bool: the query rows that the attention ratio is over."""
    ratios: list[RatioSpan]
    """Records that have an attention ratio."""
    cross_segments: Tensor | None = None
    """(n b, K) int32, where pictures are cross-attended: which of its sequence's pictures a key is of, -1 = none."""
    answers: Tensor | None = None
    """(n b, L) bool: tokens of responses, where a model's mask tells them from prompts; None: it does not, or a tree's mask does."""
    attention_targets: AttentionTargets | None = None
    """The records that `attention_target` is over; None: there are none, or nobody asks for them."""

    def token_logps(self, logps: Tensor) -> TokenLogps:
        """(R,) log-probabilities of the response tokens, as a loss takes them."""
        return TokenLogps(logps=logps, lengths=self.lengths, branches=self.branches, weights=self.token_weights)

    def summed_logps(self, sums: Tensor) -> SequenceLogps | TokenLogps:
        """(n, b) log-probabilities of whole responses, as a loss takes them."""
        if set(self.branches) <= set(BRANCHES):
            return SequenceLogps(**dict(zip(self.branches, sums.unbind(1), strict=True)))
        # Other branches have names among tokens only: a response's first token stands for all of it, or each for the mean that weights ask for.
        lengths = self.lengths.flatten()
        if self.token_weights is not None:
            return self.token_logps(sums.flatten().repeat_interleave(lengths))
        logps = sums.new_zeros(len(self.targets))
        logps[lengths.cumsum(0) - lengths] = sums.flatten()
        return self.token_logps(logps)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> PreferenceBatch:
        """The batch with its tensors on `device`."""
        return _with_tensors(self, lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> PreferenceBatch:
        """The batch in page-locked memory, which a data loader with `pin_memory` asks for."""
        return _with_tensors(self, Tensor.pin_memory)


class PreferenceCollator:
    """Turns preference records into `{"batch": PreferenceBatch}`.

    A record has TRL's columns: `prompt` (one user turn, text or a list of parts, `<image>` standing for a picture), `chosen` and
    `rejected` (one assistant turn), `images` (paths, Pillow pictures and other forms, see `data.images`; or the prompt's image
    parts hold them). Columns, fields and parts with content that is not read are refused (`data.content`).
    Optional: `id`, `format`, `target` (which of several pictures is asked about), `region` with `patch_grid` (where the model's
    patches are others: `box`) for the attention ratio, and `rejected_images`, its own corrupted pictures, and `kind`, a name under
    which rewards are logged too. Prompt and response are tokenised each on its own and put together (`TextEncoder`), which is what
    the model sees when it generates; a response ends with `end_id`, once, also where its text ends with an end token.

    In the corrupted view the asked-about picture is corrupted, or all of them where a record does not say which; a record without
    pictures has its chosen sequence there. Corruptions follow from seed and content (pictures, prompt text): the same record is
    corrupted alike in every batch, epoch and process. Where the reference is to see another draw (`corruption.draw`), the result
    has a second entry, `"reference_batch"`.

    Args:
        processor: the model's.
        family: from `family_of(model)`; None: the processor's, which is enough where positions just count tokens (LLaVA).
        image_token_id, end_id, pad_id: of the model's image token, a response's end, padding.
        tree_packing: one tree for all records, or a padded row for each sequence.
        branches: names, "chosen" and "rejected", or these and "corrupted"; or a table that holds further ones, see `data.pair_records.Branch`.
        corruption: how pictures are corrupted; None: only by the records' own `rejected_images`. Of several, one for each of the views
            `corrupted`, `corrupted_2`, …, whose own images records have in `rejected_images`, `rejected_images_2`, ….
        no_image: leave pictures and placeholders out of the prompts.
        changed_token_weight: weight of response tokens that differ between chosen and rejected, see `changed_token_weights`.
        picture_pool: pictures as in `images`, for corruption kind "other".
        date: what a chat template that prints the date is told; None: this moment, each time.
        attention_targets: whether batches have theirs.
        prompt_of: a record's prompt, an `<image>` for each picture.

    Raises DataError naming the record: an unreadable picture, placeholders that do not match the pictures, a conversation of
    another shape, a target or region that does not fit, an empty chosen response, a response that holds the image token, a text
    that holds tokens of the chat format or is already in it, nothing to corrupt its pictures by.
    """

    def __init__(
        self,
        processor: Any,
        *,
        image_token_id: int,
        end_id: int,
        pad_id: int = 0,
        family: Family | None = None,
        tree_packing: bool = True,
        branches: Sequence[str] | Mapping[str, Branch] = PAIR,
        corruption: Corruption | None | Sequence[Corruption | None] = None,
        no_image: bool = False,
        changed_token_weight: float = 1.0,
        picture_pool: Sequence[Any] = (),
        date: TemplateDate | None = None,
        attention_targets: bool = False,
        prompt_of: Callable[[Mapping[str, Any]], Conversation] = record_conversation,
    ) -> None:
        table = branch_table(branches)
        corrupts = shows_corrupted(table)
        if no_image and corrupts:
            raise ValueError("no_image: without pictures there is nothing to corrupt; leave the corrupted branch out")
        given = [corruption] if corruption is None or isinstance(corruption, Corruption) else corruption
        corruptions = {corrupted_view(number): each for number, each in enumerate(given, start=1) if each is not None}
        if corrupts and not len(picture_pool) and any(each.kind == "other" for each in corruptions.values()):
            raise ValueError("picture_pool: corruption kind 'other' needs pictures to draw from, got none")
        if tree_packing and (family or family_of(processor)).cross_attention:
            raise ValueError("tree_packing: cross-attended pictures are seen row by row of a batch; pass tree_packing=False")
        self.pad_id, self.tree_packing, self.attention_targets = pad_id, tree_packing, attention_targets
        self.runs_reference = True
        """Whether batches are for a reference that runs beside the policy; False: there is no `"reference_batch"`."""
        self._maker = ExampleMaker(
            processor,
            family=family or family_of(processor),
            image_token_id=image_token_id,
            end_id=end_id,
            branches=table,
            corruptions=corruptions,
            no_image=no_image,
            changed_token_weight=changed_token_weight,
            picture_pool=picture_pool,
            date=date,
            prompt_of=prompt_of,
        )

    def __call__(self, records: Sequence[Mapping[str, Any]]) -> dict[str, PreferenceBatch]:
        found = {"batch": self.batch(records)}
        if self.runs_reference and any(each.draw == "separate" for each in self._maker.corruptions.values()):
            found["reference_batch"] = self.batch(records, "reference")
        return found

    def batch(self, records: Sequence[Mapping[str, Any]], model: Model = "policy") -> PreferenceBatch:
        """The records as the policy is to see them, or the reference, which may see other corruptions."""
        examples, pictures = self._maker.examples(records, model)
        return (self._tree if self.tree_packing else self._separate)(examples, pictures)

    def length(self, record: Mapping[str, Any]) -> int:
        """Tokens of the record's longest branch, prompt and response. Of its pictures only the sizes are read."""
        return self._maker.length(record)

    def tree_tokens(self, record: Mapping[str, Any]) -> int:
        """Tokens of a tree of this record alone, at most. Of its pictures only the sizes are read.

        It may take fewer where a corruption spares the first tokens of a picture, or the record's own one is the picture itself.
        """
        return self._maker.tree_tokens(record)

    def shared_tokens(self, records: Sequence[Mapping[str, Any]]) -> int:
        """Leading tokens that records of one `image_key` have in common, which a tree of them holds once."""
        return self._maker.shared_tokens(records)

    def key(self, record: Mapping[str, Any]) -> str:
        """SHA-256 in hexadecimal of all that the record's log-probabilities depend on but the model: token ids, bytes of the
        pictures, image processor, branches, corruption and its draw, `no_image`, token weights. Files are read, not decoded."""
        return self._maker.key(record)

    def learn_keys(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Decode the pictures of records on all cores, which their keys need."""
        self._maker.learn_keys(records)

    def image_key(self, record: Mapping[str, Any]) -> str:
        """Content key of the record's list of pictures, equal where a tree would share them; without pictures its `key`."""
        return self._maker.image_key(record)

    def _tree(self, examples: list[Example], pictures: EncodedImages | None) -> PreferenceBatch:
        sequences = [sequence for example in examples for sequence in example.sequences]
        feature_rows = [_padded(sequence.feature_rows, sequence, -1) for sequence in sequences]
        positions = [sequence.positions for sequence in sequences if sequence.positions is not None]
        hidden = [_padded(_unseen(sequence), sequence, False) for sequence in sequences]
        blocks = [block for example in examples for block in self._blocks(example)]
        tree = TokenTree.from_sequences(
            [np.concatenate([sequence.prompt, sequence.response]) for sequence in sequences],
            prompt_lengths=[len(sequence.prompt) for sequence in sequences],
            identities=feature_rows,
            positions=positions or None,
            unseen=hidden if any(sequence.unseen is not None for sequence in sequences) else None,
            blocks=blocks or None,
        )
        ratios = RatioSpans((1, tree.num_tokens))
        step = len(examples[0].sequences)
        for index, example in enumerate(examples):
            columns = tree.paths[step * index][: len(example.sequences[0].prompt)]
            ratios.add(example, pictures, 0, columns, tree.rows[step * index])
        starts = np.cumsum([0, *map(len, feature_rows[:-1])])
        origin = tree.origin.numpy()
        packed = np.concatenate(feature_rows)[starts[origin[:, 0]] + origin[:, 1]]
        return self._batch(
            examples,
            pictures,
            input_ids=tree.input_ids[None],
            attention_mask=tree.attention_mask,
            sequence_counts=tree.sequence_counts[None],
            position_ids=tree.position_ids[:, None] if positions else tree.position_ids[None] + self._maker.family.first_position,
            feature_rows=torch.from_numpy(packed[packed >= 0]),
            rows=torch.cat(tree.rows),
            last_rows=torch.stack([path[-1] for path in tree.paths]),
            ratios=ratios,
            attention_targets=self._targets(examples, pictures, [tree.paths[step * index] for index in range(len(examples))]),
        )

    def _blocks(self, example: Example) -> list[np.ndarray]:
        """Of each sequence, `Family.blocks`; none where the family has none. DataError naming the record of one that no tree can have."""
        found = []
        for sequence in example.sequences:
            is_image = _padded(sequence.feature_rows, sequence, -1) >= 0
            try:
                block = self._maker.family.blocks(is_image, len(sequence.prompt))
            except ValueError as error:
                raise DataError(f"record {example.name}: {error}; set tree_packing to false, or leave the record out") from error
            if block is not None:
                found.append(block)
        return found

    def _separate(self, examples: list[Example], pictures: EncodedImages | None) -> PreferenceBatch:
        sequences = [sequence for example in examples for sequence in example.sequences]
        ids = [torch.from_numpy(np.concatenate([sequence.prompt, sequence.response])) for sequence in sequences]
        input_ids = pad_sequence(ids, batch_first=True, padding_value=self.pad_id)
        width = input_ids.shape[1]
        seen = [torch.from_numpy(~_padded(_unseen(sequence), sequence, False)).long() for sequence in sequences]
        attention_mask = pad_sequence(seen, batch_first=True)
        positions = [sequence.positions.T for sequence in sequences if sequence.positions is not None]
        response_rows = [len(s.prompt) - 1 + torch.arange(len(s.response)) for s in sequences]
        ratios = RatioSpans((len(sequences), width))
        step = len(examples[0].sequences)
        for index, example in enumerate(examples):
            columns = torch.arange(len(example.sequences[0].prompt))
            ratios.add(example, pictures, step * index, columns, response_rows[step * index])
        feature_rows = np.concatenate([sequence.feature_rows for sequence in sequences])
        shown = [sequence.feature_rows[sequence.feature_rows >= 0].tolist() for sequence in sequences]
        return self._batch(
            examples,
            pictures,
            cross_segments=None if pictures is None else self._maker.family.cross_segments(pictures, shown),
            input_ids=input_ids,
            attention_mask=attention_mask,
            sequence_counts=attention_mask,
            answers=self._answers(sequences) if self._maker.family.prefix else None,
            position_ids=pad_sequence(positions, batch_first=True).permute(2, 0, 1) if positions else None,
            feature_rows=torch.from_numpy(feature_rows[feature_rows >= 0]),
            rows=torch.cat([rows + width * index for index, rows in enumerate(response_rows)]),
            last_rows=torch.tensor([width * index + len(row) - 1 for index, row in enumerate(ids)]),
            ratios=ratios,
            attention_targets=self._targets(
                examples,
                pictures,
                [width * step * index + torch.arange(len(ids[step * index])) for index in range(len(examples))],
            ),
        )

    def _answers(self, sequences: list[TokenSequence]) -> Tensor:
        rows = [np.concatenate([np.zeros(len(each.prompt), bool), np.ones(len(each.response), bool)]) for each in sequences]
        return pad_sequence([torch.from_numpy(row) for row in rows], batch_first=True)

    def _targets(self, examples: list[Example], pictures: EncodedImages | None, tokens: list[Tensor]) -> AttentionTargets | None:
        """tokens: of each record's chosen sequence, as places in the flattened batch."""
        found = TargetList()
        for index, example in enumerate(examples if self.attention_targets else ()):
            parts = segments_of(example, pictures)
            if parts is not None:
                segments, _, target = parts
                found.add(index, tokens[index], len(example.sequences[0].prompt), segments, target)
        return found.made()

    def _batch(
        self, examples: list[Example], pictures: EncodedImages | None, *, rows: Tensor, ratios: RatioSpans, **inputs: Any
    ) -> PreferenceBatch:
        sequences = [sequence for example in examples for sequence in example.sequences]
        targets = torch.from_numpy(np.concatenate([sequence.response for sequence in sequences]))
        weights = [sequence.weights for sequence in sequences if sequence.weights is not None]
        lengths = torch.tensor([len(sequence.response) for sequence in sequences]).view(len(examples), -1)
        return PreferenceBatch(
            ids=[example.name for example in examples],
            keys=[example.key for example in examples],
            kinds=[_kind(example.record) for example in examples],
            branches=tuple(self._maker.branches),
            pictures=pictures,
            margins=[example.record.get("margin") for example in examples],
            rows=rows,
            targets=targets,
            shared_rows=SharedRows.from_pairs(rows, targets),
            token_weights=torch.from_numpy(np.concatenate(weights)) if weights else None,
            lengths=lengths,
            chosen_tokens=int(lengths[:, list(self._maker.branches).index("chosen")].sum()),
            segments=ratios.segments,
            recorded_rows=ratios.recorded_rows,
            ratios=ratios.spans,
            **inputs,
        )


def model_collator(base: Any, processor: Any, **options: Any) -> PreferenceCollator:
    """The collator for a model without its adapter. options: as of `PreferenceCollator`.

    Raises ValueError where neither tokenizer nor model has an end token.
    """
    tokenizer = processor.tokenizer
    end = response_end(processor, base.generation_config)
    if end is None:
        raise ValueError("processing_class: neither tokenizer nor generation_config has an end token; responses could not end")
    return PreferenceCollator(
        processor,
        family=family_of(base),
        image_token_id=base.config.image_token_id,
        end_id=end,
        pad_id=end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
        **options,
    )


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
        prompt_of=args.prompt_of,
        tree_packing=tree_packing,
        branches=branches,
        corruption=args.image_corruptions,
        no_image=args.no_image,
        attention_targets=args.attention_target is not None,
        changed_token_weight=args.changed_token_weight,
        picture_pool=ImagePool(pool) if pool is not None and corrupts and args.draws_pictures else (),
    )


def template_date(processor: Any, args: PreferenceConfig) -> TemplateDate | None:
    """What the chat template is told: the date of `args`, or for a template that prints one the day of the first start; its arguments.

    With another day's date a continued training would see other prompts than its reference did.
    """
    arguments = args.chat_template_kwargs
    if args.template_date is not None:
        return TemplateDate.read(args.template_date).with_arguments(arguments)
    if not prints_date(processor):
        return TemplateDate.now().with_arguments(arguments) if arguments else None
    found = None
    if args.process_index == 0:
        path = Path(str(args.output_dir)) / TEMPLATE_DATE
        if not path.exists():
            write_atomic(path, {"template_date": str(TemplateDate.now())})
        found = str(read_json(path)["template_date"])
    return TemplateDate.read(str(collectives.all_gather(found)[0])).with_arguments(arguments)


def _kind(record: Mapping[str, Any]) -> str | None:
    kind = record.get("kind")
    return kind if isinstance(kind, str) else None


def _unseen(sequence: TokenSequence) -> np.ndarray:
    return np.zeros(len(sequence.prompt), dtype=bool) if sequence.unseen is None else sequence.unseen


def _padded(prompt_values: np.ndarray, sequence: TokenSequence, value: Any) -> np.ndarray:
    """Values of prompt tokens, with `value` for those of the response."""
    return np.concatenate([prompt_values, np.full(len(sequence.response), value, dtype=prompt_values.dtype)])


def _with_tensors(instance: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a dataclass with `change` done to its tensors, those of dataclasses in it included."""
    changed: dict[str, Any] = {}
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = change(value)
        elif isinstance(value, EncodedImages | SharedRows | AttentionTargets):
            changed[field.name] = _with_tensors(value, change)
        elif isinstance(value, dict):
            changed[field.name] = {name: change(tensor) for name, tensor in value.items()}
    return dataclasses.replace(instance, **changed)
