"""`TokenTree`: several token sequences packed as one tree, each shared prefix once."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class TokenTree:
    """Sequences packed depth-first; shared prefixes appear once.

    Feed a patched model with `input_ids[None]`, `position_ids[None]` ((3, S): `position_ids[:, None]`) and `attention_mask`; the
    hidden states at `rows[i]` predict `targets[i]`.
    """

    input_ids: Tensor
    """(S,) int64."""
    position_ids: Tensor
    """(S,) int64: each token's offset in its own sequence, so positions restart at every branch; or (S,) or (3, S) as given."""
    tree_end: Tensor
    """(S,) int32: packed index where the subtree of the token's node ends; of a token that no token sees `-1 - end`."""
    origin: Tensor
    """(S, 2) int64: the first sequence that holds the token, and its offset there."""
    paths: tuple[Tensor, ...]
    """Per sequence, (L_i,) int64: packed index of each of its tokens."""
    rows: tuple[Tensor, ...]
    """Per sequence, (R_i,) int64: packed rows whose hidden states predict its response. Siblings share their parent's last row."""
    targets: tuple[Tensor, ...]
    """Per sequence, (R_i,) int64: its response tokens."""
    reach: Tensor | None = None
    """(S,) int32: packed index up to which the token sees: the end of its block, or behind itself. None: there are no blocks."""

    @property
    def num_tokens(self) -> int:
        """Packed length S."""
        return self.input_ids.shape[0]

    @property
    def sequence_counts(self) -> Tensor:
        """(S,) int64: how many sequences hold each token; 0 for one that no token sees."""
        counts = torch.bincount(torch.cat(self.paths), minlength=self.num_tokens)
        return counts.masked_fill(self.tree_end <= torch.arange(self.num_tokens), 0)

    @property
    def attention_mask(self) -> Tensor:
        """(1, 1, 1, S) int32, `tree_end`, or (1, 1, 2, S), that and `reach`: a patched model's attention mask."""
        rows = [self.tree_end] if self.reach is None else [self.tree_end, self.reach]
        return torch.stack(rows)[None, None]

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Sequence[int] | np.ndarray],
        *,
        prompt_lengths: Sequence[int],
        identities: Sequence[Sequence[Hashable | None] | np.ndarray] | None = None,
        positions: Sequence[Tensor] | None = None,
        unseen: Sequence[np.ndarray] | None = None,
        blocks: Sequence[np.ndarray] | None = None,
    ) -> TokenTree:
        """Pack sequences, sharing every common prefix.

        Two tokens are the same node only if their ids, their image identities, their positions, whether they are seen, and all tokens
        before them are equal; an image token's identity is its picture's content and its offset in it. A token that sees what comes after
        it in its block is another one where that differs: blocks are shared whole or not at all.

        Args:
            sequences: token ids of each whole sequence, prompt then response.
            prompt_lengths: leading tokens of each sequence that are prompt, at least 1 and at most its length.
            identities: per sequence and token a hashable image identity, or None for text; or per sequence an integer array (L_i,),
                negative for text. None where there are no pictures.
            positions: per sequence integer position ids (L_i,), or (3, L_i) as M-RoPE has them; None: offsets in the sequence.
            unseen: per sequence (L_i,) bool, tokens that no token sees, such as masked image tokens. None: all are seen.
            blocks: per sequence (L_i,) integer, the block of tokens that see each other both ways, such as a picture's or a prefix's, that
                a token is in, negative for none. Tokens of one number side by side are a block. None: every token sees those before it.

        Raises:
            ValueError: no sequences, an empty one, or lengths that do not match.
        """
        ids = _ids(sequences)
        _check_prompts(prompt_lengths, ids)
        columns = [ids]
        if identities is not None:
            columns.append(_identities(identities, ids))
        given = None if positions is None else _positions(positions, ids)
        if given is not None:
            columns += [[row[axis] for row in given] for axis in range(len(given[0]))]
        if unseen is not None:
            columns.append(_unseen(unseen, ids))
        keys = [np.stack(rows) for rows in zip(*columns, strict=True)]
        ahead = None if blocks is None else _blocks(blocks, keys)
        if ahead is not None:
            keys = [np.concatenate([key, row[:1]]) for key, row in zip(keys, ahead, strict=True)]
        packer = _Packer(keys)
        packer.pack()
        origin = np.concatenate(packer.origins)
        tree_end = packer.ends()
        starts = np.cumsum([0, *map(len, ids[:-1])])
        source = starts[origin[:, 0]] + origin[:, 1]
        if unseen is not None:
            hidden = np.concatenate(columns[-1])[source] > 0
            tree_end[hidden] = -1 - tree_end[hidden]
        reach = None
        if ahead is not None:
            reach = (np.arange(packer.length) + np.concatenate(ahead, axis=1)[1, source]).astype(np.int32)
        order = origin[:, 1].copy() if given is None else np.concatenate(given, axis=1)[:, source]
        if positions is not None and positions[0].ndim == 1:
            order = order[0]
        paths = tuple(torch.from_numpy(np.concatenate(pieces)) for pieces in packer.paths)
        return cls(
            input_ids=torch.from_numpy(np.concatenate(ids)[source]),
            position_ids=torch.from_numpy(order),
            tree_end=torch.from_numpy(tree_end),
            origin=torch.from_numpy(origin),
            paths=paths,
            rows=tuple(path[prompt - 1 : -1] for path, prompt in zip(paths, prompt_lengths, strict=True)),
            targets=tuple(torch.from_numpy(row[prompt:].copy()) for row, prompt in zip(ids, prompt_lengths, strict=True)),
            reach=None if reach is None else torch.from_numpy(reach),
        )


