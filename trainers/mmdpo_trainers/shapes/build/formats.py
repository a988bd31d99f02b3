"""Prompts of the shapes world in MIA-DPO's formats, packed as trees: the pictures once, then every question as its own branch."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import LlavaProcessor

from mmdpo_trainers.data.compose import box_to_region, grid_collage, pic_in_pic
from mmdpo_trainers.data.multi_image import PIP_OPENINGS
from mmdpo_trainers.shapes import world
from mmdpo_trainers.shapes.model import PATCH_GRID

FORMATS = ("single", "sequence", "grid", "pip")
TOKENS = PATCH_GRID[0] * PATCH_GRID[1]

SEQUENCE_COUNTS = (2, 3, 4, 5)
GRID_COUNTS = (2, 4)
"""Collages whose cells fall on whole patches of the 4x4 patch grid."""
GRID_OPTIONS: dict[str, Any] = {"cell_size": 24, "margin": 0, "label": False, "square": True}
PIP_OPTIONS: dict[str, Any] = {"max_fraction": 0.5}
"""The pasted picture covers the four patches in the middle."""

SLOTS = ("whole", "cell 1", "cell 2", "cell 3", "cell 4", "pasted", "host")
"""Where in a model picture a scene can be."""


@dataclass(frozen=True)
class Composed:
    """One model picture: its pixels, the scenes in it, and for each patch the index of the scene it shows (-1: padding)."""

    picture: Image.Image
    scenes: tuple[world.Scene, ...]
    slots: tuple[str, ...]
    owner: np.ndarray  # (patches,)


@dataclass(frozen=True)
class Turn:
    """A question about one of a sample's pictures; ``answers`` are what would be right about each of them, ``target`` the one meant."""

    prompt: str
    answers: tuple[str, ...]
    target: int = 0

    @property
    def answer(self) -> str:
        """The right one."""
        return self.answers[self.target]

    @property
    def wrong(self) -> tuple[str, ...]:
        """Answers about the other pictures, where they differ."""
        return tuple(answer for answer in self.answers if answer != self.answer)


@dataclass(frozen=True)
class Sample:
    """Pictures by pool index, the text before the questions (with ``<image>`` in place), and the questions."""

    pictures: tuple[int, ...]
    prefix: str
    turns: tuple[Turn, ...]

    def owners(self, pool: Sequence[Composed]) -> np.ndarray:
        """For each image token, in order, the scene it shows, counted through the sample's pictures (-1: padding)."""
        owners, first = [], 0
        for i in self.pictures:
            owners.append(np.where(pool[i].owner >= 0, pool[i].owner + first, -1))
            first += len(pool[i].scenes)
        return np.concatenate(owners)


def compose(kind: str, rng: random.Random) -> Composed:
    """A single picture, a collage (``grid``) or a pic-in-pic (scene 0 is pasted on scene 1)."""
    owner = np.zeros(PATCH_GRID, dtype=np.int64)
    scenes: tuple[world.Scene, ...]
    slots: tuple[str, ...]
    if kind in ("single", "sequence"):
        scenes = (world.sample_scene(rng),)
        picture, slots = world.draw(scenes[0]), ("whole",)
    elif kind == "grid":
        scenes = tuple(world.sample_scene(rng) for _ in range(rng.choice(GRID_COUNTS)))
        picture, boxes = grid_collage([world.draw(s) for s in scenes], **GRID_OPTIONS)
        slots = tuple(f"cell {i + 1}" for i in range(len(scenes)))
        owner[:] = -1
        for i, box in enumerate(boxes):
            _fill(owner, box, i)
    else:
        scenes = (world.sample_scene(rng), world.sample_scene(rng))
        picture, box = pic_in_pic(world.draw(scenes[1]), world.draw(scenes[0]), **PIP_OPTIONS)
        slots = ("pasted", "host")
        owner[:] = 1
        _fill(owner, box, 0)
    return Composed(picture, scenes, slots, owner.reshape(-1))


def pixel_values(pictures: Sequence[Image.Image]) -> torch.Tensor:
    """What the processor makes of 48x48 RGB pictures (rescale, mean and deviation 0.5): (B, 3, 48, 48) float32."""
    pixels = np.stack([np.asarray(p) for p in pictures]).astype(np.float32)
    return torch.from_numpy(pixels / 127.5 - 1.0).permute(0, 3, 1, 2).contiguous()


