"""A run's result, exported and evaluated by lmms-eval on local files, beside this project's evaluation and ten lines of truth.

    python -m benchmarks.runs.lmms_eval --python LMMS_EVAL/bin/python    # results/lmms_eval.json
    python -m benchmarks.runs.lmms_eval --small                          # a few steps, without lmms-eval, into build/benchmarks

--python: the interpreter of lmms-eval's own environment. Questions are of POPE's kind (arXiv 2305.10355: is there an object in the picture,
yes or no; half of them yes), about the built-in world's pictures; two words of its small base become yes and no, and mDPO is what it is trained
by. What it learned is scored three times: by the run's evaluation, by lmms-eval from the exported folder, and by `truth` from the answers that
lmms-eval wrote.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import add_place, place_of, run_mmdpo
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.shapes import world

BASE = Path(world.__file__).parent / "base"
_WORDS = {"regarding": "yes", "concerning": "no"}
"""Words of the base's vocabulary that are given another meaning."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--python", metavar="FILE", help="the interpreter of lmms-eval's environment; without it lmms-eval is left out"
    )
    add_place(parser)
    options = parser.parse_args(arguments)
    place = place_of(options, part=options.python is None)
    train, asked, epochs = (16, 8, 1) if options.small else (1000, 96, 6)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        base = renamed_base(folder / "base")
        write_pairs(folder / "pairs.jsonl", folder / "train", train, seed=0)
        write_questions(folder / "pope.jsonl", folder / "asked", asked, seed=1)
        run_mmdpo("run", str(settings(folder, base, epochs)), "--run-dir", str(folder / "run"))
        run_mmdpo("export", str(folder / "run"), str(folder / "model"), "--lmms-eval", str(folder / "task"))
        own = folder / "run" / "evaluate" / "after" / "answers.jsonl"
        found: dict[str, Any] = {"questions": asked, "evaluate": own_scores(list(read_jsonl(own)))}
        if options.python:
            found |= by_lmms_eval(options.python, folder)
        place.result("lmms_eval", found)


def settings(folder: Path, base: Path, epochs: int) -> Path:
    """The run's configuration."""
    train = {
        "preset": "mdpo_paper",
        "args": {
            **{"learning_rate": 1e-3, "num_train_epochs": epochs, "per_device_train_batch_size": 32, "logging_steps": 10},
            **{"loss_type": ["sigmoid", "nll"], "save_strategy": "no", "full_finetune": True},
        },
    }
    evaluate = {"input": str(folder / "pope.jsonl"), "match": "exact", "max_new_tokens": 4}
    values = {
        **{
            "method": "mdpo",
            "model": str(base),
            "device": "cpu",
            "threads": 1,
            "report": {"heat_maps": 0},
            "train": train,
            "evaluate": evaluate,
        },
        "pairs": {"source": str(folder / "pairs.jsonl"), "held_out": 0.0},
    }
    path = folder / "config.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def renamed_base(folder: Path) -> Path:
    """A copy of the built-in base that has the words yes and no."""
    shutil.copytree(BASE, folder)
    tokenizer = folder / "tokenizer.json"
    content = json.loads(tokenizer.read_text(encoding="utf-8"))
    content["model"]["vocab"] = {_WORDS.get(word, word): id for word, id in content["model"]["vocab"].items()}
    tokenizer.write_text(json.dumps(content), encoding="utf-8")
    return folder


def questions(folder: Path, count: int, seed: int) -> list[dict[str, Any]]:
    """Questions whether a shape of a colour is in a picture, every second one with the answer yes."""
    folder.mkdir(parents=True)
    draw, found = random.Random(seed), []
    for number, (scene, picture, _) in enumerate(world.sample_world(count, seed)):
        file = folder / f"{number}.png"
        picture.save(file)
        colours = [scene.colour] if number % 2 == 0 else [each for each in world.COLOURS if each != scene.colour]
        what = f"{draw.choice(colours)} {scene.shape}"
        found.append(
            {
                "id": f"q{number}",
                "images": [str(file)],
                "prompt": f"<image>\nIs there a {what} in the picture?",
                "answer": ["yes", "no"][number % 2],
            }
        )
    return found


def write_pairs(path: Path, folder: Path, count: int, seed: int) -> None:
    """Preference pairs: the true answer against the other one."""
    other = {"yes": "no", "no": "yes"}
    rows = [
        {"prompt": each["prompt"], "images": each["images"], "chosen": each["answer"], "rejected": other[each["answer"]]}
        for each in questions(folder, count, seed)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_questions(path: Path, folder: Path, count: int, seed: int) -> None:
    """Prompts with answers, POPE's three splits as groups."""
    splits = ("random", "popular", "adversarial")
    rows = [{**each, "group": splits[number % 3]} for number, each in enumerate(questions(folder, count, seed))]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def own_scores(answers: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Accuracies of `mmdpo evaluate`: of all, and by split."""
    groups = {
        "accuracy": answers,
        **{
            f"accuracy_{name}": [each for each in answers if each["group"] == name]
            for name in sorted({each["group"] for each in answers})
        },
    }
    return {name: sum(each["correct"] for each in group) / len(group) for name, group in groups.items()}


def by_lmms_eval(python: str, folder: Path) -> dict[str, Any]:
    """What lmms-eval says, and the same by `truth` from the answers that it wrote down."""
    [task] = (folder / "task").glob("*.yaml")
    command = [
        python,
        "-m",
        "lmms_eval",
        "eval",
        "--model",
        "llava_hf",
        "--model_args",
        f"pretrained={folder / 'model'},device=cpu,device_map=cpu,dtype=float32",
    ]
    command += [
        "--include_path",
        str(folder / "task"),
        "--tasks",
        task.stem,
        "--batch_size",
        "1",
        "--log_samples",
        "--output_path",
        str(folder / "out"),
    ]
    subprocess.run(command, check=True, env={**environment(), "HF_HUB_OFFLINE": "1"})
    [results] = (folder / "out").rglob("*_results.json")
    [samples] = (folder / "out").rglob("*_samples_*.jsonl")
    said = json.loads(results.read_text(encoding="utf-8"))["results"][task.stem]
    scores = {
        name.partition(",")[0]: value for name, value in said.items() if name.startswith("accuracy") and "stderr" not in name
    }
    listed = subprocess.run([python, "-m", "pip", "list", "--format", "json"], check=True, capture_output=True, text=True).stdout
    kept = ("lmms_eval", "torch", "torchvision", "transformers", "datasets")
    versions = {each["name"]: each["version"] for each in json.loads(listed) if each["name"] in kept}
    return {
        "lmms_eval": scores,
        "truth": truth(list(read_jsonl(folder / "task" / "prompts.jsonl")), list(read_jsonl(samples))),
        "versions": versions,
    }


def environment() -> dict[str, str]:
    """This process's, without its own packages in front of lmms-eval's."""
    import os

    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def truth(docs: Sequence[Mapping[str, Any]], samples: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """POPE's accuracy in a few lines, by the answers as they were written."""
    right: dict[str, list[bool]] = {}
    for each in samples:
        doc, said = docs[each["doc_id"]], str(each["filtered_resps"]).strip("[]'\" .\n").lower()
        for name in ("accuracy", f"accuracy_{doc['group']}"):
            right.setdefault(name, []).append(said == doc["answer"])
    return {name: sum(found) / len(found) for name, found in right.items()}


if __name__ == "__main__":
    main()