class _Packer:
    """Depth-first packing of a trie whose nodes are maximal shared runs.

    keys: per sequence (C, L_i) int64; tokens are equal iff their columns are.
    """

    def __init__(self, keys: list[np.ndarray]) -> None:
        self.keys = keys
        self.origins: list[np.ndarray] = []
        self.paths: list[list[np.ndarray]] = [[] for _ in keys]
        self.nodes: list[tuple[int, int, int]] = []
        self.length = 0

    def pack(self) -> None:
        """Lay the nodes down depth-first, children in order of first appearance."""
        todo: list[tuple[list[int], int] | int] = [*self._split(list(range(len(self.keys))), 0)]
        while todo:
            item = todo.pop()
            if isinstance(item, int):  # a node whose subtree is complete
                self.nodes[item] = (*self.nodes[item][:2], self.length)
                continue
            group, offset = item
            stop = self._common(group, offset)
            todo.append(self._append(group, offset, stop))
            todo += self._split(group, stop)

    def _append(self, group: list[int], offset: int, stop: int) -> int:
        """Add the node that holds tokens [offset, stop) of the group; returns its number."""
        start = self.length
        offsets = np.arange(offset, stop, dtype=np.int64)
        self.origins.append(np.stack([np.full(offsets.shape, group[0], dtype=np.int64), offsets], axis=1))
        for member in group:
            self.paths[member].append(start + offsets - offset)
        self.length += stop - offset
        self.nodes.append((start, self.length, self.length))
        return len(self.nodes) - 1

    def ends(self) -> np.ndarray:
        """(S,) int32 `tree_end`."""
        tree_end = np.empty(self.length, dtype=np.int32)
        for start, stop, end in self.nodes:
            tree_end[start:stop] = end
        return tree_end

    def _split(self, members: list[int], offset: int) -> list[tuple[list[int], int]]:
        """Members grouped by their token at `offset`, the last group first, so that a stack yields them in order."""
        groups: dict[tuple[int, ...], list[int]] = {}
        for member in members:
            if offset < self.keys[member].shape[1]:
                groups.setdefault(tuple(self.keys[member][:, offset].tolist()), []).append(member)
        return [(group, offset) for group in reversed(groups.values())]

    def _common(self, group: list[int], offset: int) -> int:
        first = self.keys[group[0]]
        stop = first.shape[1]
        for member in group[1:]:
            other = self.keys[member]
            stop = min(stop, other.shape[1])
            differs = np.flatnonzero((first[:, offset:stop] != other[:, offset:stop]).any(axis=0))
            if differs.size:
                stop = offset + int(differs[0])
        return stop


