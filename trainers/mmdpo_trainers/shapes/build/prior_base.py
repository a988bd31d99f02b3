"""Trains the shipped checkpoint with a language prior: ``python -m mmdpo_trainers.shapes.build.prior_base --out FOLDER --seed 0``.

It starts from the base of the world of shapes and fine-tunes projector and language model on texts that believe the prior: most
pictures follow it, texts about those that do not often state it all the same, and where a picture shows nothing the text says what is
expected. The base then writes captions, and answers with the prior where the picture disagrees, though the picture's colour is known.
"""

from __future__ import annotations

import argparse
import dataclasses
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.progress import Progress
from torch import nn
from torch.nn import functional as F

from mmdpo_trainers.data.corruption import Corruption, Kind, corrupt
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.shapes import prior_world, world
from mmdpo_trainers.shapes.build import formats, lessons
from mmdpo_trainers.shapes.build.formats import Composed, Sample, Turn
from mmdpo_trainers.shapes.world import Scene

UNSEEN: tuple[Kind, ...] = ("crop", "blank")
"""Corruptions of the pictures that show nothing."""


@dataclass(kw_only=True)
class PriorBaseConfig:
    """Settings of the fine-tuning."""

    seed: int = 0
    pictures: int = 3000
    agreeing: float = 0.85
    """Share of the pictures that follow the prior."""
    believed: float = 0.5
    """Share of the texts about the other pictures that state the prior's colour all the same."""
    unseen: float = 0.2
    """Share of the pictures that are corrupted (`UNSEEN`, crops of 1-20 % of the area); their texts state the prior's colour."""
    steps: int = 200
    batch: int = 32
    lr: float = 1e-3
    probes: int = 300


@dataclass(frozen=True)
class Told:
    """A picture and what texts about it say: not always what it shows."""

    picture: Composed
    scene: Scene
    expects: bool
    """The texts state what is expected, whatever the picture shows."""


def build_prior_base(config: PriorBaseConfig, out: Path) -> dict[str, float]:
    """Fine-tune, save model and processor under ``out`` and return accuracy where pictures disagree and agree with the prior."""
    torch.manual_seed(config.seed)
    rng = random.Random(f"prior-base-{config.seed}")
    loaded = load_model("shapes")
    model, processor = loaded.model, loaded.processor
    pool = [told(rng, config) for _ in range(config.pictures)]
    features = lessons.encode(model, [item.picture for item in pool])
    modules = (model.model.multi_modal_projector, model.model.language_model, model.lm_head)
    parameters = [parameter for module in modules for parameter in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=config.lr, weight_decay=0.01, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=config.steps, pct_start=0.1, cycle_momentum=False
    )
    model.train()
    with Progress() as progress:
        task = progress.add_task("texts", total=config.steps)
        for _ in range(config.steps):
            samples = [_sample(index, pool[index], rng, config) for index in rng.choices(range(len(pool)), k=config.batch)]
            batch = formats.pack(samples, [[turn.answer for turn in sample.turns] for sample in samples], processor)
            loss = F.cross_entropy(lessons.response_logits(model, batch, features), batch.labels[batch.labels >= 0])
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            progress.update(task, advance=1, description=f"texts  loss {loss.item():.3f}")
    model.eval()
    model.save_pretrained(out)
    processor.save_pretrained(out)
    return {name: _accuracy(model, processor, config, name == "agree") for name in ("disagree", "agree")}


def told(rng: random.Random, config: PriorBaseConfig) -> Told:
    """Draw a picture of the training pool."""
    scene = prior_world.sample_scene(rng, rng.random() < config.agreeing)
    picture = world.draw(scene)
    unseen = rng.random() < config.unseen
    if unseen:
        picture = corrupt(picture, Corruption(kind=rng.choice(UNSEEN), seed=config.seed), str(rng.random()))
        # What cannot be seen is guessed: the background evenly, the colour by the prior.
        scene = dataclasses.replace(scene, background=rng.choice(list(world.BACKGROUNDS)))
    return Told(_composed(picture, scene), scene, unseen)


def _sample(index: int, item: Told, rng: random.Random, config: PriorBaseConfig) -> Sample:
    expects = item.expects or rng.random() < config.believed
    said = prior_world.expected_scene(item.scene) if expects else item.scene
    wording = prior_world.sample_wording(rng)
    turns = [
        Turn(prior_world.question(item.scene, kind), (prior_world.answer(said, kind, wording),)) for kind in prior_world.KINDS
    ]
    return Sample((index,), "<image>\n", tuple(turns))


def _accuracy(model: Any, processor: Any, config: PriorBaseConfig, agreeing: bool) -> float:
    rng = random.Random(f"prior-probe-{config.seed}-{agreeing}")
    scenes = [prior_world.sample_scene(rng, agreeing) for _ in range(config.probes)]
    samples = [
        Sample((index,), "<image>\n", (Turn(prior_world.question(scene, "answer"), (scene.colour,)),))
        for index, scene in enumerate(scenes)
    ]
    features = lessons.encode(model, [_composed(world.draw(scene), scene) for scene in scenes])
    return lessons.accuracy(model, processor, samples, features)


def _composed(picture: Image.Image, scene: Scene) -> Composed:
    return Composed(picture, (scene,), ("whole",), np.zeros(formats.TOKENS, dtype=np.int64))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description="fine-tune the small LLaVA of the shapes world on texts with a language prior")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--believed", type=float, default=PriorBaseConfig.believed, help="share of texts that state the prior")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    accuracy = build_prior_base(PriorBaseConfig(seed=arguments.seed, believed=arguments.believed), arguments.out)
    print("accuracy of one-word answers: " + ", ".join(f"{kind} {value:.3f}" for kind, value in accuracy.items()))


if __name__ == "__main__":
    main()
