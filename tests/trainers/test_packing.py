"""Packing: every record once, within the budget, groups together, batches in an order of the seed and the epoch alone."""

from __future__ import annotations

import random
from collections import Counter, defaultdict

import pytest
from torch.utils.data import DataLoader

from mmdpo_kernels import TokenTree
from mmdpo_trainers.training.batches.packing import (
    PackedBatchSampler,
    batch_tokens,
    group_batches,
    pack_by_tokens,
    packing_report,
)


def drawn(count: int, seed: int = 0) -> list[int]:
    draw = random.Random(seed)
    return [draw.randint(40, 400) for _ in range(count)]


# One record, fewer than a batch, and more than one window of 1024 pieces.
@pytest.mark.parametrize("count", [1, 7, 2500])
def test_every_record_once_within_the_budget(count: int) -> None:
    lengths = drawn(count)
    batches = pack_by_tokens(lengths, 1000, seed=3)
    assert sorted(index for batch in batches for index in batch) == list(range(count))
    assert all(0 < sum(lengths[index] for index in batch) <= 1000 for batch in batches)


def test_batches_are_filled() -> None:
    lengths = drawn(3000)
    report = packing_report(pack_by_tokens(lengths, 2048), lengths, budget=2048)
    assert report.tokens / (report.batches * 2048) > 0.97


def test_order_of_the_data_does_not_show() -> None:
    """Records sorted by length, as data often are: the batches' mean lengths must not follow the data's order."""
    batches = pack_by_tokens([10] * 4000, 100, seed=1)
    spread = [max(batch) - min(batch) for batch in batches]
    assert sum(spread) / len(spread) > 2000
    assert pack_by_tokens([10] * 4000, 100, seed=1) == batches
    assert pack_by_tokens([10] * 4000, 100, seed=2) != batches


def test_a_record_longer_than_the_budget_is_named() -> None:
    with pytest.raises(ValueError, match=r"budget: .* got 100 tokens; 2 are longer, by index: 1 \(101\), 3 \(500\)"):
        pack_by_tokens([100, 101, 3, 500], 100)
    assert pack_by_tokens([100, 100], 100) in ([[0], [1]], [[1], [0]])


def test_arguments_must_fit() -> None:
    with pytest.raises(ValueError, match="groups: expected one a record"):
        pack_by_tokens([1, 2], 5, groups=["a"])
    with pytest.raises(ValueError, match="shared: expected 0 to the record's 2 tokens, got 3 for index 1"):
        pack_by_tokens([1, 2], 5, groups=["a", "a"], shared=[0, 3])
    with pytest.raises(ValueError, match="batch_size: expected 1 or more"):
        group_batches(["a"], 0)
    assert pack_by_tokens([], 5) == []