def sample(kind: str, pool: Sequence[Composed], rng: random.Random, turns: int) -> Sample:
    """Draw a prompt of format ``kind`` with ``turns`` questions, on pictures of ``pool`` (singles for ``sequence``)."""
    pictures = tuple(rng.sample(range(len(pool)), rng.choice(SEQUENCE_COUNTS) if kind == "sequence" else 1))
    scenes = [s for i in pictures for s in pool[i].scenes]
    prefix = "<image>\n"
    if kind == "sequence":
        prefix = "".join(f"Image{k + 1}:<image>\n" for k in range(len(pictures)))
    return Sample(pictures, prefix, tuple(_turn(kind, scenes, rng) for _ in range(turns)))


@dataclass
class TreeBatch:
    """Samples packed as trees, right-padded: every tensor (B, S).

    ``patch`` indexes flattened pool features, -1 for text; query i sees key j iff ``j <= i < tree_end[j]``; ``labels`` hold
    the token each row predicts (-100: none), ``turn`` its question's number in the batch.
    """

    input_ids: torch.Tensor
    patch: torch.Tensor
    positions: torch.Tensor
    tree_end: torch.Tensor
    labels: torch.Tensor
    turn: torch.Tensor

    def mask(self) -> torch.Tensor:
        """(B, 1, S, S) float32 to add to scores: 0 where a query (row) sees a key, else the lowest number."""
        row = torch.arange(self.input_ids.shape[1])
        seen = (row[None, :] <= row[:, None]) & (row[None, :, None] < self.tree_end[:, None, :])
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[:, None]


def pack(samples: Sequence[Sample], answers: Sequence[Sequence[str]], processor: LlavaProcessor) -> TreeBatch:
    """Pack samples with one answer for every turn (its own answer, or another that training should see)."""
    tokenizer = processor.tokenizer
    image, pad, end = tokenizer.convert_tokens_to_ids("<image>"), tokenizer.pad_token_id, tokenizer.eos_token_id
    rows, number = [], 0
    for item, given in zip(samples, answers, strict=True):
        ids: list[int] = []
        patch: list[int] = []
        pictures = iter(item.pictures)
        for token in tokenizer(f"USER: {item.prefix}").input_ids:
            if token == image:
                first = next(pictures) * TOKENS
                ids += [image] * TOKENS
                patch += range(first, first + TOKENS)
            else:
                ids.append(token)
                patch.append(-1)
        shared = len(ids)
        positions, labels, turn, ends = list(range(shared)), [-100] * shared, [-1] * shared, [0] * shared
        for question, answer in zip(item.turns, given, strict=True):
            prompt = tokenizer(f"{question.prompt} ASSISTANT:").input_ids
            response = [*tokenizer(answer).input_ids, end]
            branch = prompt + response[:-1]
            stop = len(ids) + len(branch)
            ids += branch
            patch += [-1] * len(branch)
            positions += range(shared, shared + len(branch))
            labels += [-100] * (len(prompt) - 1) + response
            turn += [number] * len(branch)
            ends += [stop] * len(branch)
            number += 1
        ends[:shared] = [len(ids)] * shared
        rows.append((ids, patch, positions, ends, labels, turn))
    fills = (pad, -1, 0, 0, -100, -1)
    length = max(len(row[0]) for row in rows)
    columns = [[row[c] + [fill] * (length - len(row[c])) for row in rows] for c, fill in enumerate(fills)]
    return TreeBatch(*(torch.tensor(column) for column in columns))


def _turn(kind: str, scenes: Sequence[world.Scene], rng: random.Random) -> Turn:
    target = 0 if kind in ("single", "pip") else rng.randrange(len(scenes))
    question = rng.choice(world.all_questions(scenes[target], rng))
    lowered = question.text[0].lower() + question.text[1:]
    prompt = {"single": question.text, "pip": f"{rng.choice(PIP_OPENINGS)} {lowered}"}.get(
        kind, f"In Image{target + 1}, {lowered}"
    )
    stem = question.text.split(":")[0]
    others = [s for i, s in enumerate(scenes) if i != target]
    answers = [q.answer for s in others for q in world.all_questions(s, rng) if q.text.split(":")[0] == stem]
    return Turn(prompt, (*answers[:target], question.answer, *answers[target:]), target)


def _fill(owner: np.ndarray, box: Sequence[float], index: int) -> None:
    row0, column0, row1, column1 = box_to_region(box, PATCH_GRID)
    owner[row0:row1, column0:column1] = index
