"""Prompts, answers and pictures that the checks are done on: made here, the same every time."""

from __future__ import annotations

import random
from typing import Any

from PIL import Image, ImageDraw

SQUARE, WIDE, TALL, LARGE = (48, 48), (72, 36), (36, 72), (100, 150)
"""Width and height: one tile and several, in a row and in a column."""

_ANSWERS = [("red circle", "blue"), ("yes", "no it is not"), ("the green square on top", "star"), ("two", "three")]


def drawn_image(size: tuple[int, int], seed: int) -> Image.Image:
    """An RGB picture of `size` (width, height) that differs from one of another seed in every patch."""
    rng = random.Random(seed)
    blocks = size[0] // 4, size[1] // 4
    picture = Image.frombytes("RGB", blocks, rng.randbytes(3 * blocks[0] * blocks[1])).resize(size, Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    x, y = rng.randrange(size[0] // 2), rng.randrange(size[1] // 2)
    pen.ellipse((x, y, x + size[0] // 3, y + size[1] // 3), fill=(rng.randrange(256), rng.randrange(256), rng.randrange(256)))
    return picture


def prompt_records() -> list[dict[str, Any]]:
    """Rows of two pictures side by side, of two with text between them, of one large picture, and of none."""
    one, two, three, four, five = (drawn_image(size, seed) for seed, size in enumerate((SQUARE, WIDE, TALL, SQUARE, LARGE)))
    return [
        {"id": "adjacent", "prompt": "look at <image><image> which is red ?", "images": [one, two]},
        {
            "id": "between",
            "prompt": "Image 1 : <image>\nImage 2 : <image>\nwhat colour is the circle in Image 2 ?",
            "images": [three, four],
        },
        {"id": "large", "prompt": "<image>\nwhat shape ?", "images": [five]},
        {"id": "text", "prompt": "is the star red ?", "images": []},
    ]


def answers() -> list[str]:
    """One for each of `prompt_records`."""
    return [chosen for chosen, _ in _ANSWERS]


def preference_records() -> list[dict[str, Any]]:
    """Records of `prompt_records` with two answers each, and a second question about the first one's pictures."""
    prompts = prompt_records()
    prompts.insert(1, {**prompts[0], "id": "again", "prompt": "look at <image><image> is there a star ?"})
    records = []
    for index, record in enumerate(prompts):
        chosen, rejected = _ANSWERS[index % len(_ANSWERS)]
        records.append(
            {
                **record,
                "prompt": [{"role": "user", "content": record["prompt"]}],
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "target": len(record["images"]) - 1 if record["images"] else None,
            }
        )
    return records
