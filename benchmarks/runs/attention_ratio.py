"""Attention ratios of answers to multi-image prompts: `score` and `generate` against the eager way with attention maps.

    python -m benchmarks.runs.attention_ratio            # table, and results/attention_ratio_cpu.json
    python -m benchmarks.runs.attention_ratio --small    # the same on tiny inputs, into build/benchmarks

A LLaVA of random weights, five pictures, 1,500 prompt tokens, a 40-token answer, float32. Four things are timed in turn in one process:

- `eager pass`: teacher-forced, `attn_implementation="eager"`, `output_attentions=True`, then the ratio from the maps.
- `score`: the same ratios by the stage's own function.
- `official way`: `generate(output_attentions=True)` with eager attention, ratio from the maps of the decoding steps (MIA-DPO's code).
- `generate + score`: the two stages' own functions; generating records the attention, so score only divides.

Ratios are compared before anything is timed. Peak memory above the model is measured in a fresh process for each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from benchmarks import readme
from benchmarks.measure import add_place, alternate, machine, markdown, peak_memory, place_of, ratios
from mmdpo_kernels import patch_model, unpatch_model
from mmdpo_trainers.answers.attention_ratios import attention_ratios, ratios_of, resolve_layer
from mmdpo_trainers.answers.transformers_engine import generate_responses
from mmdpo_trainers.models.encode import encode_prompts
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.shapes.model import build_processor

PICTURES, PATCH = 5, 14


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Sizes of model and prompt."""

    prompt_tokens: int = 1500
    answer_tokens: int = 40
    side: int = 238
    """17 x 17 = 289 tokens a picture."""
    layers: int = 8
    hidden: int = 1024
    heads: int = 16


SMALL = Setting(prompt_tokens=140, answer_tokens=5, side=56, layers=4, hidden=64, heads=4)
"""To see that everything runs."""
COMPARISONS = {"score": "eager pass", "generate + score": "official way"}
GOALS = {"score": 2.5, "generate + score": 1.5}


def build(setting: Setting) -> LoadedModel:
    """A LLaVA with the proportions of a small real one: by default 8 layers, width 1,024, 16 heads of 64."""
    torch.manual_seed(0)
    processor = build_processor()
    processor.patch_size = PATCH
    processor.tokenizer.model_max_length = 4096
    processor.image_processor.size = {"shortest_edge": setting.side}
    processor.image_processor.crop_size = {"height": setting.side, "width": setting.side}
    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=setting.side,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        hidden_size=setting.hidden,
        intermediate_size=setting.hidden * 11 // 4,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        vocab_size=32064,
        max_position_embeddings=4096,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=processor.image_token_id, vision_feature_layer=-1)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        # The answer never ends early and has no image token in it, in either way of generating.
        model.lm_head.weight[[processor.tokenizer.eos_token_id, processor.image_token_id]] = 0.0
    model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
    return LoadedModel(model=model, processor=processor, path=Path("benchmark"))


def prompt_record(loaded: LoadedModel, setting: Setting) -> dict[str, Any]:
    """One sequence prompt of exactly `prompt_tokens` tokens, and how long its answer is to be."""
    pictures = [Image.effect_noise((setting.side, setting.side), 64 + 8 * k).convert("RGB") for k in range(PICTURES)]
    opening = "".join(f"Image{k + 1}:<image>\n" for k in range(PICTURES)) + "In Image3, what is shown"
    record = {"id": "benchmark", "format": "sequence", "images": pictures, "target": 2, "num_images": PICTURES}
    record["answer_tokens"] = setting.answer_tokens
    tokens = encode_prompts(loaded, [{**record, "prompt": opening}], padding_side="right").inputs["input_ids"].shape[1]
    return {**record, "prompt": opening + " and" * (setting.prompt_tokens - tokens)}


def eager_ratio(maps: torch.Tensor, rows: slice, input_ids: torch.Tensor, image_token_id: int, target: int) -> float:
    """The official algorithm: mean over heads and response rows, mean over each picture's tokens, target over the sum."""
    attention = maps[0].mean(0)[rows].mean(0)
    columns = (input_ids[0] == image_token_id).nonzero()[:, 0].view(PICTURES, -1)
    per_picture = attention[columns].mean(1)
    return float(per_picture[target] / per_picture.sum())


@torch.no_grad()
def eager_pass(loaded: LoadedModel, record: dict[str, Any]) -> float:
    unpatch_model(loaded.model).set_attn_implementation({"text_config": "eager"})
    encoded = encode_prompts(loaded, [record], padding_side="right", answers=[record["response_ids"]])
    maps = loaded.model(**encoded.inputs, output_attentions=True, use_cache=False).attentions[resolve_layer(loaded.image_layers)]
    start, stop = encoded.response_spans[0]
    return eager_ratio(maps, slice(start - 1, stop - 1), encoded.inputs["input_ids"], loaded.image_token_id, record["target"])


def score(loaded: LoadedModel, record: dict[str, Any]) -> float:
    _patched(loaded)
    return float(attention_ratios(loaded, [record], statistic="mean")[0]["ratio"])


@torch.no_grad()
def official_way(loaded: LoadedModel, record: dict[str, Any]) -> float:
    unpatch_model(loaded.model).set_attn_implementation({"text_config": "eager"})
    encoded = encode_prompts(loaded, [record], padding_side="left")
    out = loaded.model.generate(
        **encoded.inputs,
        max_new_tokens=record["answer_tokens"],
        do_sample=False,
        output_attentions=True,
        output_scores=True,
        return_dict_in_generate=True,
        pad_token_id=loaded.pad_id,
    )
    layer, prompt_tokens = resolve_layer(loaded.image_layers), encoded.inputs["input_ids"].shape[1]
    steps = torch.stack([step[layer][:, :, -1, :prompt_tokens] for step in out.attentions[1:]], dim=2)
    return eager_ratio(steps, slice(None), encoded.inputs["input_ids"], loaded.image_token_id, record["target"])


