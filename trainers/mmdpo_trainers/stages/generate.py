"""The model's own answers to the prompts, in batches, with the perplexity that selection looks at."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdpo_trainers.answers.config_only import check_prompts
from mmdpo_trainers.answers.kept_answers import forget
from mmdpo_trainers.answers.noise import noisy_images
from mmdpo_trainers.answers.response import check_num_answers
from mmdpo_trainers.answers.server_engine import ServerEngine, check_server
from mmdpo_trainers.answers.transformers_engine import generate_responses
from mmdpo_trainers.answers.vllm_engine import VllmEngine, check_vllm
from mmdpo_trainers.config.sections.answers import GenerateConfig
from mmdpo_trainers.data.seeds import batch_seed
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.processes import ranks
from mmdpo_trainers.stages.batches import Record, count_formats, own_records, run_batches
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.models import LazyModel, load_base

_TO_SERVERS = 1024
"""Prompts to a batch, at least, for servers, which have nothing to do where one ends. Not by their number: a batch of a stage that was begun
with others would be another."""


def inputs(context: StageContext) -> list[Path]:
    return [context.prompts]


def run(context: StageContext) -> dict[str, Any]:
    """Answer every prompt; writes `responses.jsonl`."""
    options = context.options
    check_num_answers(options)
    records, left_out = own_records(context, context.prompts, "prompts")
    check_prompts(context.model, records, context.date)
    with contextlib.closing(_answerer(context, records)) as answerer:
        path = run_batches(
            context, "responses.jsonl", records, answerer.batch_size, answerer.answer, "generate", opened=answerer.opened
        )
    if not ranks.is_rank_0():
        return {}
    forget(context.folder)
    written = list(read_jsonl(path))
    if options.num_answers > 1:
        return {**_several(written), **left_out}
    return {
        "responses": count_formats(written),
        "ended": sum(record["ended"] for record in written) / len(written),
        **_perplexity([record["perplexity"] for record in written]),
        "mean_tokens": sum(record["num_tokens"] for record in written) / len(written),
        **left_out,
    }


def _perplexity(found: Sequence[float | None]) -> dict[str, Any]:
    """The mean of those that are known, and how many are not: a server that gives no log-probabilities leaves them to score."""
    known = [each for each in found if each is not None]
    return {
        "mean_perplexity": sum(known) / len(known) if known else None,
        **({"without_perplexity": len(found) - len(known)} if len(known) < len(found) else {}),
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
        **_perplexity(answers["perplexity"]),
        "mean_tokens": sum(answers["num_tokens"]) / count,
    }


def _asked(options: GenerateConfig) -> dict[str, Any]:
    """What every engine is asked for, by the names that it has in the settings and in each engine's `generate_responses`."""
    return {name: getattr(options, name) for name in ("max_new_tokens", "do_sample", "temperature", "top_p", "num_answers")}


def _seeds(context: StageContext, batch: Sequence[Record]) -> list[int]:
    """One a record, for engines that make up batches of their own."""
    return [batch_seed(context.seed, "generate", record["id"]) for record in batch]


class _Transformers:
    """Answers of the model in this process."""

    opened = True

    def __init__(self, context: StageContext) -> None:
        self.context, self.batch_size = context, context.options.batch_size
        self._model = LazyModel(lambda: load_base(context))

    def answer(self, number: int, batch: Sequence[Record]) -> list[dict[str, Any]]:
        context, options = self.context, self.context.options
        return generate_responses(
            self._model(),
            batch,
            **_asked(options),
            seed=batch_seed(context.seed, "generate", number),
            pictures=[noisy_images(record, options.noise, context.seed) for record in batch],
            # With a noise preset that is the attention on the noisy pictures, as in MIA-DPO's code.
            record=context.config.score.recording if options.record_attention and options.num_answers == 1 else None,
        )

    def close(self) -> None:
        pass


class _Vllm:
    """Answers of vLLM, which is started with the first batch."""

    opened = True

    def __init__(self, context: StageContext, records: Sequence[Record]) -> None:
        check_vllm(context.config)
        self.context, self.batch_size = context, context.options.batch_size
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
            **_asked(options),
            seeds=_seeds(context, batch),
            pictures=[noisy_images(record, options.noise, context.seed) for record in batch],
        )

    def close(self) -> None:
        if self._engine is not None:
            self._engine.close()


class _Server:
    """Answers of servers that run already."""

    opened = False
    """A batch is long, and each of its pictures is opened when it is sent."""

    def __init__(self, context: StageContext) -> None:
        check_server(context.config)
        self.context, options = context, context.options
        self._engine = ServerEngine(context.model, options.server, kept=context.folder, date=context.date)
        self.batch_size = max(options.batch_size, _TO_SERVERS)

    def answer(self, number: int, batch: Sequence[Record]) -> list[dict[str, Any]]:
        context, options = self.context, self.context.options
        with context.progress.task(f"answers of batch {number + 1}", len(batch)) as task:
            return self._engine.generate_responses(
                batch,
                **_asked(options),
                seeds=_seeds(context, batch),
                pictures=lambda record: noisy_images(record, options.noise, context.seed),
                advance=task.advance,
            )

    def close(self) -> None:
        self._engine.close()


def _answerer(context: StageContext, records: Sequence[Record]) -> _Transformers | _Vllm | _Server:
    """What `generate.engine` names."""
    if context.options.engine == "server":
        return _Server(context)
    return _Vllm(context, records) if context.options.engine == "vllm" else _Transformers(context)
