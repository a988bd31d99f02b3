"""The model's own answers to the prompts, in batches, with the perplexity that selection looks at."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.answers.config_only import check_prompts
from mmdpo_trainers.answers.noise import noisy_images
from mmdpo_trainers.answers.response import check_num_answers
from mmdpo_trainers.answers.transformers_engine import generate_responses
from mmdpo_trainers.answers.vllm_engine import VllmEngine, check_vllm
from mmdpo_trainers.data.seeds import batch_seed
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.processes import ranks
from mmdpo_trainers.stages.batches import Record, count_formats, own_records, run_batches
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.models import LazyModel, load_base


def inputs(context: StageContext) -> list[Path]:
    return [context.prompts]


def run(context: StageContext) -> dict[str, Any]:
    """Answer every prompt; writes `responses.jsonl`."""
    options = context.options
    check_num_answers(options)
    records, left_out = own_records(context, context.prompts, "prompts")
    check_prompts(context.model, records, context.date)
    answerer = _Vllm(context, records) if options.engine == "vllm" else _Transformers(context)
    with contextlib.closing(answerer):
        path = run_batches(context, "responses.jsonl", records, options.batch_size, answerer.answer, "generate", opened=True)
    if not ranks.is_rank_0():
        return {}
    written = list(read_jsonl(path))
    if options.num_answers > 1:
        return {**_several(written), **left_out}
    return {
        "responses": count_formats(written),
        "ended": sum(record["ended"] for record in written) / len(written),
        "mean_perplexity": sum(record["perplexity"] for record in written) / len(written),
        "mean_tokens": sum(record["num_tokens"] for record in written) / len(written),
        **left_out,
    }


def _several(written: Sequence[Record]) -> dict[str, Any]:
    """The summary of several answers a prompt. distinct: different texts a prompt, on the mean; all_alike: prompts whose answers are one."""
    texts = [len(set(record["responses"])) for record in written]
    answers = {
        name: [each for record in written for each in record[name]] for name in ("responses", "ended", "perplexity", "num_tokens")
    }
    count = len(answers["responses"])
    return {
        "responses": count_formats(written),
        "answers": count,
        "distinct": sum(texts) / len(texts),
        "all_alike": texts.count(1),
        "ended": sum(answers["ended"]) / count,
        "mean_perplexity": sum(answers["perplexity"]) / count,
        "mean_tokens": sum(answers["num_tokens"]) / count,
    }


class _Transformers:
    """Answers of the model in this process."""

    def __init__(self, context: StageContext) -> None:
        self.context = context
        self._model = LazyModel(lambda: load_base(context))

    def answer(self, number: int, batch: Sequence[Record]) -> list[dict[str, Any]]:
        context, options = self.context, self.context.options
        return generate_responses(
            self._model(),
            batch,
            max_new_tokens=options.max_new_tokens,
            do_sample=options.do_sample,
            temperature=options.temperature,
            top_p=options.top_p,
            num_answers=options.num_answers,
            seed=batch_seed(context.seed, "generate", number),
            pictures=[noisy_images(record, options.noise, context.seed) for record in batch],
            # With a noise preset that is the attention on the noisy pictures, as in MIA-DPO's code.
            record=context.config.score.recording if options.record_attention and options.num_answers == 1 else None,
        )

    def close(self) -> None:
        pass


class _Vllm:
    """Answers of vLLM, which is started with the first batch; seeds are of records, because vLLM makes up batches of its own."""

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
                most_images=self._most,
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
            pictures=[noisy_images(record, options.noise, context.seed) for record in batch],
            num_answers=options.num_answers,
        )

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()
