"""Where the time of a step's forward and backward goes: what stands between a side and its arithmetic limit."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.runs.training_step.parts import DPO, MDPO_SIDES, Bench
from benchmarks.runs.training_step.setting import Setting
from benchmarks.runs.training_step.sides import Side, make, warm

KINDS = {
    "products": ("aten::mm", "aten::addmm", "aten::bmm", "aten::baddbmm", "aten::mkldnn_convolution", "linear_logprobs"),
    "attention": ("TreeAttention", "scaled_dot_product", "aten::_softmax"),
    "elementwise": (
        "aten::mul",
        "aten::add",
        "aten::silu",
        "aten::gelu",
        "aten::neg",
        "aten::div",
        "aten::sub",
        "aten::pow",
        "aten::mean",
    ),
    "copies": ("aten::copy_", "aten::cat", "aten::fill_", "aten::zero_", "aten::index"),
}
"""Kind -> what its operators' names hold; the first kind that fits counts."""


def profile(bench: Bench) -> dict[str, Any]:
    """Per method and side, the share of each kind of operator in the processor time of one step after a warm-up."""
    settings = {"dpo": bench.setting, "mdpo": bench.setting.but(corrupted=True)}
    found: dict[str, Any] = {}
    for method, sides in (("dpo", DPO), ("mdpo", MDPO_SIDES)):
        found[method] = {}
        for name, side in sides.items():
            found[method][name] = _shares(side, settings[method])
            bench.progress(f"{method} {name}: {', '.join(f'{kind} {share:.0%}' for kind, share in found[method][name].items())}")
    return found


def _shares(side: Side, setting: Setting) -> dict[str, float]:
    trainer: Any = make(side, setting.but(records=side.batch))
    if side.caches:
        trainer.precompute_reference()
    if side.checkpointing:
        trainer.model.gradient_checkpointing_enable()
    warm(trainer.model)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(side.batch)])
    trainer.compute_loss(trainer.model.train(), batch).backward()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        trainer.compute_loss(trainer.model.train(), batch).backward()
    seconds = dict.fromkeys([*KINDS, "other"], 0.0)
    for event in profiler.key_averages():
        seconds[_kind(event.key)] += event.self_cpu_time_total
    return {kind: spent / sum(seconds.values()) for kind, spent in seconds.items()}


def _kind(name: str) -> str:
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), "other")
