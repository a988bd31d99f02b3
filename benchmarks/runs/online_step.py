"""A step of online DPO against its two parts: sampling and rating alone, and a step of DPO on pairs of the same size.

    python -m benchmarks.runs.online_step            # table, results/online_step_cpu.json, and its section of docs/results.md
    python -m benchmarks.runs.online_step --small    # the same on tiny inputs, into build/benchmarks

A LLaVA of random weights, two pictures a prompt, answers of 40 tokens, two a prompt, float32, one thread. The three take turns in one process:
the two trainings are real `train()` loops that move a step at a time. A model of random weights ends an answer once in a thousand
tokens, so nearly all have 40; the records' own pairs, which are as long, stand in for them, and both trainings run the same trees.
Processor time is counted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Console

from benchmarks.measure import add_place, alternate, machine, markdown, place_of
from benchmarks.runs.training_step.setting import SMALL, Setting, build, processor_of, records
from benchmarks.runs.training_step.stepping import Loop
from mmdpo_trainers.answers.raters import Rating
from mmdpo_trainers.config.sections.online import OnlineConfig
from mmdpo_trainers.training.config import PreferenceConfig
from mmdpo_trainers.training.online.pairs import OnlinePairs
from mmdpo_trainers.training.online.sampler import as_prompt, sample
from mmdpo_trainers.training.trainer import PreferenceTrainer

PARTS = ("sampling", "dpo step")


class _Rater:
    """Costs nothing: what a judge takes is the judge's."""

    attributes = ("overall",)

    def rate(self, records: Sequence[Mapping[str, Any]], responses: Sequence[Sequence[str]]) -> list[list[Rating]]:
        return [[Rating({"overall": float(number)}) for number, _ in enumerate(texts)] for texts in responses]

    def costs(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        pass


def trainer_of(setting: Setting, batch: int, online: OnlinePairs | None) -> PreferenceTrainer:
    """A trainer on the setting's model and records, the reference beside the policy."""
    config = PreferenceConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=batch,
        max_steps=1_000_000,
        logging_steps=1_000_000,
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        train_sampling_strategy="sequential",
        lora_r=setting.lora_r,
        lora_alpha=2 * setting.lora_r,
    )
    return PreferenceTrainer(
        build(setting), config, processing_class=processor_of(setting), train_dataset=records(setting), online=online
    )


def measure(setting: Setting, batch: int, repeats: int, progress: Any) -> dict[str, list[float]]:
    """Processor seconds of each part and of the whole, by turn."""
    options = OnlineConfig(alpha=1.0, max_new_tokens=setting.response_tokens, batch_size=batch)
    online, plain = trainer_of(setting, batch, OnlinePairs(options, _Rater())), trainer_of(setting, batch, None)
    pairs, prompts = online.online, [as_prompt(record) for record in records(setting).select(range(batch))]
    assert pairs is not None

    def sampling() -> None:
        answers = sample(pairs.loaded, prompts, options, seed=0, step=1)
        pairs.rater.rate(prompts, [[answer.text for answer in own] for own in answers])

    with Loop(plain) as dpo, Loop(online) as whole:
        timed = {"sampling": sampling, "dpo step": dpo.step, "online step": whole.step}
        return alternate(timed, repeats, progress, clock=time.process_time)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, help="turns that count, after one warm-up (default 7, small 1)")
    add_place(parser)
    arguments = parser.parse_args(argv)
    setting = SMALL if arguments.small else Setting(pictures=2)
    batch, repeats = 2, arguments.repeats or (1 if arguments.small else 7)
    console, place = Console(), place_of(arguments)
    torch.set_num_threads(1)
    seconds = measure(setting, batch, repeats, console.print)
    turns = zip(*(seconds[name] for name in (*PARTS, "online step")), strict=True)
    shares = [whole / (sampling + dpo) for sampling, dpo, whole in turns]
    result = {
        "machine": machine(),
        "setting": {
            "batch": batch,
            "samples": 2,
            "prompt_tokens": setting.prompt_tokens,
            "answer_tokens": setting.response_tokens,
        },
        "seconds": seconds,
        "of_the_sum": {"median": statistics.median(shares), "min": min(shares), "max": max(shares)},
    }
    path = place.result("online_step_cpu", result)
    place.section("docs/results.md", "online_step", _markdown(result))
    console.print(_markdown(result), markup=False)
    console.print(f"written: {path}")


def _markdown(result: dict[str, Any]) -> str:
    sizes, on, share = result["setting"], result["machine"], result["of_the_sum"]
    rows = [[name, f"{statistics.median(taken):.2f}"] for name, taken in result["seconds"].items()]
    rows.append(["online step over the sum of its parts", f"{share['median']:.2f} ({share['min']:.2f} to {share['max']:.2f})"])
    packages = ", ".join(f"{name} {on['packages'][name]}" for name in ("torch", "transformers"))
    records = f"{sizes['batch']} records a step of {sizes['prompt_tokens']} prompt tokens, {sizes['samples']} answers each of "
    where = f"{sizes['answer_tokens']} tokens; {on['cpu']}, {on['threads']} thread, {packages}; float32, random weights."
    return f"{markdown(['part', 'processor seconds (median)'], rows)}\n\n{records}{where}"


if __name__ == "__main__":
    main()
