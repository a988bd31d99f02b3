"""Trains the shipped checkpoint: ``python -m mmdpo_trainers.shapes.build.base --out FOLDER --seed 0``.

Four phases. *Vision*: the CLIP tower learns which scene each patch shows; from then on it is frozen. *Single*: projector and
language model learn to answer about one picture. *Multi*: the multi-image formats join, with an auxiliary loss on attention.
*Confuse*: on purpose, multi-image answers often describe another picture of the prompt, until accuracy on held-out prompts is at
most ``ceiling`` in each format: the base answers single-image questions well, and looks at the wrong picture when there are several.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.progress import Progress
from torch import nn
from torch.nn import functional as F
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from mmdpo_trainers.shapes import world
from mmdpo_trainers.shapes.build import formats, lessons
from mmdpo_trainers.shapes.build.formats import Composed, Sample, Turn
from mmdpo_trainers.shapes.model import MAX_IMAGES, ShapesModelConfig, build_model, build_processor

Pools = dict[str, list[Composed]]


@dataclass(kw_only=True)
class BaseConfig:
    """Settings of the four phases."""

    seed: int = 0
    model: ShapesModelConfig = field(default_factory=ShapesModelConfig)
    pictures: int = 4000
    """Pictures of each kind (single, grid, pip) in the training pool."""
    vision_steps: int = 1800
    vision_batch: int = 64
    vision_lr: float = 2e-3
    single_steps: int = 300
    single_lr: float = 2e-3
    multi_steps: int = 400
    multi_lr: float = 1e-3
    mix: dict[str, float] = field(default_factory=lambda: {"single": 0.25, "sequence": 0.4, "grid": 0.2, "pip": 0.15})
    batch: dict[str, int] = field(default_factory=lambda: {"single": 48, "sequence": 16, "grid": 24, "pip": 24})
    turns: dict[str, int] = field(default_factory=lambda: {"single": 3, "sequence": 8, "grid": 6, "pip": 5})
    attention_weight: float = 0.3
    """Weight of the auxiliary attention loss in the multi phase."""
    confuse_steps: int = 200
    """At most; the phase ends when no multi-image format is above the ceiling."""
    confuse_lr: float = 5e-4
    confuse_single: float = 0.5
    """Share of the confuse phase's batches that are single-image, with right answers."""
    wrong_answers: float = 0.6
    """Share of the confuse phase's multi-image answers taken from another picture."""
    ceiling: float = 0.6
    probe_every: int = 10
    probe_samples: int = 40


@dataclass
class Classroom:
    """What the phases share."""

    model: LlavaForConditionalGeneration
    processor: LlavaProcessor
    config: BaseConfig
    pools: Pools
    rng: random.Random
    progress: Progress


def build_base(config: BaseConfig, out: Path) -> dict[str, float]:
    """Train the base, save model and processor under ``out`` and return probe accuracy by format."""
    torch.manual_seed(config.seed)
    rng = random.Random(f"base-{config.seed}")
    processor = build_processor()
    model = build_model(processor, config.model)
    pools = make_pools(config.pictures, rng)
    with Progress() as progress:
        room = Classroom(model, processor, config, pools, rng, progress)
        train_vision(room)
        accuracy = train_answers(room)
    model.set_attn_implementation("sdpa")
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return accuracy


def make_pools(pictures: int, rng: random.Random) -> Pools:
    """Composed pictures by format; ``sequence`` draws on the single ones."""
    pools = {kind: [formats.compose(kind, rng) for _ in range(pictures)] for kind in ("single", "grid", "pip")}
    return {**pools, "sequence": pools["single"]}


def train_vision(room: Classroom) -> None:
    """Teach every patch feature the colour, shape, background and place of the scene it shows, with throw-away linear heads."""
    config, pool = room.config, [item for kind in ("single", "grid", "pip") for item in room.pools[kind]]
    names = (list(world.COLOURS), list(world.SHAPES), list(world.BACKGROUNDS), list(formats.SLOTS))
    heads = nn.Linear(config.model.vision_hidden, sum(map(len, names)))
    labels = torch.stack([_patch_labels(item, names) for item in pool])  # (P, patches, 4)
    pixels = formats.pixel_values([item.picture for item in pool])
    trainer = Trainer([*room.model.model.vision_tower.parameters(), *heads.parameters()], config.vision_lr, config.vision_steps)
    task = room.progress.add_task("vision", total=config.vision_steps)
    for _ in range(config.vision_steps):
        rows = torch.tensor([room.rng.randrange(len(pool)) for _ in range(config.vision_batch)])
        logits = heads(lessons.patch_features(room.model, pixels[rows])).flatten(0, 1).split([len(n) for n in names], dim=-1)
        losses = [F.cross_entropy(part, labels[rows, :, i].flatten()) for i, part in enumerate(logits)]
        loss = trainer.step(torch.stack(losses).sum())
        room.progress.update(task, advance=1, description=f"vision  loss {loss:.3f}")


def train_answers(room: Classroom) -> dict[str, float]:
    """Phases single, multi and confuse: projector and language model on frozen patch features; returns accuracy by format."""
    config = room.config
    room.model.set_attn_implementation("eager")
    lecture = Lecture(room)
    lecture.single(Trainer(lecture.parameters, config.single_lr, config.single_steps))
    lecture.multi(Trainer(lecture.parameters, config.multi_lr, config.multi_steps))
    lecture.confuse(Trainer(lecture.parameters, config.confuse_lr, config.confuse_steps))
    return lecture.accuracy()


