"""The model's own answers to the prompts, in batches, with the perplexity that selection looks at."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig

from mmdpo_kernels import patch_model
from mmdpo_trainers import ranks
from mmdpo_trainers.attention_ratios import recorded_generation, sees_pictures
from mmdpo_trainers.batches import Record, batch_seed, count_formats, own_records, run_batches
from mmdpo_trainers.data.compose import add_noise
from mmdpo_trainers.described import check_prompts
from mmdpo_trainers.errors import DataError
from mmdpo_trainers.loading import LoadedModel, load_model
from mmdpo_trainers.prompts import EncodedPrompts, encode_prompts, in_forwards, load_pictures
from mmdpo_trainers.responses import response_of
from mmdpo_trainers.run_folder import read_jsonl
from mmdpo_trainers.stages import StageContext
from mmdpo_trainers.vllm_engine import VllmEngine, check_vllm

GRID_NOISE = 225.0
PIP_NOISE = 49.0
"""Standard deviations of MIA-DPO's code, in 0..255 levels."""


def inputs(context: StageContext) -> list[Path]:
    return [context.prompts]


def run(context: StageContext) -> dict[str, Any]:
    """Answer every prompt; writes `responses.jsonl`."""
    options = context.options
    records, left_out = own_records(context, context.prompts, "prompts")
    check_prompts(context.model, records)
    answerer = _Vllm(context, records) if options.engine == "vllm" else _Transformers(context)
    with contextlib.closing(answerer):
        path = run_batches(context, "responses.jsonl", records, options.batch_size, answerer.answer, "generate")
    if not ranks.is_main():
        return {}
    written = list(read_jsonl(path))
    return {
        "responses": count_formats(written),
        "ended": sum(record["ended"] for record in written) / len(written),
        "mean_perplexity": sum(record["perplexity"] for record in written) / len(written),
        "mean_tokens": sum(record["num_tokens"] for record in written) / len(written),
        **left_out,
    }


class _Transformers:
    """Answers of the model in this process, loaded when a batch is first asked for: a continued stage may have none left."""

    def __init__(self, context: StageContext) -> None:
        self.context = context
        self._loaded: LoadedModel | None = None

    def answer(self, number: int, batch: Sequence[Record]) -> list[dict[str, Any]]:
        context, options = self.context, self.context.options
        if self._loaded is None:
            self._loaded = load_model(context.model, dtype=context.config.dtype, device=context.device, date=context.date)
            patch_model(self._loaded.model)
        return generate_responses(
            self._loaded,
            batch,
            max_new_tokens=options.max_new_tokens,
            do_sample=options.do_sample,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=batch_seed(context.seed, "generate", number),
            pictures=[noisy_pictures(record, options.noise, context.seed) for record in batch],
            # With a noise preset that is the attention on the noisy pictures, as in MIA-DPO's code.
            record=context.config.score.recording if options.record_attention else None,
        )

    def close(self) -> None:
        self._loaded = None


class _Vllm:
    """Answers of vLLM, likewise; seeds are of records, because vLLM makes up batches of its own."""

    def __init__(self, context: StageContext, records: Sequence[Record]) -> None:
        check_vllm(context.config)
        self.context = context
        self._most = max(len(record["images"]) for record in records)
        self._engine: VllmEngine | None = None

    def answer(self, number: int, batch: Sequence[Record]) -> list[dict[str, Any]]:
        context, options = self.context, self.context.options
        if self._engine is None:
            self._engine = VllmEngine(
                context.model,
                dtype=context.config.dtype,
                device=context.device,
                most_pictures=self._most,
                arguments=options.engine_args,
                date=context.date,
            )
        return self._engine.generate_responses(
            batch,
            max_new_tokens=options.max_new_tokens,
            do_sample=options.do_sample,
            temperature=options.temperature,
            top_p=options.top_p,
            seeds=[batch_seed(context.seed, "generate", record["id"]) for record in batch],
            pictures=[noisy_pictures(record, options.noise, context.seed) for record in batch],
        )

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


@torch.no_grad()
def generate_responses(
    loaded: LoadedModel,
    records: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    pictures: Sequence[Sequence[Image.Image]] | None = None,
    record: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Answer one batch, greedily or by sampling with `seed`.

    Returns per record what `response_of` does.
    record: settings of `recorded_generation`; each answer then has `recorded`, the attention that its rows gave the pictures.
    """
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if do_sample else {}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        num_beams=1,
        repetition_penalty=1.0,
        # A generated image token would ask for a picture when the answer is scored.
        suppress_tokens=[loaded.image_token_id],
        pad_token_id=loaded.pad_id,
        eos_token_id=sorted(loaded.end_ids) or None,
        return_dict_in_generate=True,
        output_logits=True,
        **sampling,
    )
    shown = [load_pictures(each) for each in records] if pictures is None else pictures

    def work(indices: list[int]) -> list[dict[str, Any]]:
        chosen = [records[index] for index in indices]
        encoded = encode_prompts(loaded, chosen, padding_side="left", pictures=[shown[index] for index in indices])
        return _of_one_forward(loaded, chosen, encoded, config, seed, record)

    return in_forwards(loaded, records, work)


def _of_one_forward(
    loaded: LoadedModel,
    records: Sequence[Mapping[str, Any]],
    encoded: EncodedPrompts,
    config: GenerationConfig,
    seed: int,
    record: Mapping[str, Any] | None,
) -> list[dict[str, Any]]:
    width = encoded.inputs["input_ids"].shape[1]
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        recorded = record if sees_pictures(loaded, encoded) else None
        recording = contextlib.nullcontext() if recorded is None else recorded_generation(loaded, records, encoded, **recorded)
        with recording as generation:
            output = loaded.model.generate(**encoded.inputs, generation_config=config)
    max_logps = torch.stack([_max_logp(logits) for logits in output.logits], dim=1).tolist()
    answers = [
        response_of(loaded, ids, logps) for ids, logps in zip(output.sequences[:, width:].tolist(), max_logps, strict=True)
    ]
    if generation is None:
        return answers
    attention = generation.take([answer["num_tokens"] + answer["ended"] for answer in answers])
    return [{**answer, "recorded": found} for answer, found in zip(answers, attention, strict=True)]


def noisy_pictures(record: Mapping[str, Any], preset: str, seed: int) -> list[Image.Image]:
    """A record's pictures as the model sees them at generation; training always sees the clean ones.

    Sequence and single: clean. Grid: Gaussian noise of 225 levels on the target's cell. Pic-in-pic: 49 levels on the whole
    picture, added in float and clipped (`paper`), or wrapping modulo 256 as MIA-DPO's uint8 sum does (`official_code`).
    """
    pictures = load_pictures(record)
    if preset == "none" or record["format"] not in ("grid", "pip"):
        return pictures
    own_seed = batch_seed(seed, "noise", record["id"])
    if record["format"] == "pip":
        return [add_noise(pictures[0], PIP_NOISE, own_seed, wrap=preset == "official_code")]
    if record["box"] is None:
        raise DataError(f"record {record['id']}: noise needs the target's `box`; add it, or set generate.noise to none")
    return [add_noise(pictures[0], GRID_NOISE, own_seed, box=record["box"])]


def _max_logp(logits: torch.Tensor) -> torch.Tensor:
    """(B, V) logits -> (B,) log of the largest probability, in float32 at least."""
    logits = logits.float() if logits.dtype != torch.float64 else logits
    return logits.amax(dim=-1) - logits.logsumexp(dim=-1)
