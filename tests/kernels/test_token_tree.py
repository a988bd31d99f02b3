"""TokenTree and image_segments."""

from __future__ import annotations

import itertools
import random
import sys

import numpy as np
import pytest
import torch

from mmdpo_kernels import TokenTree, image_segments
from mmdpo_kernels.backends.varlen.plan import plan as varlen_plan
from mmdpo_kernels.tree_mask import depth, visible


def test_pair_shares_its_prompt() -> None:
    tree = TokenTree.from_sequences([[1, 2, 3, 7, 8], [1, 2, 3, 9]], prompt_lengths=[3, 3])
    assert tree.input_ids.tolist() == [1, 2, 3, 7, 8, 9]
    assert tree.position_ids.tolist() == [0, 1, 2, 3, 4, 3]
    assert tree.tree_end.tolist() == [6, 6, 6, 5, 5, 6]
    assert [rows.tolist() for rows in tree.rows] == [[2, 3], [2]]
    assert [targets.tolist() for targets in tree.targets] == [[7, 8], [9]]
    assert tree.attention_mask.shape == (1, 1, 1, 6)


def test_pictures_are_told_apart_by_identity() -> None:
    sequences = [[1, 50, 50, 2], [1, 50, 50, 3]]
    same = [[None, ("a", 0), ("a", 1), None]] * 2
    other = [same[0], [None, ("b", 0), ("b", 1), None]]
    assert TokenTree.from_sequences(sequences, prompt_lengths=[3, 3], identities=same).num_tokens == 5
    assert TokenTree.from_sequences(sequences, prompt_lengths=[3, 3], identities=other).num_tokens == 7


@pytest.mark.parametrize("seed", range(25))
def test_every_sequence_sees_exactly_itself(seed: int) -> None:
    rng = random.Random(seed)
    sequences = [[rng.randrange(3) for _ in range(rng.randint(1, 9))] for _ in range(rng.randint(1, 7))]
    prompts = [rng.randint(1, len(sequence)) for sequence in sequences]
    tree = TokenTree.from_sequences(sequences, prompt_lengths=prompts)
    seen = visible(tree.tree_end[None])[0]
    for sequence, prompt, path, rows, targets in zip(sequences, prompts, tree.paths, tree.rows, tree.targets, strict=True):
        assert tree.input_ids[path].tolist() == sequence
        assert tree.position_ids[path].tolist() == list(range(len(sequence)))
        for offset, index in enumerate(path.tolist()):
            assert seen[index].nonzero()[:, 0].tolist() == path[: offset + 1].tolist()
        assert targets.tolist() == sequence[prompt:]
        assert rows.tolist() == path[prompt - 1 : -1].tolist()
    distinct = {tuple(sequence[: n + 1]) for sequence in sequences for n in range(len(sequence))}
    assert tree.num_tokens == len(distinct)
    for index, (sequence_index, offset) in enumerate(tree.origin.tolist()):
        assert tree.paths[sequence_index][offset] == index


def test_tree_errors() -> None:
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        TokenTree.from_sequences([[1], []], prompt_lengths=[1, 0])
    with pytest.raises(ValueError, match=r"prompt_lengths\[0\] must be in \[1, 2\], got 3"):
        TokenTree.from_sequences([[1, 2]], prompt_lengths=[3])
    with pytest.raises(ValueError, match=r"identities\[0\] must have 2 entries"):
        TokenTree.from_sequences([[1, 2]], prompt_lengths=[1], identities=[[None]])


def test_adjacent_pictures_are_split_by_count() -> None:
    ids = torch.tensor([[9, 5, 5, 5, 5, 1], [5, 5, 1, 5, 0, 0]])
    found = image_segments(ids, 5, [[3, 1], [2, 1]])
    assert found.tolist() == [[-1, 0, 0, 0, 1, -1], [0, 0, -1, 1, -1, -1]]


def test_region_of_a_picture() -> None:
    ids = torch.tensor([[1, 5, 5, 5, 5, 5, 5], [5, 5, 1, 5, 5, 5, 5]])
    found = image_segments(ids, 5, [[6], [2, 4]], regions=[[0, 1, 2, 3], None], patch_grids=[[2, 3], None])
    assert found.tolist() == [[-1, 1, 0, 0, 1, 0, 0], [0, 0, -1, 1, 1, 1, 1]]


