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

    Feed a patched model with `input_ids[None]`, `position_ids[None]` and `attention_mask`; the hidden states at `rows[i]` predict
    `targets[i]`.
    """

    input_ids: Tensor
    """(S,) int64."""
    position_ids: Tensor
    """(S,) int64: each token's offset in its own sequence, so positions restart at every branch."""
    tree_end: Tensor
    """(S,) int32: packed index where the subtree of the token's node ends."""
    origin: Tensor
    """(S, 2) int64: the first sequence that holds the token, and its offset there."""
    paths: tuple[Tensor, ...]
    """Per sequence, (L_i,) int64: packed index of each of its tokens."""
    rows: tuple[Tensor, ...]
    """Per sequence, (R_i,) int64: packed rows whose hidden states predict its response. Siblings share their parent's last row."""
    targets: tuple[Tensor, ...]
    """Per sequence, (R_i,) int64: its response tokens."""

    @property
    def num_tokens(self) -> int:
        """Packed length S."""
        return self.input_ids.shape[0]

    @property
    def attention_mask(self) -> Tensor:
        """(1, 1, 1, S) int32: `tree_end` in the form in which a patched model takes it as its attention mask."""
        return self.tree_end[None, None, None, :]

    @classmethod
    def from_sequences(
        cls,
        sequences: Sequence[Sequence[int]],
        *,
        prompt_lengths: Sequence[int],
        identities: Sequence[Sequence[Hashable | None]] | None = None,
    ) -> TokenTree:
        """Pack sequences, sharing every common prefix.

        Two tokens are the same node only if their ids, their image identities and all tokens before them are equal; an image token's
        identity is its picture's content and its offset in it.

        Args:
            sequences: token ids of each whole sequence, prompt then response.
            prompt_lengths: leading tokens of each sequence that are prompt, at least 1 and at most its length.
            identities: per token a hashable image identity, or None for text. None where there are no pictures.

        Raises:
            ValueError: no sequences, an empty one, or lengths that do not match.
        """
        keys = _intern(sequences, identities)
        _check_prompts(prompt_lengths, keys)
        packer = _Packer(keys)
        packer.pack()
        origin = np.concatenate(packer.origins)
        ids = [np.asarray(sequence, dtype=np.int64) for sequence in sequences]
        order = np.array([ids[sequence][offset] for sequence, offset in origin], dtype=np.int64)
        paths = tuple(torch.from_numpy(np.concatenate(pieces)) for pieces in packer.paths)
        return cls(
            input_ids=torch.from_numpy(order),
            position_ids=torch.from_numpy(origin[:, 1].copy()),
            tree_end=torch.from_numpy(packer.ends()),
            origin=torch.from_numpy(origin),
            paths=paths,
            rows=tuple(path[prompt - 1 : -1] for path, prompt in zip(paths, prompt_lengths, strict=True)),
            targets=tuple(torch.from_numpy(i[prompt:].copy()) for i, prompt in zip(ids, prompt_lengths, strict=True)),
        )


class _Packer:
    """Depth-first packing of a trie whose nodes are maximal shared runs."""

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
        groups: dict[int, list[int]] = {}
        for member in members:
            if offset < len(self.keys[member]):
                groups.setdefault(int(self.keys[member][offset]), []).append(member)
        return [(group, offset) for group in reversed(groups.values())]

    def _common(self, group: list[int], offset: int) -> int:
        first = self.keys[group[0]]
        stop = len(first)
        for member in group[1:]:
            other = self.keys[member]
            stop = min(stop, len(other))
            differs = np.flatnonzero(first[offset:stop] != other[offset:stop])
            if differs.size:
                stop = offset + int(differs[0])
        return stop


def _intern(sequences: Sequence[Sequence[int]], identities: Sequence[Sequence[Hashable | None]] | None) -> list[np.ndarray]:
    """One int64 a token, equal iff id and image identity are equal."""
    if not len(sequences):
        raise ValueError("TokenTree: sequences must hold at least one sequence, got none")
    if identities is not None and len(identities) != len(sequences):
        raise ValueError(f"TokenTree: identities must have one entry a sequence ({len(sequences)}), got {len(identities)}")
    seen: dict[tuple[int, Hashable], int] = {}
    keys = []
    for index, sequence in enumerate(sequences):
        if not len(sequence):
            raise ValueError(f"TokenTree: sequence {index} is empty")
        key = np.array(sequence, dtype=np.int64)
        if key.min() < 0:
            raise ValueError(f"TokenTree: sequence {index} has token id {key.min()}; ids must be 0 or above")
        if identities is not None:
            row = identities[index]
            if len(row) != len(sequence):
                raise ValueError(f"TokenTree: identities[{index}] must have {len(sequence)} entries, got {len(row)}")
            for offset, identity in enumerate(row):
                if identity is not None:
                    # Token ids are >= 0, so negative keys are image tokens'.
                    key[offset] = -1 - seen.setdefault((int(sequence[offset]), identity), len(seen))
        keys.append(key)
    return keys


def _check_prompts(prompt_lengths: Sequence[int], keys: list[np.ndarray]) -> None:
    if len(prompt_lengths) != len(keys):
        raise ValueError(f"TokenTree: prompt_lengths must have one entry a sequence ({len(keys)}), got {len(prompt_lengths)}")
    for index, (prompt, key) in enumerate(zip(prompt_lengths, keys, strict=True)):
        if not 1 <= prompt <= len(key):
            raise ValueError(f"TokenTree: prompt_lengths[{index}] must be in [1, {len(key)}], got {prompt}")
