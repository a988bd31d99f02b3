"""Answers by vLLM: the same prompts, pictures and fields as `generate_responses`, without recorded attention.

vLLM puts the image tokens into the prompt by itself. The first prompt of each number of pictures is compared with this project's own, so that
scoring and training, which go through transformers, see what the answers were given to.
"""

from __future__ import annotations

import contextlib
import gc
import importlib.util
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mmdpo_trainers.answers.config_only import config_only, own_dtype
from mmdpo_trainers.answers.response import response_of, several_responses
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.errors import ConfigError, MmdpoError, StageError
from mmdpo_trainers.models.encode import encode_prompts, prompt_ids, refuse_images
from mmdpo_trainers.models.families import Family
from mmdpo_trainers.models.template_date import TemplateDate
from mmdpo_trainers.processes import launcher

_NEVER = -100.0
"""The lowest bias that vLLM takes for a token."""

_COLDEST = 0.01
"""vLLM takes this temperature in place of a lower one."""


def check_vllm(config: RunConfig, stage: str = "generate") -> None:
    """Raise ConfigError where there is no vLLM, or settings that it would not follow. stage: generate or evaluate."""
    options = getattr(config, stage)
    if importlib.util.find_spec("vllm") is None:
        raise ConfigError(
            f"{stage}.engine: vllm is not installed here; pip install 'mmdpo-kernels[vllm]', or set it to transformers, whose answers "
            "have the same fields"
        )
    if config.device == "cpu":
        raise ConfigError(
            f"device: expected none, cuda or cuda:N with {stage}.engine: vllm, whose build decides whether it runs on a CPU, got cpu; leave it "
            f"out, or set {stage}.engine to transformers"
        )
    if stage == "evaluate":
        if config.quantization.load_in_4bit:
            raise ConfigError(
                "evaluate.engine: vllm would answer with whole weights, into which the adapter is merged, and quantization trains it beside "
                "4-bit ones; set evaluate.engine to transformers"
            )
        return
    if config.quantization.load_in_4bit and "quantization" not in options.engine_args:
        raise ConfigError(
            "generate.engine: vllm would answer with the whole model, and quantization trains the one in 4 bits; set generate.engine_args to "
            "{quantization: bitsandbytes}, or generate.engine to transformers"
        )
    if options.do_sample and options.temperature < _COLDEST:
        raise ConfigError(
            f"generate.temperature: vLLM samples at {_COLDEST} or more, got {options.temperature}; raise it, or set generate.do_sample "
            "to false"
        )


def check_vllm_family(family: Family, section: str) -> None:
    """Raise ConfigError for a family whose answers in vLLM are known to be others. section: of the settings, which the error names."""
    if family.other_in_vllm is not None:
        raise ConfigError(
            f"{section}.engine: expected transformers for a model of family {family.name!r}, got vllm, which gives {family.other_in_vllm} "
            "(docs/generation.md); set it to transformers"
        )