def test_segment_errors_name_the_row() -> None:
    ids = torch.tensor([[5, 5, 1, 5]])
    with pytest.raises(ValueError, match="row 0 has 3 image tokens .* adds up to 2"):
        image_segments(ids, 5, [[2]])
    with pytest.raises(ValueError, match=r"regions\[0\] needs one picture"):
        image_segments(ids, 5, [[3]], regions=[[0, 0, 1, 1]], patch_grids=[[2, 2]])
    with pytest.raises(ValueError, match="within grid"):
        image_segments(ids, 5, [[3]], regions=[[0, 0, 1, 4]], patch_grids=[[1, 3]])


def test_a_long_chain_of_prefixes() -> None:
    """Deeper than Python lets functions call themselves."""
    deep = sys.getrecursionlimit() + 100
    tree = TokenTree.from_sequences([list(range(n + 1)) for n in range(deep)], prompt_lengths=[1] * deep)
    assert tree.num_tokens == deep
    assert (tree.tree_end == deep).all()


def test_negative_ids_are_refused() -> None:
    with pytest.raises(ValueError, match="sequence 1 has token id -200"):
        TokenTree.from_sequences([[1], [1, -200]], prompt_lengths=[1, 1])


def test_positions_tell_branches_apart() -> None:
    """Two prompts of the same tokens at other positions share only what comes before; what is given is what comes out."""
    ids = [[1, 2, 3, 9], [1, 2, 3, 9], [1, 2, 3, 8]]
    given = [torch.tensor([[0, 1, 1, 2], [0, 1, 2, 3], row]) for row in ([0, 1, 1, 3], [0, 1, 2, 3], [0, 1, 1, 3])]
    tree = TokenTree.from_sequences(ids, prompt_lengths=[3] * 3, positions=given)
    assert tree.num_tokens == 2 + 2 + 1 + 2
    assert tree.position_ids.shape == (3, 7)
    for positions, path in zip(given, tree.paths, strict=True):
        assert torch.equal(tree.position_ids[:, path], positions)
    flat = TokenTree.from_sequences(ids, prompt_lengths=[3] * 3, positions=[row[0] for row in given])
    assert flat.num_tokens == 5 and flat.position_ids.tolist() == [0, 1, 1, 2, 2]


def test_unseen_tokens_are_seen_by_none_and_are_nodes_of_their_own() -> None:
    hidden = [np.array([False] * 4), np.array([False, True, False, False])]
    tree = TokenTree.from_sequences([[1, 5, 5, 7], [1, 5, 5, 7]], prompt_lengths=[3, 3], unseen=hidden)
    assert tree.input_ids.tolist() == [1, 5, 5, 7, 5, 5, 7]
    assert tree.position_ids.tolist() == [0, 1, 2, 3, 1, 2, 3]
    seen = visible(tree.tree_end[None])[0]
    assert seen[6].nonzero()[:, 0].tolist() == [0, 5, 6] and seen[3].nonzero()[:, 0].tolist() == [0, 1, 2, 3]


def test_identities_as_an_array() -> None:
    rows = [np.array([-1, 0, 1, -1]), np.array([-1, 0, 1, -1]), np.array([-1, 2, 3, -7])]
    tree = TokenTree.from_sequences([[1, 5, 5, 2]] * 3, prompt_lengths=[4] * 3, identities=rows)
    assert tree.num_tokens == 1 + 3 + 3


def test_errors_of_what_comes_with_tokens() -> None:
    with pytest.raises(ValueError, match=r"positions\[1\] must have shape \(3, 2\), got \(2,\)"):
        positions = [torch.zeros(3, 2, dtype=torch.long), torch.arange(2)]
        TokenTree.from_sequences([[1, 2], [1, 2]], prompt_lengths=[1, 1], positions=positions)
    with pytest.raises(ValueError, match="positions must have one entry a sequence"):
        TokenTree.from_sequences([[1, 2]], prompt_lengths=[1], positions=[])
    with pytest.raises(ValueError, match=r"unseen must have one entry a token of each sequence \(2\), got 1"):
        TokenTree.from_sequences([[1, 2]], prompt_lengths=[1], unseen=[np.array([True])])