def _ids(sequences: Sequence[Sequence[int] | np.ndarray]) -> list[np.ndarray]:
    if not len(sequences):
        raise ValueError("TokenTree: sequences must hold at least one sequence, got none")
    ids = []
    for index, sequence in enumerate(sequences):
        if not len(sequence):
            raise ValueError(f"TokenTree: sequence {index} is empty")
        row = np.array(sequence, dtype=np.int64)
        if row.min() < 0:
            raise ValueError(f"TokenTree: sequence {index} has token id {row.min()}; ids must be 0 or above")
        ids.append(row)
    return ids


def _identities(identities: Sequence[Sequence[Hashable | None] | np.ndarray], ids: list[np.ndarray]) -> list[np.ndarray]:
    """Per sequence (L_i,) int64, equal iff image identities are equal, -1 for text."""
    if len(identities) != len(ids):
        raise ValueError(f"TokenTree: identities must have one entry a sequence ({len(ids)}), got {len(identities)}")
    seen: dict[Hashable, int] = {None: -1}
    found = []
    for index, (row, its_ids) in enumerate(zip(identities, ids, strict=True)):
        if len(row) != len(its_ids):
            raise ValueError(f"TokenTree: identities[{index}] must have {len(its_ids)} entries, got {len(row)}")
        if isinstance(row, np.ndarray):
            found.append(np.maximum(row.astype(np.int64), -1))
        else:
            found.append(np.array([seen.setdefault(identity, len(seen)) for identity in row], dtype=np.int64))
    return found


def _positions(positions: Sequence[Tensor], ids: list[np.ndarray]) -> list[np.ndarray]:
    """Per sequence (1, L_i) or (3, L_i) int64."""
    if len(positions) != len(ids):
        raise ValueError(f"TokenTree: positions must have one entry a sequence ({len(ids)}), got {len(positions)}")
    found = []
    for index, (row, its_ids) in enumerate(zip(positions, ids, strict=True)):
        expected = (len(its_ids),) if positions[0].ndim == 1 else (3, len(its_ids))
        if row.shape != expected:
            raise ValueError(f"TokenTree: positions[{index}] must have shape {expected}, got {tuple(row.shape)}")
        found.append(np.atleast_2d(row.numpy().astype(np.int64)))
    return found


def _unseen(unseen: Sequence[np.ndarray], ids: list[np.ndarray]) -> list[np.ndarray]:
    """Per sequence (L_i,) int64, 1 for a token that no token sees."""
    _check_entries("unseen", unseen, ids)
    return [row.astype(np.int64) for row in unseen]


def _blocks(blocks: Sequence[np.ndarray], keys: list[np.ndarray]) -> list[np.ndarray]:
    """Per sequence (2, L_i) int64: a number equal iff all of the token's block is, -1 outside of blocks; tokens from it to its block's end.

    keys: per sequence (C, L_i), what tokens are told apart by.
    """
    _check_entries("blocks", blocks, [key[0] for key in keys])
    seen: dict[tuple[int, bytes], int] = {}
    found = []
    for row, key in zip(blocks, keys, strict=True):
        its = np.stack([np.full(len(row), -1, dtype=np.int64), np.ones(len(row), dtype=np.int64)])
        edges = [0, *(np.flatnonzero(np.diff(row)) + 1).tolist(), len(row)]
        for start, stop in zip(edges, edges[1:], strict=False):
            if row[start] >= 0:
                content = stop - start, key[:, start:stop].tobytes()
                its[0, start:stop] = seen.setdefault(content, len(seen))
                its[1, start:stop] = np.arange(stop - start, 0, -1)
        found.append(its)
    return found


def _check_entries(name: str, rows: Sequence[np.ndarray], ids: list[np.ndarray]) -> None:
    given, expected = ", ".join(str(len(row)) for row in rows), ", ".join(str(len(row)) for row in ids)
    if given != expected:
        raise ValueError(f"TokenTree: {name} must have one entry a token of each sequence ({expected}), got {given}")


def _check_prompts(prompt_lengths: Sequence[int], ids: list[np.ndarray]) -> None:
    if len(prompt_lengths) != len(ids):
        raise ValueError(f"TokenTree: prompt_lengths must have one entry a sequence ({len(ids)}), got {len(prompt_lengths)}")
    for index, (prompt, row) in enumerate(zip(prompt_lengths, ids, strict=True)):
        if not 1 <= prompt <= len(row):
            raise ValueError(f"TokenTree: prompt_lengths[{index}] must be in [1, {len(row)}], got {prompt}")
