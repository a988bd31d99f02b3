"""A finished run folder of invented numbers, as docs/architecture.md describes it, and heat maps to go with it."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from mmdpo_trainers.answers.layer_choice import Answers, layer_curves
from mmdpo_trainers.report import heatmaps
from mmdpo_trainers.report.contents import RunContents
from mmdpo_trainers.report.heatmaps import HeatExample, HeatMaps

COLOURS = ("red", "green", "blue", "orange")
ACCURACY = {
    "before": {"sequence": 0.55, "grid": 0.66, "pip": 0.61, "single": 0.97},
    "after": {"sequence": 0.87, "grid": 0.87, "pip": 0.87, "single": 0.96},
}


def picture(path: Path, colour: str, size: tuple[int, int] = (48, 48), cells: int = 1) -> None:
    image = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(image)
    for cell in range(cells):
        x = size[0] * cell / cells
        draw.ellipse([x + 12, 12, x + 36, 36], fill=colour if cell == 0 else "black")
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))


def prompt(folder: Path, format: str, index: int) -> dict[str, Any]:
    """A prompt record whose pictures are in `<folder>/augment/images`, as files two folders below the run see them."""
    colour = COLOURS[index % 4]
    shared = {"id": f"q{index}/{format}", "source_id": f"q{index}", "format": format, "answer": colour}
    shared |= {"target": 0, "num_images": 1, "box": None, "region": None, "patch_grid": None, "options": None}
    images = folder / "augment" / "images"
    if format == "sequence":
        n = 2 + index % 4
        names = [f"{COLOURS[(index + i) % 4]}.png" for i in range(n)]
        text = "".join(f"Image{i + 1}:<image>\n" for i in range(n)) + "In Image1, what colour is the circle?"
        shared |= {"num_images": n}
    elif format == "single":
        names, text = [f"{colour}.png"], "<image>\nWhat colour is the circle?"
    else:
        names, text = [f"{colour}-{format}.png"], "<image>\nIn Image1, what colour is the circle?"
        shared |= {"num_images": 2, "box": [0, 0, 0.5, 1], "region": [0, 0, 4, 2], "patch_grid": [4, 4]}
    for name in names:
        if not (images / name).exists():
            collage = format in ("grid", "pip")
            picture(images / name, name.split(".")[0].split("-")[0], (96, 48) if collage else (48, 48), 2 if collage else 1)
    return {**shared, "images": [f"../../augment/images/{name}" for name in names], "prompt": text}


def answers(folder: Path, moment: str, seed: int) -> list[dict[str, Any]]:
    rng = random.Random(seed)
    records = []
    for format, share in ACCURACY[moment].items():
        for index in range(60):
            record = prompt(folder, format, index)
            correct = rng.random() < share
            ratio = None if format == "single" else round(rng.betavariate(3, 2 if moment == "after" else 4), 4)
            response = record["answer"] if correct else "purple"
            records.append({**record, "response": response, "correct": correct, "ratio": ratio, "perplexity": 1.3})
    return records


def scored(folder: Path) -> list[dict[str, Any]]:
    rng = random.Random(5)
    records = []
    for format in ("sequence", "grid", "pip"):
        for index in range(80):
            record = prompt(folder, format, index)
            right = rng.random() < 0.5
            record["images"] = [image.replace("../../", "../") for image in record["images"]]
            ratio = round(rng.betavariate(4, 2) if right else rng.betavariate(2, 3), 4)
            records.append({**record, "response": record["answer"] if right else "purple", "ratio": ratio})
    return records


def message(role: str, text: str) -> list[dict[str, Any]]:
    parts: list[dict[str, str]] = []
    for index, piece in enumerate(text.split("<image>")):
        parts += [{"type": "image"}] * (index > 0) + [{"type": "text", "text": piece}] * (piece != "")
    return [{"role": role, "content": parts}]


def layer_curves_of(records: list[dict[str, Any]]) -> dict[str, Any]:
    """What stage score says of four layers with two groups of heads, the ratio of layer 2 being that of the records."""
    rng = np.random.default_rng(3)
    answers = Answers([0, 1, 2, 3])
    for index, record in enumerate(records):
        right = record["response"] == record["answer"]
        answers.strata.append((record["format"], record["num_images"]))
        answers.right.append(right)
        answers.first_half.append(index % 2 == 0)
        answers.ratios.append([0.5 + 0.1 * right + 0.3 * rng.random(), rng.random(), record["ratio"], rng.random()])
        answers.heads.append(np.array([[ratio, rng.random()] for ratio in answers.ratios[-1]], np.float32))
    answers.left_out["unclear"] = 7
    return layer_curves(answers, best_by="all", go_by=None)


def write_run(folder: Path, *, arms: bool = True) -> Path:
    """A finished run of invented numbers."""
    scores = scored(folder)
    pairs, dropped = [], []
    for record in scores:
        tests = {"ratio": record["ratio"] > 0.6, "answer": record["response"] == record["answer"]}
        rules = [rule for rule, fails in tests.items() if fails]
        if rules:
            dropped.append({**record, "rule": rules[0], "rules": rules})
        else:
            sides = {"chosen": message("assistant", record["answer"]), "rejected": message("assistant", record["response"])}
            pairs.append({**record, "prompt": message("user", record["prompt"]), **sides})
    write_lines(folder / "score" / "scores.jsonl", scores)
    write_json(folder / "score" / "summary.json", {"seconds": 13.25})
    write_json(folder / "score" / "layers.json", layer_curves_of(scores))
    write_lines(folder / "select" / "pairs.jsonl", pairs)
    write_lines(folder / "select" / "dropped.jsonl", dropped)
    thresholds = {"sequence": {2: 0.7, 3: 0.6, 4: 0.5, 5: 0.5}, "grid": {2: 0.7}, "pip": {2: 0.8}}
    write_json(folder / "select" / "summary.json", {"seconds": 0.5, "thresholds": thresholds})
    log: list[dict[str, Any]] = []
    for step in range(5, 205, 5):
        x = step / 200
        rewards = {"rewards/chosen": x, "rewards/rejected": -2 * x, "rewards/margins": 3 * x, "rewards/accuracies": 0.5 + x / 2}
        ratios = {"attn/ratio_chosen": 0.4 + x / 4, "attn/ratio_rejected": 0.4 + x / 8}
        log.append({"step": step, "loss": 0.693 * math.exp(-2 * x), **rewards, **ratios})
    log += [{"step": step, "eval_loss": 0.7 - step / 500, "eval_rewards/margins": step / 100} for step in (50, 100, 150, 200)]
    write_lines(folder / "train" / "log.jsonl", log)
    write_json(folder / "train" / "summary.json", {"seconds": 85.0})
    for seed, moment in enumerate(("before", "after")):
        write_lines(folder / "evaluate" / moment / "answers.jsonl", answers(folder, moment, seed))
        write_json(folder / "evaluate" / moment / "summary.json", {"seconds": 9.0})
    for seed, arm in enumerate(("random_wrong", "sft") if arms else (), start=7):
        write_lines(folder / "arms" / arm / "evaluate" / "after" / "answers.jsonl", answers(folder, "after", seed))
        write_lines(folder / "arms" / arm / "select" / "pairs.jsonl", pairs[:50])
    return folder


def heat_of(contents: RunContents) -> HeatMaps:
    """Invented maps with the shapes of real ones; after training more of the mass lies on the target."""
    rng = np.random.default_rng(0)
    examples = []
    for before, after in heatmaps.choose(contents, 6):
        maps = {}
        for weight, moment in ((1.2, "before"), (4.0, "after")):
            raw = [rng.gamma(0.6, size=(4, 4)).astype(np.float32) for _ in before["images"]]
            if before["region"]:
                raw[0][:, :2] *= weight
            else:
                raw[0] *= weight
            maps[moment] = [heat / sum(h.sum() for h in raw) for heat in raw]
        ratios = {m: float(heats[0][:, :2].sum() if before["region"] else heats[0].sum()) for m, heats in maps.items()}
        examples.append(HeatExample(answers={"before": before, "after": after}, maps=maps, ratios=ratios))
    return HeatMaps(layer=2, centre_crop=False, examples=examples)