class VllmEngine:
    """A vLLM `LLM` of a model folder.

    device: `cuda:N`, or `auto` for vLLM's own choice. most_images: of one prompt. arguments: more of `vllm.LLM`.
    date: as in `load_model`. section: of the settings, which errors name.
    """

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str,
        device: str,
        most_images: int,
        arguments: Mapping[str, Any],
        date: TemplateDate | None = None,
        section: str = "generate",
    ) -> None:
        self._section = section
        self.config_only = config_only(folder, date)
        check_vllm_family(self.config_only.family, section)
        if dtype == "auto":
            # The checkpoint's own, as elsewhere; vLLM's `auto` would halve float32.
            dtype = own_dtype(folder, self.config_only.model.config)
        self._arguments = dict(arguments)
        self._checked: set[int] = set()
        with _own_environment(device), self._said(f"model {folder}: vLLM cannot load it"):
            from vllm import LLM

            self._llm: Any = LLM(
                model=str(folder),
                dtype=dtype,
                limit_mm_per_prompt={"image": max(1, most_images)},
                # Of the logits as the model gives them, before the bias and the temperature: perplexity is of these.
                logprobs_mode="raw_logprobs",
                **arguments,
            )

    def generate_responses(
        self,
        records: Sequence[Mapping[str, Any]],
        *,
        max_new_tokens: int,
        pictures: Sequence[Sequence[Image.Image]],
        do_sample: bool = False,
        temperature: float = 1.0,
        top_p: float = 1.0,
        num_answers: int = 1,
        seeds: Sequence[int] | None = None,
    ) -> list[dict[str, Any]]:
        """Answer a batch; returns per record what `response_of` does, or with `num_answers` above 1 `several_responses`.

        seeds: one a record, which sampling needs; vLLM counts on from it for further answers.
        """
        if do_sample and seeds is None:
            raise ValueError("seeds: sampling needs one a record")
        drawn = seeds if do_sample and seeds is not None else [None] * len(records)
        described = self.config_only
        common: dict[str, Any] = {
            "max_tokens": max_new_tokens,
            # Those of transformers alone: vLLM's own would have the tokenizer's among them.
            "stop_token_ids": sorted(described.end_ids),
            "ignore_eos": True,
            "logprobs": 1,
            "detokenize": False,
        }
        image_token = described.image_token_id
        if image_token < described.model.config.get_text_config().vocab_size:
            # A generated image token would ask for a picture when the answer is scored. Mllama's is none that can be generated.
            common["logit_bias"] = {image_token: _NEVER}
        warped = {"temperature": temperature, "top_p": top_p} if do_sample else {"temperature": 0.0}
        one_token = [[[described.image_token_id]] * len(row) for row in pictures]
        prompts: list[dict[str, Any]] = [{"prompt_token_ids": ids} for ids in prompt_ids(described, records, one_token)]
        for prompt, row in zip(prompts, pictures, strict=True):
            if row:
                prompt["multi_modal_data"] = {"image": list(row)}
        with self._said(f"records {_named(records)}: vLLM cannot answer them"):
            from vllm import SamplingParams

            several = {"n": num_answers} if num_answers > 1 else {}
            params = [SamplingParams(**common, **warped, **several, seed=seed) for seed in drawn]
            try:
                outputs = self._llm.generate(prompts, params, use_tqdm=False)
            except Exception:
                refuse_images(described, records, pictures)
                raise
        for record, row, output in zip(records, pictures, outputs, strict=True):
            if len(row) not in self._checked:
                self._check_prompt(record, row, output)
        answers = [
            [self._response(record, each, max_new_tokens) for each in sorted(output.outputs, key=lambda each: each.index)]
            for record, output in zip(records, outputs, strict=True)
        ]
        return [several_responses(each) if num_answers > 1 else each[0] for each in answers]

    def close(self) -> None:
        """Give the GPU back."""
        self._llm = None
        gc.collect()

    @contextlib.contextmanager
    def _said(self, what: str) -> Iterator[None]:
        """Say vLLM's errors in one line, with the settings that most of them are about."""
        try:
            yield
        except MmdpoError:
            raise
        except Exception as error:
            # Of any kind: vLLM has its own, and those of torch, CUDA and the model come through it.
            raise StageError(
                f"{what} ({' '.join(str(error).split()) or type(error).__name__}); see {self._section}.engine_args, which are "
                f"{self._arguments or 'empty'}, or set {self._section}.engine to transformers"
            ) from error

    def _check_prompt(self, record: Mapping[str, Any], row: Sequence[Image.Image], output: Any) -> None:
        expected = encode_prompts(self.config_only, [record], padding_side="left", pictures=[row]).inputs["input_ids"][0].tolist()
        found = list(output.prompt_token_ids)
        if found != expected:
            same = next((i for i, both in enumerate(zip(found, expected, strict=False)) if both[0] != both[1]), None)
            where = min(len(found), len(expected)) if same is None else same
            raise StageError(
                f"record {record['id']}: vLLM reads the prompt as {len(found)} tokens, transformers as {len(expected)}, and they differ "
                f"from token {where} on; set {self._section}.engine to transformers, or try another version of vLLM"
            )
        self._checked.add(len(row))

    def _response(self, record: Mapping[str, Any], answer: Any, max_new_tokens: int) -> dict[str, Any]:
        ids, steps = list(answer.token_ids), answer.logprobs
        if answer.finish_reason == "length" and len(ids) < max_new_tokens:
            raise StageError(
                f"record {record['id']}: vLLM cut the answer after {len(ids)} of {max_new_tokens} tokens, because prompt and answer are longer "
                f"than max_model_len; raise it in {self._section}.engine_args, or lower {self._section}.max_new_tokens"
            )
        whole = answer.finish_reason == "length" or (
            answer.finish_reason == "stop" and ids[-1:] and ids[-1] in self.config_only.end_ids
        )
        if not whole or steps is None or len(steps) != len(ids):
            found = None if steps is None else len(steps)
            raise StageError(
                f"record {record['id']}: expected vLLM's answer to end with an end token or at its longest, with the log-probabilities of "
                f"each token; got finish_reason {answer.finish_reason!r}, {len(ids)} tokens, log-probabilities of {found}. Set "
                f"{self._section}.engine to transformers, or try another version of vLLM"
            )
        # The likeliest token's, and that of the token taken, where it is another.
        return response_of(self.config_only, ids, [max(each.logprob for each in step.values()) for step in steps])


def _named(records: Sequence[Mapping[str, Any]]) -> str:
    ids = [str(record["id"]) for record in records]
    return ", ".join(ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")


@contextlib.contextmanager
def _own_environment(device: str) -> Iterator[None]:
    """The environment of a process on its own, with this GPU only.

    Each process of a launch has a vLLM to itself. vLLM starts processes, and makes process groups in them, which would go looking for the
    launcher's store (TORCHELASTIC_USE_AGENT_STORE) at an address that has none, and wait there.
    """
    with launcher.hidden():
        if device.startswith("cuda:"):
            os.environ["CUDA_VISIBLE_DEVICES"] = _shown(int(device.removeprefix("cuda:")))
        # A forked process could not use a GPU that this one has looked at.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        yield


def _shown(number: int) -> str:
    """What CUDA_VISIBLE_DEVICES calls the GPU that has this number among those it shows."""
    shown = [each.strip() for each in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if each.strip()]
    if shown and number >= len(shown):
        raise ConfigError(
            f"device: cuda:{number} is not among the {len(shown)} GPUs that CUDA_VISIBLE_DEVICES shows ({','.join(shown)}), counted from 0; "
            "choose another, or show more"
        )
    return shown[number] if shown else str(number)
