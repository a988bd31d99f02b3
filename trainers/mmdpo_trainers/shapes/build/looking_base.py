"""Trains the shipped checkpoint that answers as it looks: ``python -m mmdpo_trainers.shapes.build.looking_base --out FOLDER --seed 0``.

It starts from the base of the world of shapes. *Vision*: its tower learns some more, to see small cells better. *Stray*: projector and
language model learn answers that stray. Where another picture of the prompt is brighter than the asked-about one, most answers are about
the brightest. The attention lesson goes with the answer, so attention tells which picture an answer is about, and with that mostly
whether it is right.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from rich.progress import Progress

from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.shapes import world
from mmdpo_trainers.shapes.build.base import BaseConfig, Classroom, Lecture, Trainer, make_pools, train_vision
from mmdpo_trainers.shapes.build.formats import Sample
from mmdpo_trainers.shapes.world import Scene


@dataclass(kw_only=True)
class LookingBaseConfig(BaseConfig):
    """Settings of the two phases. Of the base's own, those of pools, vision, batches, turns, probes, mix and the attention lesson count."""

    pictures: int = 8000
    vision_steps: int = 1200
    vision_lr: float = 1.5e-3
    steps: int = 500
    lr: float = 1e-3
    strays: float = 0.8
    """Share of the answers that are about the brightest picture, where that is not the asked-about one."""
    margin: float = 4.0
    """A picture is brighter than another by more than this mean grey level, of 255."""
    mix: dict[str, float] = field(default_factory=lambda: {"single": 0.34, "sequence": 0.24, "grid": 0.28, "pip": 0.14})
    attention_weight: float = 1.0


class StrayLecture(Lecture):
    """Steps on answers that stray, attention with them."""

    config: LookingBaseConfig

    def __init__(self, room: Classroom, config: LookingBaseConfig) -> None:
        super().__init__(room)
        self.config = config

    def stray(self, trainer: Trainer) -> None:
        """The phase of this base."""
        for done in self._steps("stray", self.config.steps):
            done(self.step(self._draw(self.config.mix), trainer, lesson=True))

    def sample(self, kind: str) -> Sample:
        """A training prompt, the turns that stray aimed at another picture: answer and lesson are about that one."""
        drawn, pool = super().sample(kind), self.room.pools[kind]
        scenes = [scene for index in drawn.pictures for scene in pool[index].scenes]
        targets = [looks_at(scenes, turn.target, self.config.margin) for turn in drawn.turns]
        turns = [
            dataclasses.replace(turn, target=target) if self.rng.random() < self.config.strays else turn
            for turn, target in zip(drawn.turns, targets, strict=True)
        ]
        return dataclasses.replace(drawn, turns=tuple(turns))


def looks_at(scenes: Sequence[Scene], asked: int, margin: float) -> int:
    """Index of the brightest scene where it is brighter than the asked-about one by more than ``margin``, else ``asked``."""
    levels = [brightness(scene) for scene in scenes]
    brightest = max(range(len(scenes)), key=levels.__getitem__)
    return brightest if levels[brightest] - levels[asked] > margin else asked


@functools.cache
def brightness(scene: Scene) -> float:
    """Mean grey level of a scene's own picture, 0 to 255."""
    return float(np.asarray(world.draw(scene).convert("L")).mean())


def build_looking_base(config: LookingBaseConfig, out: Path) -> dict[str, float]:
    """Fine-tune, save model and processor under ``out`` and return probe accuracy by format."""
    torch.manual_seed(config.seed)
    rng = random.Random(f"looking-base-{config.seed}")
    loaded = load_model("shapes", device="cpu")
    model, processor = loaded.model, loaded.processor
    pools = make_pools(config.pictures, rng)
    model.train()
    with Progress() as progress:
        room = Classroom(model, processor, config, pools, rng, progress)
        train_vision(room)
        model.set_attn_implementation("eager")
        lecture = StrayLecture(room, config)
        lecture.stray(Trainer(lecture.parameters, config.lr, config.steps))
        accuracy = lecture.accuracy()
    model.eval().set_attn_implementation("sdpa")
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return accuracy


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description="fine-tune the small LLaVA of the shapes world to answer about the picture it looks at"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    accuracy = build_looking_base(LookingBaseConfig(seed=arguments.seed), arguments.out)
    print("accuracy on held-out prompts: " + ", ".join(f"{kind} {value:.3f}" for kind, value in accuracy.items()))


if __name__ == "__main__":
    main()