def generate_and_score(loaded: LoadedModel, record: dict[str, Any]) -> float:
    _patched(loaded)
    settings = {"layer": None, "regions": "box", "drop_first_row": True}
    [answer] = generate_responses(loaded, [record], max_new_tokens=record["answer_tokens"], record=settings)
    recorded = answer["recorded"]
    return float(ratios_of(record, recorded["attention"], recorded["tokens"], "mean")["ratio"])


WAYS: dict[str, Callable[[LoadedModel, dict[str, Any]], float]] = {
    "eager pass": eager_pass,
    "score": score,
    "official way": official_way,
    "generate + score": generate_and_score,
}


def _patched(loaded: LoadedModel) -> None:
    unpatch_model(loaded.model).set_attn_implementation({"text_config": "sdpa"})
    patch_model(loaded.model)


def with_answer(loaded: LoadedModel, record: dict[str, Any]) -> dict[str, Any]:
    """The prompt with the model's own answer."""
    _patched(loaded)
    wanted = record["answer_tokens"]
    answer = generate_responses(loaded, [record], max_new_tokens=wanted)[0]
    if answer["num_tokens"] != wanted:
        raise RuntimeError(f"the answer has {answer['num_tokens']} tokens, not {wanted}")
    return {**record, **answer}


def memory_of(way: str, setting: Setting) -> int:
    """Peak bytes of one way in this process, in which nothing has run before."""
    loaded = build(setting)
    record = {**prompt_record(loaded, setting), "response_ids": list(range(10, 10 + setting.answer_tokens))}
    return peak_memory(lambda: WAYS[way](loaded, record))


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, help="turns that count, after one warm-up (default 5, small 1)")
    parser.add_argument("--memory-of", choices=WAYS, help="print the peak bytes above the model of one way, and stop")
    add_place(parser)
    arguments = parser.parse_args(argv)
    setting = SMALL if arguments.small else Setting()
    if arguments.memory_of:
        print(json.dumps(memory_of(arguments.memory_of, setting)))
        return
    console, place = Console(), place_of(arguments)
    loaded = build(setting)
    record = with_answer(loaded, prompt_record(loaded, setting))
    found = {name: way(loaded, record) for name, way in WAYS.items()}
    for ours, theirs in COMPARISONS.items():
        if abs(found[ours] - found[theirs]) > 1e-5:
            raise SystemExit(f"{ours} gives ratio {found[ours]}, {theirs} {found[theirs]}: not comparable")
    timed = {name: (lambda way=way: way(loaded, record)) for name, way in WAYS.items()}
    seconds = alternate(timed, arguments.repeats or (1 if arguments.small else 5), console.print)
    # Small, where the figures say nothing, in this process.
    memory = {name: memory_of(name, setting) if arguments.small else _memory_in_fresh_process(name) for name in WAYS}
    result = {
        "machine": machine(),
        "setting": {"pictures": PICTURES, **asdict(setting), "dtype": "float32"},
        "ratios": found,
        "seconds": seconds,
        "peak_bytes_above_model": memory,
        "speed_up": {ours: ratios(seconds, theirs, ours) for ours, theirs in COMPARISONS.items()},
        "memory_share": {ours: memory[ours] / max(1, memory[theirs]) for ours, theirs in COMPARISONS.items()},
    }
    path = place.result("attention_ratio_cpu", result)
    console.print(_table(result))
    place.section("docs/results.md", "attention_ratio", _markdown(result))
    if place.committed:
        readme.write()
    console.print(f"written: {path}")


def _memory_in_fresh_process(way: str) -> int:
    command = [sys.executable, "-m", "benchmarks.runs.attention_ratio", "--memory-of", way]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip().splitlines()[-1])


COLUMNS = ["way", "seconds (median)", "peak MB above model", "times faster (min to max)", "goal", "memory share", "goal"]


def _rows(result: dict[str, Any]) -> list[list[str]]:
    rows = []
    for name in WAYS:
        row = [name, f"{statistics.median(result['seconds'][name]):.2f}", f"{result['peak_bytes_above_model'][name] / 1e6:.0f}"]
        if name in COMPARISONS:
            speed = result["speed_up"][name]
            row += [f"{speed['median']:.2f} ({speed['min']:.2f} to {speed['max']:.2f})", f"{GOALS[name]}"]
            row += [f"{result['memory_share'][name]:.2f}", "0.33"]
        rows.append(row + [""] * (len(COLUMNS) - len(row)))
    return rows


def _table(result: dict[str, Any]) -> Table:
    sizes = result["setting"]
    table = Table(title=f"{PICTURES} pictures, {sizes['prompt_tokens']:,} prompt tokens, {sizes['answer_tokens']} answer tokens")
    for column in COLUMNS:
        table.add_column(column)
    for row in _rows(result):
        table.add_row(*row)
    return table


def _markdown(result: dict[str, Any]) -> str:
    on = result["machine"]
    packages = ", ".join(f"{name} {on['packages'][name]}" for name in ("torch", "transformers"))
    return f"{markdown(COLUMNS, _rows(result))}\n\n{on['cpu']}, {on['threads']} threads, {packages}; float32, random weights."


if __name__ == "__main__":
    main()