def test_groups_stay_together_and_pay_for_their_pictures_once() -> None:
    # Four questions of 60 tokens on each set of pictures of 500: apart 2240, together 740.
    groups = [number // 4 for number in range(400)]
    lengths, shared = [560] * 400, [500] * 400
    batches = pack_by_tokens(lengths, 1500, groups=groups, shared=shared, seed=5)
    assert Counter(map(len, batches)) == {8: 50}
    assert all(set(Counter(groups[index] for index in batch).values()) == {4} for batch in batches)
    assert {batch_tokens(batch, lengths, groups, shared) for batch in batches} == {1480}
    report = packing_report(batches, lengths, groups=groups, shared=shared, budget=1500)
    assert report.apart == 400 * 560 and report.tokens == 50 * 1480 and report.saved == pytest.approx(1 - 74 / 224)
    assert str(report) == (
        "400 records about 100 sets of pictures in 50 batches of 1480 tokens (99% of 1500), "
        "67% fewer tokens through shared pictures"
    )


def test_a_group_above_the_budget_is_cut_into_few_pieces() -> None:
    lengths, shared, groups = [560] * 10, [500] * 10, ["a"] * 10
    batches = pack_by_tokens(lengths, 700, groups=groups, shared=shared)
    # 500 + 3 x 60 = 680: three records a batch.
    assert sorted(map(len, batches)) == [1, 3, 3, 3]
    assert all(batch_tokens(batch, lengths, groups, shared) <= 700 for batch in batches)
    # Without a known common beginning the group is kept together only as far as the whole lengths fit.
    assert sorted(map(len, pack_by_tokens(lengths, 1200, groups=groups))) == [2] * 5


def test_cost_is_never_below_the_tree() -> None:
    draw = random.Random(4)
    pictures = [[900 + number] * 12 for number in range(5)]
    sequences, groups, lengths, shared = [], [], [], []
    for _ in range(40):
        which = draw.randrange(5)
        prompt = [1, *pictures[which], 2, *draw.choices(range(10, 14), k=3)]
        pair = [prompt + draw.choices(range(10, 14), k=draw.randint(1, 6)) for _ in range(2)]
        sequences.append((len(prompt), pair))
        groups.append(which)
        lengths.append(tree([(len(prompt), pair)]).num_tokens)
        shared.append(14)
    for batch in pack_by_tokens(lengths, 120, groups=groups, shared=shared):
        packed = tree([sequences[index] for index in batch]).num_tokens
        assert packed <= batch_tokens(batch, lengths, groups, shared) <= 120


def tree(records: list[tuple[int, list[list[int]]]]) -> TokenTree:
    flat = [(prompt, sequence) for prompt, pair in records for sequence in pair]
    return TokenTree.from_sequences([sequence for _, sequence in flat], prompt_lengths=[prompt for prompt, _ in flat])


def test_consecutive_batches_are_of_different_groups() -> None:
    """A group that needs several batches must not fill consecutive ones."""
    groups = [number // 32 for number in range(32 * 40)]
    batches = pack_by_tokens([10] * len(groups), 80, groups=groups, seed=0)
    of_batch = [groups[batch[0]] for batch in PackedBatchSampler(batches, seed=0)]
    repeats = sum(first == second for first, second in zip(of_batch, of_batch[1:], strict=False))
    assert repeats < 0.1 * len(batches)


def test_batches_by_number_are_of_whole_groups() -> None:
    sizes = [4] * 10 + [1] * 5 + [2] * 6 + [11]
    groups = [number for number, size in enumerate(sizes) for _ in range(size)]
    batches = group_batches(groups, 4, seed=2)
    assert sorted(index for batch in batches for index in batch) == list(range(len(groups)))
    assert [len(batch) for batch in batches] == [4] * (len(groups) // 4)
    in_batches: dict[int, set[int]] = defaultdict(set)
    for number, batch in enumerate(batches):
        for index in batch:
            in_batches[groups[index]].add(number)
    assert all(len(in_batches[group]) == 1 for group, size in enumerate(sizes) if size in (2, 4))
    assert len(in_batches[len(sizes) - 1]) == 3
    # What cannot be filled with whole groups is filled all the same, but for the last batch.
    assert sorted(map(len, group_batches([0, 0, 0, 1, 1, 1, 2, 2], 4))) == [4, 4]


def test_sampler_keeps_batches_and_changes_their_order_by_epoch() -> None:
    batches = pack_by_tokens(drawn(200), 1000)
    sampler = PackedBatchSampler(batches, seed=7)
    first = list(sampler)
    assert list(sampler) == first and len(sampler) == len(batches)
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first and sorted(second) == sorted(first) == sorted(batches)
    again = PackedBatchSampler(batches, seed=7)
    again.set_epoch(1)
    assert list(again) == second
    assert list(PackedBatchSampler(batches, seed=8)) != first


def test_sampler_feeds_a_data_loader() -> None:
    sampler = PackedBatchSampler([[0, 3], [1], [2, 4, 5]], seed=0)
    loader = DataLoader(list("abcdef"), batch_sampler=sampler, collate_fn="".join)
    assert sorted(loader) == ["ad", "b", "cef"] and len(loader) == 3
