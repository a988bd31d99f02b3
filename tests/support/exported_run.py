"""A trained run with a real adapter on a tiny LLaVA, and invented figures: what `mmdpo export` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, get_peft_model
from report_run import write_json, write_lines
from tiny_models import make_tiny_llava, sample_pictures

from mmdpo_trainers.models.loading import load_model

ACCURACY = {"before": [True, False, False, False], "after": [True, True, True, False]}


def make_base(folder: Path, **options: Any) -> Path:
    """A tiny LLaVA with a card, as a published folder has one."""
    make_tiny_llava(folder, **options)
    (folder / "README.md").write_text("---\nlicense: llama2\nlicense_link: https://example.org/licence\n---\n# A base\n")
    (folder / "LICENSE").write_text("The licence of the base.\n")
    return folder


def make_adapter(base: Path, folder: Path, layers: str = r"\d+") -> Path:
    """A LoRA adapter of linears of the language tower, far from zero. layers: a regular expression of their numbers."""
    loaded = load_model(base, device="cpu")
    target = rf".*(language_model|text_model|model)\.layers\.({layers})\..*(q|v|down|gate)_proj"
    settings = LoraConfig(r=4, lora_alpha=8, target_modules=target, init_lora_weights=False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        get_peft_model(loaded.model, settings).save_pretrained(folder)
    return folder


def make_run(folder: Path, base: Path) -> Path:
    """A finished run with the arm `chance`, whose weights are those of another adapter."""
    pictures = folder / "evaluate" / "images"
    pictures.mkdir(parents=True)
    for number, picture in enumerate(sample_pictures(3)):
        picture.save(pictures / f"{number}.png")
    prompts = [
        {
            "id": f"q{number}",
            "format": "sequence" if number % 2 else "single",
            "prompt": "Image1:<image>\nImage2:<image>\nwhich is red ?" if number % 2 else "<image>\nwhat colour ?",
            "images": [f"images/{each}.png" for each in range(1 + number % 2)],
            "target": 0,
            "num_images": 1 + number % 2,
            "answer": "red",
            **{"box": None, "region": None, "patch_grid": None, "options": None},
        }
        for number in range(4)
    ]
    write_lines(folder / "evaluate" / "prompts.jsonl", prompts)
    config = {
        "name": "tiny",
        "model": str(base),
        "method": "mia_dpo",
        "data": {"source": str(folder.parent / "secret" / "my_data.json")},
        "score": {"layer": 1},
        "rate": {"endpoint": {"url": "http://10.1.2.3:8000/v1"}},
        "train": {"args": {"beta": 0.2, "reference_cache": str(folder.parent / "secret" / "cache.jsonl")}},
        "arms": {"chance": {"select": {"rule": "random_wrong"}}},
    }
    folder.joinpath("config.yaml").write_text(yaml.safe_dump(config))
    write_json(folder / "score" / "summary.json", {"layer": 1})
    write_json(folder / "select" / "summary.json", {"pairs": {"sequence": 30}, "thresholds": {"sequence": {2: 0.7}}})
    for number, place in enumerate((folder, folder / "arms" / "chance")):
        make_adapter(base, place / "train" / "final", layers="0" if number else r"\d+")
        parts = {"model": "0" * 64, "input select/pairs.jsonl": "1" * 64}
        write_json(place / "train" / "state.json", {"fingerprint": "f", "parts": parts, "seconds": 1.0})
        write_json(place / "train" / "summary.json", {"pairs": 30, "replay": 0, "steps": 4, "fingerprint": "f"})
    for place, moment in ((folder, "before"), (folder, "after"), (folder / "arms" / "chance", "after")):
        right = ACCURACY[moment]
        lines = [{**prompt, "correct": each} for prompt, each in zip(prompts, right, strict=True)]
        write_lines(place / "evaluate" / moment / "answers.jsonl", lines)
        share = sum(right) / len(right)
        figures = {
            "accuracy": {"sequence": share},
            "intervals": {"sequence": [share - 0.1, share + 0.1]},
            "counts": {"sequence": 4},
        }
        write_json(place / "evaluate" / moment / "summary.json", {**figures, "match": "exact"})
    return folder
