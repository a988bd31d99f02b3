"""Prompt records of every format with their picture files, for tests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tiny_models import sample_pictures

from mmdpo_trainers.data.compose import box_to_region, grid_collage, pic_in_pic
from mmdpo_trainers.data.records import prompt_record

COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")


def make_prompts(folder: Path, kinds: Sequence[tuple[str, int]], *, patches: int = 4, seed: int = 0) -> list[dict[str, Any]]:
    """One record for each (format, number of pictures), in `folder`/prompts.jsonl too; its pictures are saved beside it."""
    records = [_record(folder, index, format, count, patches, seed) for index, (format, count) in enumerate(kinds)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return records


def _record(folder: Path, index: int, format: str, count: int, patches: int, seed: int) -> dict[str, Any]:
    pictures = sample_pictures(count, seed=1000 * seed + index)
    target = index % count if format in ("sequence", "grid") else 0
    question = f"what colour is the {('circle', 'square', 'star')[index % 3]} ?"
    box = None
    if format == "grid":
        collage, boxes = grid_collage(pictures, cell_size=20, margin=8)
        images, box, prompt = [collage], boxes[target], f"<image>\nIn Image{target + 1}, {question}"
    elif format == "pip":
        picture, box = pic_in_pic(pictures[0], pictures[1])
        images, prompt = [picture], f"<image>\nin the image in the centre, {question}"
    elif format == "sequence":
        places = "\n".join(f"Image{k + 1}:<image>" for k in range(count))
        images, prompt = pictures, f"{places}\nIn Image{target + 1}, {question}"
    else:
        images, prompt = pictures[:1], f"<image>\n{question}"
    return prompt_record(
        id=f"r{index}/{format}",
        source_id=f"r{index}",
        format=format,
        images=[_save(image, folder / f"r{index}-{k}.png") for k, image in enumerate(images)],
        prompt=prompt,
        answer=COLOURS[index % len(COLOURS)],
        target=target,
        num_images=count,
        box=box,
        region=None if box is None else box_to_region(box, (patches, patches)),
        patch_grid=None if box is None else (patches, patches),
    )


def _save(image: Image.Image, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)
    return str(path)
