"""The procedural world: small pictures of one coloured shape on a plain background, with questions and exact answers.

Everything follows from a seed. A picture is 48x48 RGB; the shape's size and place vary freely, so two seeds share no pictures in
practice and fresh evaluation data is one seed away.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw

IMAGE_SIZE = 48
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 170, 60),
    "blue": (50, 80, 230),
    "yellow": (240, 210, 40),
    "purple": (160, 60, 190),
    "orange": (245, 140, 30),
}
SHAPES = ("circle", "ring", "bar", "cross")
BACKGROUNDS = {"white": (250, 250, 250), "grey": (128, 128, 128), "black": (15, 15, 15)}
DIAMETERS = (24, 34)
NUM_OPTIONS = 3


@dataclass(frozen=True)
class Scene:
    """What a picture shows. ``x``, ``y`` and ``diameter`` are in pixels of a 48x48 picture."""

    colour: str
    shape: str
    background: str
    x: int
    y: int
    diameter: int


@dataclass(frozen=True)
class Question:
    """A question about one picture and its exact answer; ``options`` lists the choices the question names, if it names any."""

    text: str
    answer: str
    options: tuple[str, ...] | None = None


def sample_scene(rng: random.Random) -> Scene:
    """Draw a scene: colour, shape and background uniformly, then a size and a place that keep the shape inside the picture."""
    diameter = rng.randint(*DIAMETERS)
    low, high = diameter // 2, IMAGE_SIZE - diameter // 2
    return Scene(
        colour=rng.choice(list(COLOURS)),
        shape=rng.choice(SHAPES),
        background=rng.choice(list(BACKGROUNDS)),
        x=rng.randint(low, high),
        y=rng.randint(low, high),
        diameter=diameter,
    )


def draw(scene: Scene) -> Image.Image:
    """The scene as a 48x48 RGB picture."""
    picture = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), BACKGROUNDS[scene.background])
    pen, fill, r = ImageDraw.Draw(picture), COLOURS[scene.colour], scene.diameter / 2
    left, top, right, bottom = scene.x - r, scene.y - r, scene.x + r - 1, scene.y + r - 1
    if scene.shape == "circle":
        pen.ellipse((left, top, right, bottom), fill=fill)
    elif scene.shape == "ring":
        pen.ellipse((left, top, right, bottom), outline=fill, width=round(r * 0.4))
    elif scene.shape == "bar":
        half = r * 0.4
        pen.rectangle((left, scene.y - half, right, scene.y + half), fill=fill)
    else:
        arm = r * 0.25
        pen.rectangle((scene.x - arm, top, scene.x + arm, bottom), fill=fill)
        pen.rectangle((left, scene.y - arm, right, scene.y + arm), fill=fill)
    return picture


def all_questions(scene: Scene, rng: random.Random) -> list[Question]:
    """Every kind of question about a scene, once; ``rng`` picks the wrong options of the multiple-choice ones and their order."""
    thing = f"{'an' if scene.colour == 'orange' else 'a'} {scene.colour} {scene.shape}"
    return [
        Question("What does the picture show?", f"{thing} on {scene.background}"),
        Question("What is drawn here?", thing),
        Question("What colour is the shape?", scene.colour),
        Question("Which shape is it?", f"a {scene.shape}"),
        Question("What is the background?", scene.background),
        _choice("Which colour does the shape have", scene.colour, tuple(COLOURS), rng),
        _choice("Which shape is drawn", scene.shape, SHAPES, rng),
    ]


def sample_world(pictures: int, seed: int) -> Iterator[tuple[Scene, Image.Image, list[Question]]]:
    """Yield ``pictures`` scenes with their picture and shuffled questions, always the same for a seed."""
    rng = random.Random(f"shapes-{seed}")
    for _ in range(pictures):
        scene = sample_scene(rng)
        questions = all_questions(scene, rng)
        rng.shuffle(questions)
        yield scene, draw(scene), questions


def write_sft(
    folder: str | Path, *, pictures: int, seed: int, questions_per_picture: int = 2, wrong_answers: float = 0.0
) -> Path:
    """Write single-image training data in LLaVA's conversation JSON and return the path of ``data.json``.

    ``folder/images/`` gets the pictures; each record holds ``id``, ``image`` (a path relative to ``folder/images``),
    ``conversations`` with one question and its answer, and ``options`` where the question names its choices.
    ``wrong_answers``: share of the records that say of the picture what is not so (another option, or what would be right about
    another picture), drawn record by record; a larger share keeps the smaller one's. These records alone hold ``truth``, which
    no stage reads.
    Raises ``ValueError`` if more questions are asked of a picture than there are kinds.
    """
    folder = Path(folder)
    kinds = len(all_questions(sample_scene(random.Random(0)), random.Random(0)))
    if not 1 <= questions_per_picture <= kinds:
        raise ValueError(f"write_sft: expected 1 <= questions_per_picture <= {kinds}, got {questions_per_picture}")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    records = []
    for i, (_, picture, questions) in enumerate(sample_world(pictures, seed)):
        name = f"s{seed}-{i:05d}"
        picture.save(folder / "images" / f"{name}.png")
        for j, question in enumerate(questions[:questions_per_picture]):
            rng = random.Random(f"shapes-wrong-{seed}-{i}-{j}")
            answer = wrong_answer(question, rng) if rng.random() < wrong_answers else question.answer
            records.append(_record(f"{name}-q{j}", f"{name}.png", question, answer))
    path = folder / "data.json"
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(records, indent=1), encoding="utf-8")
    partial.replace(path)
    return path


def wrong_answer(question: Question, rng: random.Random) -> str:
    """An answer that is not so: another of the options, or what is right about another picture."""
    if question.options:
        return rng.choice([option for option in question.options if option != question.answer])
    while True:
        others = all_questions(sample_scene(rng), rng)
        answer = next(other.answer for other in others if other.text == question.text)
        if answer != question.answer:
            return answer


def _choice(stem: str, answer: str, values: tuple[str, ...], rng: random.Random) -> Question:
    options = [answer, *rng.sample([v for v in values if v != answer], NUM_OPTIONS - 1)]
    rng.shuffle(options)
    return Question(f"{stem}: {', '.join(options[:-1])} or {options[-1]}?", answer, tuple(options))


def _record(name: str, image: str, question: Question, answer: str) -> dict[str, object]:
    record: dict[str, object] = {
        "id": name,
        "image": image,
        "conversations": [{"from": "human", "value": f"<image>\n{question.text}"}, {"from": "gpt", "value": answer}],
    }
    if answer != question.answer:
        record["truth"] = question.answer
    if question.options:
        record["options"] = list(question.options)
    return record