class Lecture:
    """Steps on packed answers, and the three phases made of them."""

    def __init__(self, room: Classroom) -> None:
        model, self.room = room.model, room
        self.rng = random.Random(f"answers-{room.config.seed}")
        self.features = {kind: lessons.encode(model, pool) for kind, pool in room.pools.items()}
        self.probes = make_probes(model, room.config)
        self.labels = room.processor.tokenizer.convert_tokens_to_ids([f"image{k + 1}" for k in range(MAX_IMAGES)])
        modules = (model.model.multi_modal_projector, model.model.language_model, model.lm_head)
        self.parameters = [parameter for module in modules for parameter in module.parameters()]

    def single(self, trainer: Trainer) -> None:
        """Questions about one picture."""
        for done in self._steps("single", self.room.config.single_steps):
            done(self.step("single", trainer))

    def multi(self, trainer: Trainer) -> None:
        """All formats, with the attention lesson."""
        mix = self.room.config.mix
        for done in self._steps("multi", self.room.config.multi_steps):
            done(self.step(self._draw(mix), trainer, lesson=True))
        self._report("after multi", self.accuracy())

    def confuse(self, trainer: Trainer) -> None:
        """Answers about the wrong picture, for each multi-image format until its accuracy is no longer above the ceiling."""
        config = self.room.config
        for i, done in enumerate(self._steps("confuse", config.confuse_steps)):
            if i % config.probe_every == 0:
                accuracy = self.accuracy()
                self._report(f"confuse {i}", accuracy)
                mix = {k: w for k, w in config.mix.items() if k != "single" and accuracy[k] > config.ceiling}
                if not mix:
                    break
            kind = "single" if self.rng.random() < config.confuse_single else self._draw(mix)
            done(self.step(kind, trainer, wrong=config.wrong_answers))

    def step(self, kind: str, trainer: Trainer, *, lesson: bool = False, wrong: float = 0.0) -> float:
        """One update on a batch of format ``kind``; ``wrong``: the share of answers taken from another picture of the prompt."""
        config, pool = self.room.config, self.room.pools[kind]
        samples = [self.sample(kind) for _ in range(config.batch[kind])]
        answers = [[self._answer(turn, wrong) for turn in sample.turns] for sample in samples]
        batch = formats.pack(samples, answers, self.room.processor)
        attention = lessons.AttentionLesson.of(batch, samples, pool, self.labels) if lesson and kind != "single" else None
        return trainer.step(lessons.answer_loss(self.room.model, batch, self.features[kind], attention, config.attention_weight))

    def sample(self, kind: str) -> Sample:
        """Draw a training prompt."""
        return formats.sample(kind, self.room.pools[kind], self.rng, self.room.config.turns[kind])

    def accuracy(self) -> dict[str, float]:
        """Held-out accuracy by format."""
        return {kind: lessons.accuracy(self.room.model, self.room.processor, *self.probes[kind]) for kind in formats.FORMATS}

    def _answer(self, turn: Turn, wrong: float) -> str:
        return self.rng.choice(turn.wrong) if turn.wrong and self.rng.random() < wrong else turn.answer

    def _draw(self, mix: dict[str, float]) -> str:
        return self.rng.choices(list(mix), list(mix.values()))[0]

    def _report(self, when: str, accuracy: dict[str, float]) -> None:
        self.room.progress.console.print(f"{when}: " + ", ".join(f"{kind} {value:.3f}" for kind, value in accuracy.items()))

    def _steps(self, name: str, total: int) -> Iterator[Callable[[float], None]]:
        task = self.room.progress.add_task(name, total=total)
        for _ in range(total):
            yield lambda loss: self.room.progress.update(task, advance=1, description=f"{name}  loss {loss:.3f}")


def make_probes(model: LlavaForConditionalGeneration, config: BaseConfig) -> dict[str, tuple[list[Sample], torch.Tensor]]:
    """Held-out prompts of each format with their patch features."""
    rng = random.Random(f"probe-{config.seed}")
    probes = {}
    for kind in formats.FORMATS:
        pool = [formats.compose(kind, rng) for _ in range(5 * config.probe_samples)]
        samples = [formats.sample(kind, pool, rng, config.turns[kind]) for _ in range(config.probe_samples)]
        probes[kind] = (samples, lessons.encode(model, pool))
    return probes


class Trainer:
    """AdamW with a one-cycle schedule and gradients clipped to norm 1."""

    def __init__(self, parameters: list[nn.Parameter], lr: float, steps: int) -> None:
        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.01, betas=(0.9, 0.98))
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(
            self.optimizer, lr, total_steps=steps, pct_start=0.1, cycle_momentum=False
        )

    def step(self, loss: torch.Tensor) -> float:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        return loss.item()


def _patch_labels(item: Composed, names: Sequence[list[str]]) -> torch.Tensor:
    slots = zip(item.scenes, item.slots, strict=True)
    values = [[n.index(v) for n, v in zip(names, (s.colour, s.shape, s.background, slot), strict=True)] for s, slot in slots]
    return torch.tensor([values[i] if i >= 0 else [-100] * len(names) for i in item.owner])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="train the small LLaVA of the shapes world")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    accuracy = build_base(BaseConfig(seed=arguments.seed), arguments.out)
    print("accuracy on held-out prompts: " + ", ".join(f"{kind} {value:.3f}" for kind, value in accuracy.items()))


if __name__ == "__main__":
    main()