def test_blocks_are_shared_whole_or_not_at_all() -> None:
    """Two pictures whose first tokens are the same, a picture that two sequences share, and a prefix."""
    ids = [[1, 5, 5, 2, 7], [1, 5, 5, 2, 8], [1, 5, 5, 3]]
    block = [np.array([-1, 0, 0, -1, -1][: len(row)]) for row in ids]
    shared = TokenTree.from_sequences(ids, prompt_lengths=[4, 4, 3], blocks=block)
    assert shared.input_ids.tolist() == [1, 5, 5, 2, 7, 8, 3] and shared.reach is not None
    assert shared.reach.tolist() == [1, 3, 3, 4, 5, 6, 7]
    assert shared.attention_mask.shape == (1, 1, 2, 7) and shared.attention_mask.dtype == torch.int32
    other = [np.array([10, 20]), np.array([10, 21]), np.array([10, 20])]
    apart = TokenTree.from_sequences(
        ids,
        prompt_lengths=[4, 4, 3],
        identities=[np.concatenate([[-1], each, [-1] * (len(row) - 3)]) for each, row in zip(other, ids, strict=True)],
        blocks=block,
    )
    assert apart.input_ids.tolist() == [1, 5, 5, 2, 7, 3, 5, 5, 2, 8]
    prefix = TokenTree.from_sequences(
        ids, prompt_lengths=[4, 4, 3], blocks=[np.array([0] * (len(row) - 1) + [-1]) for row in ids]
    )
    assert prefix.input_ids.tolist() == [1, 5, 5, 2, 7, 8, 1, 5, 5, 3]
    assert prefix.reach is not None and prefix.reach.tolist() == [4, 4, 4, 4, 5, 6, 9, 9, 9, 10]


def test_a_picture_with_hidden_tokens_is_another_picture() -> None:
    ids, block = [[1, 5, 5, 2]] * 2, [np.array([-1, 0, 0, -1])] * 2
    hidden = [np.array([False] * 4), np.array([False, False, True, False])]
    tree = TokenTree.from_sequences(ids, prompt_lengths=[3, 3], unseen=hidden, blocks=block)
    assert tree.reach is not None and tree.reach.tolist() == [1, 3, 3, 4, 6, 6, 7]
    seen = visible(tree.tree_end[None], reach=tree.reach[None])[0]
    assert seen[tree.paths[1]][:, tree.paths[1]].int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 1]]
    with pytest.raises(ValueError, match=r"blocks must have one entry a token of each sequence \(4, 4\), got 4, 3"):
        TokenTree.from_sequences(ids, prompt_lengths=[3, 3], blocks=[block[0], block[0][:3]])


@pytest.mark.parametrize("window", [2, 3])
def test_a_window_counts_hidden_tokens(window: int) -> None:
    """As masks of transformers do: a hidden token keeps its place, and padding has none."""
    hidden = [np.array([False, True, True, False, False])] * 2
    tree = TokenTree.from_sequences([[1, 5, 5, 2, 3], [1, 5, 5, 2, 4]], prompt_lengths=[4, 4], unseen=hidden)
    assert tree.tree_end.tolist() == [6, -7, -7, 6, 5, 6] and depth(tree.tree_end[None])[0].tolist() == [0, 1, 2, 3, 4, 4]
    index = torch.arange(5)
    expected = (index <= index[:, None]) & (index[:, None] - index < window) & ~torch.from_numpy(hidden[0])
    seen = visible(tree.tree_end[None], window)[0]
    assert all(torch.equal(seen[path][:, path], expected) for path in tree.paths)
    calls = varlen_plan(tree.tree_end[None], 1, 6, window, torch.device("cpu"))
    got = torch.zeros(6, 6, dtype=torch.bool)
    for call in calls:
        starts = zip(*(itertools.pairwise(each.tolist()) for each in (call.query_starts, call.key_starts)), strict=True)
        rows, keys = (torch.arange(6) if each is None else each for each in (call.rows, call.keys))
        for (q0, q1), (k0, k1) in starts:
            for place, query in enumerate(rows[q0:q1].tolist()):
                last = k1 - (q1 - q0 - 1 - place) if call.causal else k1
                first = max(k0, last - window) if call.causal else k0
                got[query, keys[first:last]] = True
    assert torch.equal(got, seen)
