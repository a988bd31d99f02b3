"""The world of shapes with a language prior: each shape has a colour that texts expect of it, and pictures that break the habit.

Questions name the shape, so that the text alone suggests an answer. Preference pairs set the truth of the picture (chosen) against
what the prior says (rejected), in two kinds of answer: one word, and a whole caption of 26 to 38 tokens.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from PIL import Image

from mmdpo_trainers.shapes import world
from mmdpo_trainers.shapes.world import Scene

PRIOR = {"circle": "red", "ring": "blue", "bar": "green", "cross": "yellow"}
"""Shape -> the colour that is expected of it."""

KINDS = ("answer", "caption")
"""A colour in one word; a description of the whole picture."""

SPLITS = {"pairs": 0, "held_out": 1, "evaluation": 1}
"""What pictures are for -> whether the sum of the shape's coordinates is odd, so that none is both trained and evaluated on."""

# Several wordings of one content: a caption's likelihood then has room to move without the facts that it states.
_OPENINGS = (
    "this picture shows", "the picture shows", "here is", "this is a picture of", "the image shows", "in this photo there is",
    "the photograph shows",
)  # fmt: skip
_PLACES = ("on a {background} background", "on {background}", "with a {background} background")
_COLOURS = (
    "the colour of the {shape} is {colour}", "the {shape} has the colour {colour}", "the {shape} is {colour}",
    "{colour} is the colour of the {shape}",
)  # fmt: skip
_BACKGROUNDS = (
    "the background of the picture is {background}", "the whole background is {background}",
    "{background} is the background colour", "the background has the colour {background}",
)  # fmt: skip
_ENDINGS = (
    "there is only one shape in the picture", "the {shape} is the only shape here", "it is the main shape in the photo",
    "the picture has a single shape",
)  # fmt: skip
_PARTS = (_OPENINGS, _PLACES, _COLOURS, _BACKGROUNDS, _ENDINGS)


@dataclass(frozen=True)
class Pair:
    """A question about a picture with the true answer and a wrong one."""

    scene: Scene
    kind: str
    question: str
    chosen: str
    rejected: str
    wording: tuple[int, ...] = ()

    @property
    def group(self) -> str:
        """`answer/disagree`, `caption/agree`, …: the kind, and whether the picture agrees with the prior."""
        return f"{self.kind}/{'agree' if agrees(self.scene) else 'disagree'}"


def agrees(scene: Scene) -> bool:
    """Whether the shape has the colour that is expected of it."""
    return scene.colour == PRIOR[scene.shape]


def sample_scene(rng: random.Random, agreeing: bool, split: str | None = None) -> Scene:
    """A scene that agrees with the prior, or one with any of the other colours. split: see `SPLITS`; None: any place."""
    scene = world.sample_scene(rng)
    while split is not None and (scene.x + scene.y) % 2 != SPLITS[split]:
        scene = world.sample_scene(rng)
    expected = PRIOR[scene.shape]
    colour = expected if agreeing else rng.choice([name for name in world.COLOURS if name != expected])
    return dataclasses.replace(scene, colour=colour)


def expected_scene(scene: Scene) -> Scene:
    """What the prior makes of a scene."""
    return dataclasses.replace(scene, colour=PRIOR[scene.shape])


def question(scene: Scene, kind: str) -> str:
    """What is asked about a scene; it names the shape."""
    return f"What colour is the {scene.shape}?" if kind == "answer" else f"Tell me about the {scene.shape} in the picture."


def answer(scene: Scene, kind: str, wording: tuple[int, ...]) -> str:
    """The answer that describes `scene`; wording: from `sample_wording`, which choices a caption's phrases are."""
    if kind == "answer":
        return scene.colour
    opening, place, *sentences = (part[choice] for part, choice in zip(_PARTS, wording, strict=True))
    article = "an" if scene.colour == "orange" else "a"
    text = f"{opening} {article} {{colour}} {{shape}} {place}. {'. '.join(sentences)}."
    return text.format(colour=scene.colour, shape=scene.shape, background=scene.background)


