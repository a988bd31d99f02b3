"""POPE and BLINK before and after a minute of training, on the built-in world's pictures written out in their published formats.

    python -m benchmarks.runs.published_benchmarks              # results/published_benchmarks.json; minutes on one core
    python -m benchmarks.runs.published_benchmarks --small      # a few pictures, into build/benchmarks

The world's base has no words for yes and no: two words of its vocabulary that nothing uses are called so, and mean nothing before training.
What `mmdpo` says of the answers is compared with a scorer of its own, which reads the published files and shares no code with it.
"""

from __future__ import annotations

import argparse
import glob
import json
import random
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import ROOT, add_place, markdown, place_of, run_mmdpo
from mmdpo_trainers.models.hub import resolve_model_path
from mmdpo_trainers.shapes import world

RENAMED = {"photograph": "yes", "referring": "no"}
SPLITS = ("random", "popular", "adversarial")
POPULAR = "red circle"
"""What POPE's split `popular` asks for where it is not there."""
TASKS = {"Colour": tuple(world.COLOURS), "Shape": world.SHAPES}


def make_base(folder: Path) -> Path:
    """The world's base with words for yes and no."""
    shutil.copytree(resolve_model_path("shapes"), folder, dirs_exist_ok=True)
    file = folder / "tokenizer.json"
    text = file.read_text(encoding="utf-8")
    for old, new in RENAMED.items():
        if text.count(f'"{old}"') != 1:
            raise SystemExit(f"{file} has not the word {old!r} once, which was to be called {new!r}")
        text = text.replace(f'"{old}"', f'"{new}"')
    file.write_text(text, encoding="utf-8")
    return folder


def scenes(count: int, seed: int) -> Iterator[tuple[world.Scene, Any]]:
    """Scenes with their pictures."""
    rng = random.Random(f"published-{seed}")
    for _ in range(count):
        scene = world.sample_scene(rng)
        yield scene, world.draw(scene)


def asked_things(scene: world.Scene, rng: random.Random) -> dict[str, str]:
    """What each split of POPE asks for that is not there: any thing, the most frequent one, one that is like what is there."""
    there = f"{scene.colour} {scene.shape}"
    others = [f"{colour} {shape}" for colour in world.COLOURS for shape in world.SHAPES if f"{colour} {shape}" != there]
    alike = [other for other in others if other.split()[0] == scene.colour or other.split()[1] == scene.shape]
    popular = POPULAR if there != POPULAR else "blue ring"
    return {"random": rng.choice(others), "popular": popular, "adversarial": rng.choice(alike)}


def thing_question(thing: str) -> str:
    return f"Is there {'an' if thing[0] == 'o' else 'a'} {thing} in the image?"


def write_pope(folder: Path, pictures: int, seed: int) -> Path:
    """`coco_pope_<split>.json` and the pictures in `val2014`."""
    (folder / "val2014").mkdir(parents=True, exist_ok=True)
    rng, lines = random.Random(f"pope-{seed}"), {split: [] for split in SPLITS}  # type: dict[str, list[dict[str, Any]]]
    for number, (scene, picture) in enumerate(scenes(pictures, seed)):
        name = f"COCO_val2014_{number:012d}.jpg"
        picture.save(folder / "val2014" / name, quality=95)
        for split, thing in asked_things(scene, rng).items():
            for text, label in ((f"{scene.colour} {scene.shape}", "yes"), (thing, "no")):
                line = {"question_id": len(lines[split]) + 1, "image": name, "text": thing_question(text), "label": label}
                lines[split].append(line)
    for split, found in lines.items():
        (folder / f"coco_pope_{split}.json").write_text("".join(json.dumps(line) + "\n" for line in found), encoding="utf-8")
    return folder


def blink_rows(count: int, seed: int) -> Iterator[tuple[dict[str, Any], list[Any]]]:
    """Questions about one of several pictures, with BLINK's columns but for the pictures, which come beside."""
    rng = random.Random(f"blink-{seed}")
    drawn = list(scenes(4 * count, seed))
    for number in range(count):
        several = drawn[4 * number : 4 * number + rng.choice((2, 3, 4))]
        target = rng.randrange(len(several))
        task = rng.choice(list(TASKS))
        true = several[target][0].colour if task == "Colour" else several[target][0].shape
        choices = [true, *rng.sample([value for value in TASKS[task] if value != true], 2)]
        rng.shuffle(choices)
        stem = "which colour does the shape have" if task == "Colour" else "which shape is drawn"
        question = f"In Image{target + 1}, {stem}: {', '.join(choices[:-1])} or {choices[-1]}?"
        row = {
            "idx": f"val_{task}_{number + 1}",
            "sub_task": task,
            "question": question,
            "prompt": question,
            "choices": choices,
            "answer": f"({'ABC'[choices.index(true)]})",
        }
        yield row, [picture for _, picture in several]


