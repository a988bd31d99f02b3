"""Training steps of Gemma 3, whose pictures see themselves both ways: packed token trees against padded rows, into docs/results.md.

    python -m benchmarks.runs.both_ways

Both are `PreferenceTrainer`, with and without `tree_packing`: the same records, vision features shared, the reference beside the policy. That
losses and gradients are the same is checked before anything is timed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore", category=FutureWarning)

import torch  # noqa: E402
from PIL import Image  # noqa: E402
from rich.console import Console  # noqa: E402
from torch import Tensor  # noqa: E402

from benchmarks.measure import ROOT, add_place, alternate, machine, markdown, place_of, ratios  # noqa: E402
from benchmarks.runs.training_step.sides import warm  # noqa: E402
from mmdpo_trainers.models.loading import load_model  # noqa: E402
from mmdpo_trainers.training.config import PreferenceConfig  # noqa: E402
from mmdpo_trainers.training.trainer import PreferenceTrainer  # noqa: E402

sys.path.insert(0, str(ROOT / "tests" / "support"))

from tiny_models import make_tiny_gemma3  # noqa: E402

GOAL = 1.5
LOSSES: dict[str, dict[str, Any]] = {
    "DPO": {"loss_type": ["sigmoid"], "loss_weights": [1.0]},
    "mDPO": {"loss_type": ["sigmoid", "copo", "ancpo"], "loss_weights": [1.0, 1.0, 1.0]},
}
WORDS = ["red", "green", "blue", "circle", "square", "star", "left", "right", "and", "the", "is", "on"]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A picture has (image_size // 16)² tokens. Layers take turns: a sliding window, full attention.

    The vision tower is a quarter as wide as the decoder and has a quarter of its layers, about as of the largest Gemma 3.
    """

    layers: int = 8
    hidden: int = 512
    vision_hidden: int = 128
    heads: int = 8
    image_size: int = 256
    sliding_window: int = 1024
    pictures: int = 3
    response_tokens: int = 40


SMALL = Setting(layers=2, hidden=32, vision_hidden=32, heads=4, image_size=48, sliding_window=16, pictures=2, response_tokens=3)


def records(setting: Setting) -> list[dict[str, Any]]:
    """One pair about its pictures; in the corrupted branch the last of them is a crop."""
    generator = torch.Generator().manual_seed(0)
    shape = setting.pictures, setting.image_size, setting.image_size, 3
    pictures = [Image.fromarray(each.numpy()) for each in torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)]
    prompt = "".join(f"Image {place + 1} : <image>\n" for place in range(setting.pictures)) + "what colour is the circle ?"
    chosen, rejected = (
        " ".join(WORDS[each] for each in torch.randint(len(WORDS), (setting.response_tokens,), generator=generator)) for _ in "ab"
    )
    return [
        {
            "id": "pair",
            "prompt": [{"role": "user", "content": prompt}],
            "chosen": [{"role": "assistant", "content": chosen}],
            "rejected": [{"role": "assistant", "content": rejected}],
            "images": pictures,
            "target": setting.pictures - 1,
        }
    ]


class Side:
    """A trainer, and a step of it: the record's batch, forward, backward."""

    def __init__(self, folder: Path, setting: Setting, packing: bool, losses: dict[str, Any], output: str) -> None:
        loaded = load_model(folder, dtype=torch.float32, device="cpu")
        config = PreferenceConfig(
            output_dir=output,
            tree_packing=packing,
            lora_r=16,
            lora_alpha=32,
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            **losses,
        )
        self.trainer = PreferenceTrainer(loaded.model, config, processing_class=loaded.processor)
        self.records = records(setting)
        warm(self.trainer.model)

    def step(self) -> Tensor:
        model: Any = self.trainer.model
        model.zero_grad(set_to_none=True)
        loss = self.trainer.compute_loss(model.train(), self.trainer.data_collator(self.records))
        loss.backward()
        return loss.detach()

    @property
    def tokens(self) -> int:
        return int(self.trainer.data_collator.batch(self.records).input_ids.numel())  # type: ignore[union-attr]

    def gradients(self) -> dict[str, Tensor]:
        model: Any = self.trainer.model
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check(packed: Side, padded: Side) -> dict[str, float]:
    """Loss and the largest difference of gradients on their scale. Raises SystemExit where the two are not the same."""
    losses, gradients = [], []
    for side in (packed, padded):
        losses.append(float(side.step()))
        gradients.append(side.gradients())
    scale = max(float(gradient.abs().max()) for gradient in gradients[1].values())
    off = max(float((gradients[0][name] - gradient).abs().max()) for name, gradient in gradients[1].items()) / scale
    if not math.isclose(*losses, rel_tol=1e-4) or off > 1e-3:
        raise SystemExit(f"losses {losses}, gradients off by {off:.1e} of their scale: not comparable")
    return {"loss_packed": losses[0], "loss_padded": losses[1], "gradients_off": off}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, help="turns that count, after one warm-up (default 7, small 1)")
    add_place(parser)
    arguments = parser.parse_args(argv)
    setting = SMALL if arguments.small else Setting()
    console, place = Console(), place_of(arguments)
    result: dict[str, Any] = {"machine": machine(), "setting": {**asdict(setting), "dtype": "float32"}, "methods": {}}
    with tempfile.TemporaryDirectory() as folder:
        sizes = asdict(setting)
        for name in ("pictures", "response_tokens"):
            del sizes[name]
        made = make_tiny_gemma3(Path(folder) / "model", **sizes)
        for method, losses in LOSSES.items():
            packed, padded = (Side(made, setting, packing, losses, folder) for packing in (True, False))
            same = check(packed, padded)
            ways = {"padded": padded.step, "packed": packed.step}
            repeats = arguments.repeats or (1 if arguments.small else 7)
            seconds = alternate(ways, repeats, console.print, clock=time.process_time)
            found = {"tokens": {"packed": packed.tokens, "padded": padded.tokens}, "processor_seconds": seconds, **same}
            result["methods"][method] = {**found, "times_faster": ratios(seconds, "padded", "packed")}
    path = place.result("both_ways_cpu", result)
    text = text_of(result)
    place.section("docs/results.md", "both_ways", text)
    console.print(text)
    console.print(f"written: {path}")


def text_of(result: dict[str, Any]) -> str:
    """Markdown."""
    rows = []
    for method, found in result["methods"].items():
        times, tokens = found["times_faster"], found["tokens"]
        padded, packed = (f"{statistics.median(found['processor_seconds'][way]):.2f}" for way in ("padded", "packed"))
        faster = f"{times['median']:.2f} ({times['min']:.2f} to {times['max']:.2f})"
        same = f"{found['loss_packed']:.6f}, {found['loss_padded']:.6f}"
        rows.append([method, f"{tokens['padded']}, {tokens['packed']}", padded, packed, faster, f"at least {GOAL}", same])
    head = [
        "method",
        "tokens padded, packed",
        "seconds padded",
        "packed",
        "times faster (min to max)",
        "goal",
        "loss packed, padded",
    ]
    on = result["machine"]
    packages = ", ".join(f"{name} {on['packages'][name]}" for name in ("torch", "transformers"))
    where = f"{on['cpu']}, threads: {on['threads']}, {packages}; float32, random weights, processor time."
    return f"{markdown(head, rows)}\n\n{where}"


if __name__ == "__main__":
    main()