def sample_wording(rng: random.Random) -> tuple[int, ...]:
    """A choice for each part of a caption."""
    return tuple(rng.randrange(len(part)) for part in _PARTS)


def sample_pair(rng: random.Random, scene: Scene, kind: str) -> Pair:
    """A pair about `scene`: rejected is what the prior says, or where that is the truth another colour, in the wording of chosen."""
    other = rng.choice([colour for colour in world.COLOURS if colour != scene.colour])
    wrong = dataclasses.replace(scene, colour=other) if agrees(scene) else expected_scene(scene)
    wording = sample_wording(rng)
    return Pair(scene, kind, question(scene, kind), answer(scene, kind, wording), answer(wrong, kind, wording), wording)


def preference_records(
    count: int, *, seed: int, split: str, counterfactual: float, captions: float
) -> Iterator[tuple[dict[str, Any], Image.Image]]:
    """Yield `count` preference records with TRL's columns, each with its picture, which belongs at `images/<id>.png`.

    `answer` and `options` are those of evaluation: what is to be true of other answers to the prompt.

    counterfactual, captions: shares of pictures that disagree with the prior, and of captions. What comes follows from seed and
    `split` ("pairs", "held_out"), whatever `count` is; the two share no picture.
    """
    for name, pair in _pairs(count, seed, split, counterfactual, captions):
        record = {
            "id": name,
            "kind": pair.kind,
            "group": pair.group,
            "images": [f"images/{name}.png"],
            "prompt": [{"role": "user", "content": f"<image>\n{pair.question}"}],
            "chosen": [{"role": "assistant", "content": pair.chosen}],
            "rejected": [{"role": "assistant", "content": pair.rejected}],
            "answer": pair.scene.colour,
            "options": list(world.COLOURS),
        }
        yield record, world.draw(pair.scene)


def similar_columns(
    count: int, *, seed: int, split: str, counterfactual: float, captions: float
) -> Iterator[tuple[dict[str, Any], Image.Image]]:
    """Yield for each record of `preference_records` the columns `similar_images` and `similar_chosen`, and that picture: the same shape in the
    same place, in another colour; what is right about it has the wording of chosen. The picture belongs at `images/<id>-similar.png`.
    """
    rng = random.Random(f"prior-{split}-{seed}-similar")
    for name, pair in _pairs(count, seed, split, counterfactual, captions):
        other = rng.choice([colour for colour in world.COLOURS if colour != pair.scene.colour])
        scene = dataclasses.replace(pair.scene, colour=other)
        columns = {
            "similar_images": [f"images/{name}-similar.png"],
            "similar_chosen": [{"role": "assistant", "content": answer(scene, pair.kind, pair.wording)}],
        }
        yield columns, world.draw(scene)


def _pairs(count: int, seed: int, split: str, counterfactual: float, captions: float) -> Iterator[tuple[str, Pair]]:
    rng = random.Random(f"prior-{split}-{seed}")
    for number in range(count):
        scene = sample_scene(rng, rng.random() >= counterfactual, split)
        yield f"{split}-{number:05d}", sample_pair(rng, scene, KINDS[rng.random() < captions])


def evaluation_prompts(disagreeing: int, agreeing: int, *, seed: int) -> Iterator[tuple[dict[str, Any], Image.Image]]:
    """Yield prompt records, one of each kind for every picture, with their pictures, none of them one of training.

    The truth is the colour, of a caption too: it must name that one and no other.
    """
    rng = random.Random(f"prior-evaluation-{seed}")
    for number in range(disagreeing + agreeing):
        scene = sample_scene(rng, number >= disagreeing, "evaluation")
        name = f"evaluation-{number:05d}"
        for kind in KINDS:
            record = {
                "id": f"{name}/{kind}",
                "kind": kind,
                "group": f"{kind}/{'agree' if agrees(scene) else 'disagree'}",
                "images": [f"images/{name}.png"],
                "prompt": f"<image>\n{question(scene, kind)}",
                "answer": scene.colour,
                "options": list(world.COLOURS),
                "expected": PRIOR[scene.shape],
            }
            yield record, world.draw(scene)
