"""vLLM's names and call signatures, as this project uses them, over a small model in transformers: a stand-in for tests only.

It takes what vLLM takes (a prompt with one image token a picture, Pillow pictures) and gives what vLLM gives (expanded prompt ids, the end
token in `token_ids`, log-probabilities of the likeliest token and of the taken one, from the raw logits). A keyword that vLLM lacks is a
TypeError. What vLLM itself would answer is not shown by it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mmdpo_trainers.models.families import expand_ids
from mmdpo_trainers.models.loading import load_model


@dataclass(kw_only=True)
class SamplingParams:
    temperature: float = 1.0
    top_p: float = 1.0
    n: int = 1
    seed: int | None = None
    max_tokens: int | None = 16
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    logit_bias: dict[int, float] | None = None
    detokenize: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}.")


@dataclass
class Logprob:
    logprob: float
    rank: int | None = None
    decoded_token: str | None = None


@dataclass
class CompletionOutput:
    token_ids: list[int]
    logprobs: list[dict[int, Logprob]] | None
    finish_reason: str | None
    index: int = 0
    text: str = ""


@dataclass
class RequestOutput:
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = True


class LLM:
    made: list[dict[str, Any]] = []
    """Arguments of every instance."""

    def __init__(
        self,
        model: str,
        *,
        dtype: str = "auto",
        limit_mm_per_prompt: dict[str, int] | None = None,
        logprobs_mode: str = "raw_logprobs",
        gpu_memory_utilization: float = 0.9,
        max_model_len: int | None = None,
        quantization: str | None = None,
    ) -> None:
        assert logprobs_mode == "raw_logprobs"
        if gpu_memory_utilization > 1:
            raise ValueError("gpu_memory_utilization must be in (0, 1]")
        self.most = (limit_mm_per_prompt or {}).get("image", 1)
        self.loaded = load_model(model, dtype=dtype, device="cpu")
        self.longest = max_model_len
        # That of the tokenizer, besides those of generation_config.json.
        self.eos: int | None = self.loaded.tokenizer.eos_token_id
        LLM.made.append({"dtype": dtype, "images": self.most, "max_model_len": max_model_len})

    def generate(
        self, prompts: list[dict[str, Any]], sampling_params: list[SamplingParams], *, use_tqdm: bool = True
    ) -> list[RequestOutput]:
        return [self._one(prompt, params) for prompt, params in zip(prompts, sampling_params, strict=True)]

    def _one(self, prompt: dict[str, Any], params: SamplingParams) -> RequestOutput:
        assert prompt.keys() <= {"prompt_token_ids", "multi_modal_data"}
        loaded, pictures = self.loaded, prompt.get("multi_modal_data", {"image": []})["image"]
        assert len(pictures) <= self.most, f"At most {self.most} image(s) may be provided in one prompt."
        ids, rows = list(prompt["prompt_token_ids"]), [list(range(len(pictures)))]
        inputs: Callable[[Tensor], dict[str, Tensor]] = lambda ids: {}  # noqa: E731
        assert ids.count(loaded.image_token_id) == len(pictures)
        if pictures:
            encoded = loaded.family.encode_images(loaded.processor, pictures, [len(pictures) == 1] * len(pictures))
            ids = expand_ids(ids, loaded.image_token_id, encoded.blocks)
            inputs = lambda ids: loaded.family.model_inputs(encoded, rows, ids)  # noqa: E731
        if self.longest is not None and len(ids) > self.longest:
            raise ValueError(f"The decoder prompt (length {len(ids)}) is longer than the maximum model length of {self.longest}.")
        seeds = [None if params.seed is None else params.seed + index for index in range(params.n)]
        generators = [None if seed is None else torch.Generator().manual_seed(seed) for seed in seeds]
        outputs = [self._complete(ids, inputs, params, generator) for generator in generators]
        # Those that end first may come first.
        return RequestOutput(ids, [replace(output, index=index) for index, output in enumerate(outputs)][::-1])

    def _complete(
        self, prompt: list[int], inputs: Callable[[Tensor], dict[str, Tensor]], params: SamplingParams, generator: Any
    ) -> CompletionOutput:
        taken: list[int] = []
        steps: list[dict[int, Logprob]] = []
        stops = {*(params.stop_token_ids or []), *(() if params.ignore_eos else {self.eos, *self.loaded.end_ids})}
        room = (params.max_tokens or 0) if self.longest is None else min(params.max_tokens or 0, self.longest - len(prompt))
        while len(taken) < room:
            ids = torch.tensor([prompt + taken])
            with torch.no_grad():
                logits = self.loaded.model(input_ids=ids, attention_mask=torch.ones_like(ids), **inputs(ids)).logits[0, -1]
            raw = logits.float().log_softmax(-1)
            for id, bias in (params.logit_bias or {}).items():
                logits[id] += bias
            if params.temperature == 0:
                token = int(logits.argmax())
            else:
                token = int(torch.multinomial((logits / params.temperature).softmax(-1), 1, generator=generator))
            top = int(raw.argmax())
            taken.append(token)
            steps.append({each: Logprob(raw[each].item(), 1 if each == top else None) for each in (token, top)})
            if token in stops:
                return CompletionOutput(taken, steps if params.logprobs else None, "stop")
        return CompletionOutput(taken, steps if params.logprobs else None, "length")


def install(monkeypatch: pytest.MonkeyPatch) -> type[LLM]:
    """Put the double in vLLM's place."""
    module: Any = ModuleType("vllm")
    module.LLM, module.SamplingParams = LLM, SamplingParams
    module.__spec__ = type("Spec", (), {"name": "vllm"})()
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setattr(LLM, "made", [])
    return LLM