def write_blink(folder: Path, count: int, seed: int) -> Path:
    """A parquet file a task, pictures in `image_1` to `image_4` as the Hub has them."""
    import io

    import pyarrow
    import pyarrow.parquet

    tasks: dict[str, list[dict[str, Any]]] = {}
    for row, pictures in blink_rows(count, seed):
        cells: dict[str, Any] = dict.fromkeys([f"image_{number}" for number in range(1, 5)])
        for number, picture in enumerate(pictures, start=1):
            buffer = io.BytesIO()
            picture.save(buffer, format="PNG")
            cells[f"image_{number}"] = {"bytes": buffer.getvalue(), "path": None}
        tasks.setdefault(row["sub_task"], []).append({**row, **cells})
    for task, rows in tasks.items():
        (folder / task).mkdir(parents=True, exist_ok=True)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / task / "val-00000-of-00001.parquet")
    return folder


def write_pairs(folder: Path, pictures: int, seed: int) -> Path:
    """Preference pairs of both kinds of question, about pictures that are in neither benchmark."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng, records = random.Random(f"pairs-{seed}"), []
    for number, (scene, picture) in enumerate(scenes(pictures, seed)):
        picture.save(folder / "images" / f"p{number}.png")
        thing, truth = rng.choice(
            [(f"{scene.colour} {scene.shape}", "yes"), (rng.choice(list(asked_things(scene, rng).values())), "no")]
        )
        records.append(
            _pair(f"p{number}", [f"images/p{number}.png"], thing_question(thing), truth, "yes" if truth == "no" else "no")
        )
    for number, (row, several) in enumerate(blink_rows(pictures // 2, seed + 1)):
        names = [f"images/b{number}-{place}.png" for place in range(len(several))]
        for name, picture in zip(names, several, strict=True):
            picture.save(folder / name)
        truth = row["choices"]["ABC".index(row["answer"][1])]
        wrong = rng.choice([choice for choice in row["choices"] if choice != truth])
        records.append(_pair(f"b{number}", names, row["prompt"], truth, wrong))
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def _pair(name: str, images: list[str], question: str, chosen: str, rejected: str) -> dict[str, Any]:
    return {"id": name, "images": images, "prompt": "<image>\n" * len(images) + question, "chosen": chosen, "rejected": rejected}


def scored_apart(published: Path, answers: Path) -> dict[str, Any]:
    """The figures by ten lines that know nothing of `mmdpo`: truth from the published files, responses by id."""
    import pyarrow.parquet

    said = {
        key: {a["id"]: a["response"].lower() for a in map(json.loads, (answers / f"benchmark-{key}.jsonl").open())}
        for key in ("pope", "blink")
    }
    pairs = [
        (split, line["label"], said["pope"][f"coco_pope_{split}/{line['question_id']}"].replace(".", " ").split())
        for split in SPLITS
        for line in map(json.loads, (published / "pope" / f"coco_pope_{split}.json").open())
    ]
    tp = sum(truth == "yes" and "yes" in words for _, truth, words in pairs)
    right = [(split, truth in words and {"yes": "no", "no": "yes"}[truth] not in words) for split, truth, words in pairs]
    yes, true = sum("yes" in words for *_, words in pairs), sum(truth == "yes" for _, truth, _ in pairs)
    rows = [row for file in glob.glob(f"{published}/blink/*/*.parquet") for row in pyarrow.parquet.read_table(file).to_pylist()]
    hits = []
    for row in rows:
        named = [choice for choice in row["choices"] if choice in said["blink"][row["idx"]]]
        hits.append((row["sub_task"], named == [row["choices"]["ABC".index(row["answer"][1])]]))
    precision, f1 = tp / yes if yes else None, 2 * tp / (yes + true)
    return {
        "pope": {"accuracy": _mean(right), "precision": precision, "recall": tp / true, "f1": f1, "yes_rate": yes / len(pairs)},
        "pope by split": {split: _mean([each for each in right if each[0] == split]) for split in SPLITS},
        "blink": {"accuracy": _mean(hits)},
        "blink by task": {task: _mean([hit for hit in hits if hit[0] == task]) for task in sorted({task for task, _ in hits})},
    }


def _mean(outcomes: Sequence[tuple[str, bool]]) -> float:
    return sum(right for _, right in outcomes) / len(outcomes)


def said_by_mmdpo(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The same figures out of a run's summary."""
    pope, blink = figures["pope"], figures["blink"]
    return {
        "pope": {name: each["value"] for name, each in pope["figures"].items()},
        "pope by split": {name: each["accuracy"]["value"] for name, each in pope["by"]["split"].items()},
        "blink": {"accuracy": blink["figures"]["accuracy"]["value"]},
        "blink by task": {name: each["accuracy"]["value"] for name, each in blink["by"]["category"].items()},
    }


