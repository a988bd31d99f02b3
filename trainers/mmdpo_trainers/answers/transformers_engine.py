"""Answers of a model in this process, by transformers' `generate`."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import GenerationConfig, StoppingCriteriaList

from mmdpo_trainers.answers.attention_ratios import recorded_generation, sees_images
from mmdpo_trainers.answers.hidden_images import Hidden, hide_images
from mmdpo_trainers.answers.response import response_of, several_responses
from mmdpo_trainers.answers.stopping import Finished, TextEnd
from mmdpo_trainers.models.encode import EncodedPrompts, encode_prompts, in_forwards, load_images
from mmdpo_trainers.models.loaded import LoadedModel


@torch.no_grad()
def generate_responses(
    loaded: LoadedModel,
    records: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    num_answers: int = 1,
    seed: int = 0,
    pictures: Sequence[Sequence[Image.Image]] | None = None,
    record: Mapping[str, Any] | None = None,
    openings: Sequence[str] | None = None,
    hidden: Hidden | None = None,
    finished: Finished | None = None,
) -> list[dict[str, Any]]:
    """Answer one batch, greedily or by sampling with `seed`.

    Returns per record what `response_of` does; with `num_answers` above 1 what `several_responses` does, of as many rows a prompt, whose
    pictures are processed once.
    record: settings of `recorded_generation`; each answer then has `recorded`, the attention that its rows gave the pictures. Of one
    answer a prompt only.
    openings: beginnings of the answers, which are continued; what is returned is what follows them.
    hidden: image tokens that are not seen, see `hide_images`. finished: ends an answer before an end token or `max_new_tokens`.
    """
    if num_answers > 1 and (record is not None or not do_sample):
        raise ValueError("num_answers: several answers to a prompt are sampled, and their attention is not recorded")
    sampling = {"temperature": temperature, "top_p": top_p, "top_k": 0} if do_sample else {}
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        num_beams=1,
        repetition_penalty=1.0,
        # A model in training has a configuration without.
        use_cache=True,
        # A generated image token would ask for a picture when the answer is scored.
        suppress_tokens=[loaded.image_token_id],
        pad_token_id=loaded.pad_id,
        eos_token_id=sorted(loaded.end_ids) or None,
        return_dict_in_generate=True,
        output_logits=True,
        **sampling,
    )
    shown = [load_images(each) for each in records] if pictures is None else pictures

    def work(indices: list[int]) -> list[dict[str, Any]]:
        chosen = [records[index] for index in indices]
        encoded = encode_prompts(
            loaded,
            chosen,
            padding_side="left",
            answers=None if openings is None else [openings[index] for index in indices],
            pictures=[shown[index] for index in indices],
        )
        if hidden is not None:
            hide_images(loaded, encoded, lambda row, count: hidden(indices[row], count))
        if num_answers > 1:
            rows = _of_one_forward(loaded, chosen, _repeated(encoded, num_answers), config, seed, None, None)
            return [several_responses(rows[index :: len(chosen)]) for index in range(len(chosen))]
        width = encoded.inputs["input_ids"].shape[1]
        end = None if finished is None else TextEnd(finished, indices, width)
        return _of_one_forward(loaded, chosen, encoded, config, seed, record, end)

    return in_forwards(loaded, records, work)


def _repeated(encoded: EncodedPrompts, times: int) -> EncodedPrompts:
    """The whole batch several times over. Of every argument the first dimension goes row by row, or picture by picture in the rows' order
    (transformers' own `num_return_sequences` would put the pictures of a prompt with several out of order)."""
    inputs = {name: torch.cat([value] * times) for name, value in encoded.inputs.items()}
    return dataclasses.replace(encoded, inputs=inputs)


def _of_one_forward(
    loaded: LoadedModel,
    records: Sequence[Mapping[str, Any]],
    encoded: EncodedPrompts,
    config: GenerationConfig,
    seed: int,
    record: Mapping[str, Any] | None,
    end: TextEnd | None,
) -> list[dict[str, Any]]:
    width = encoded.inputs["input_ids"].shape[1]
    devices = [loaded.device] if loaded.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        recorded = record if sees_images(loaded, encoded) else None
        recording = contextlib.nullcontext() if recorded is None else recorded_generation(loaded, records, encoded, **recorded)
        with recording as generation:
            criteria = None if end is None else StoppingCriteriaList([end])
            output = loaded.model.generate(**encoded.inputs, generation_config=config, stopping_criteria=criteria)
    max_logps = torch.stack([_max_logp(logits) for logits in output.logits], dim=1).tolist()
    lengths = [None] * len(output.sequences) if end is None else end.lengths
    answers = [
        response_of(loaded, ids[:length], logps)
        for ids, logps, length in zip(output.sequences[:, width:].tolist(), max_logps, lengths, strict=True)
    ]
    if generation is None:
        return answers
    attention = generation.take([answer["num_tokens"] + answer["ended"] for answer in answers])
    return [{**answer, "recorded": found} for answer, found in zip(answers, attention, strict=True)]


def _max_logp(logits: torch.Tensor) -> torch.Tensor:
    """(B, V) logits -> (B,) log of the largest probability, in float32 at least."""
    logits = logits.float() if logits.dtype != torch.float64 else logits
    return logits.amax(dim=-1) - logits.logsumexp(dim=-1)