def equal(first: Any, second: Any) -> bool:
    """Whether two nests of numbers agree to rounding."""
    if isinstance(first, Mapping):
        return first.keys() == second.keys() and all(equal(value, second[name]) for name, value in first.items())
    return first == second if first is None or second is None else abs(first - second) < 1e-12


def _table(models: Mapping[str, Any], changes: Mapping[str, Any]) -> str:
    rows = []
    for key, title in (("pope", "POPE"), ("blink", "BLINK")):
        for name in models["before"][key]["figures"]:
            cells = [_cell(models[who][key]["figures"].get(name)) for who in ("before", "after")]
            rows.append([f"{title}, {name.replace('_', ' ')}", *cells, _cell(changes["after"][key]["figures"].get(name), "+")])
    return markdown(["figure", "before", "after", "change"], rows)


def _cell(figure: Mapping[str, Any] | None, sign: str = "") -> str:
    if figure is None or figure["value"] is None:
        return "–"
    ends = [] if figure["interval"] is None else [f" ({figure['interval'][0]:{sign}.3f} to {figure['interval'][1]:{sign}.3f})"]
    return "".join([f"{figure['value']:{sign}.3f}", *ends])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0, help="of pictures and training (default 0)")
    add_place(parser)
    arguments = parser.parse_args(argv)
    place, seed = place_of(arguments), 10 * arguments.seed
    pictures = 12 if arguments.small else 500
    folder = (ROOT / "build" / "published_benchmarks") if place.committed else place.folder / "published_benchmarks"
    shutil.rmtree(folder, ignore_errors=True)
    base = make_base(folder / "base")
    write_pope(folder / "pope", pictures, seed + 1)
    write_blink(folder / "blink", 2 * pictures, seed + 2)
    pairs = write_pairs(folder / "pairs", 2 * pictures, seed + 3)
    config = {
        "name": "published_benchmarks",
        "method": "mdpo",
        "model": str(base),
        "seed": arguments.seed,
        "threads": 1,
        "pairs": {"source": str(pairs), "held_out": 0.05},
        "train": {
            "args": {
                **{"loss_type": ["sigmoid", "nll"], "loss_weights": [1.0, 1.0], "num_train_epochs": 3, "learning_rate": 2e-3},
                **{"per_device_train_batch_size": 32, "lora_r": 32, "lora_alpha": 64, "logging_steps": 10},
            }
        },
        "evaluate": {
            "benchmarks": {"pope": str(folder / "pope"), "blink": str(folder / "blink")},
            "benchmark_images": {"pope": str(folder / "pope" / "val2014")},
            "batch_size": 128,
            "benchmark_tokens": 8,
        },
    }
    file = folder / "config.json"
    file.write_text(json.dumps(config), encoding="utf-8")
    run = folder / "run"
    run_mmdpo("run", str(file), "--run-dir", str(run))
    summary = json.loads((run / "summary.json").read_text(encoding="utf-8"))
    found = summary["benchmarks"]
    apart = {who: scored_apart(folder, run / "evaluate" / who) for who in ("before", "after")}
    ours = {who: said_by_mmdpo(found["models"][who]) for who in ("before", "after")}
    same = equal(apart, ours)
    result = {
        "seconds": summary["seconds"],
        "same": same,
        "scored_apart": apart,
        **{name: found[name] for name in ("models", "changes", "tables")},
    }
    path = place.result("published_benchmarks", result)
    text = _table(found["models"], found["changes"])
    print(f"{text}\nThe scorer apart says {'the same' if same else 'OTHER figures'}.\nwritten: {path}")
    place.section("docs/evaluation.md", "published_benchmarks", text)
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
