"""Accuracy by format and number of pictures, and the attention ratio on the target, before or after training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmdpo_kernels import patch_model
from mmdpo_trainers.attention_ratios import mean_ratios, ratios_of
from mmdpo_trainers.batches import Record, read_records, require, run_batches
from mmdpo_trainers.data.answers import answers_match
from mmdpo_trainers.errors import StageError
from mmdpo_trainers.loading import LoadedModel, load_model
from mmdpo_trainers.report.intervals import Proportion
from mmdpo_trainers.run_folder import read_jsonl
from mmdpo_trainers.stages import FORMATS, StageContext
from mmdpo_trainers.stages.augment import build_evaluation_prompts, evaluation_inputs
from mmdpo_trainers.stages.generate import generate_responses


def inputs(context: StageContext) -> list[Path]:
    trained = [context.trained] if context.moment == "after" else []
    return [*evaluation_inputs(context), *trained]


def run(context: StageContext) -> dict[str, Any]:
    """Answer the evaluation prompts with the base (`before`) or the trained model (`after`); writes `answers.jsonl`."""
    options = context.options
    prompts = build_evaluation_prompts(context)
    records = read_records(prompts, "evaluation prompts")
    require(records, {"answer": str}, prompts)
    loaded: LoadedModel | None = None

    def work(number: int, batch: Sequence[Record]) -> list[dict[str, Any]]:
        nonlocal loaded
        if loaded is None:
            loaded = load_evaluated(context)
            patch_model(loaded.model)
        return answer_batch(loaded, batch, options=options, score=context.config.score)

    path = run_batches(context, "answers.jsonl", records, options.batch_size, work, f"evaluate {context.moment or ''}".strip())
    return {**accuracy_summary(list(read_jsonl(path))), "match": options.match}


def load_evaluated(context: StageContext) -> LoadedModel:
    """The model this evaluation is about: the base, or what training left (an adapter, merged into a fresh base, or a model)."""
    config = context.config
    choice: dict[str, Any] = {"dtype": config.dtype, "device": config.device or "auto"}
    if context.moment != "after":
        return load_model(context.model, **choice)
    trained = context.trained
    if (trained / "adapter_config.json").is_file():
        return load_model(context.model, adapter=trained, **choice)
    if not trained.is_dir():
        raise StageError(f"{trained} does not exist: run train first")
    return load_model(trained, processor=context.model, **choice)


def answer_batch(loaded: LoadedModel, batch: Sequence[Mapping[str, Any]], *, options: Any, score: Any) -> list[dict[str, Any]]:
    """Greedy answers with `correct`, and where there is more than one picture the attention ratio on the target.

    options: an `EvaluateConfig`. score: a `ScoreConfig`, so that the ratios are those that selection looks at.
    """
    results = []
    for record, answer in zip(
        batch, generate_responses(loaded, batch, max_new_tokens=options.max_new_tokens, record=score.recording), strict=True
    ):
        recorded = answer.pop("recorded")
        correct = answers_match(answer["response"], record["answer"], options=record.get("options"), match=options.match)
        # The only picture of a single-image prompt has all the attention on pictures: nothing to measure.
        several = record["num_images"] > 1
        ratios = ratios_of(record, recorded["attention"], recorded["tokens"], score.statistic) if several else {"ratio": None}
        results.append({**answer, "correct": correct, **ratios})
    return results


def accuracy_summary(answers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """`accuracy`, `counts`, `intervals` (Wilson, 95 %) and `mean_ratio` by format; `by_images` by number of pictures too."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for name in FORMATS:
        if group := [answer for answer in answers if answer["format"] == name]:
            groups[name] = group
    overall = {name: _proportion(group) for name, group in groups.items()}
    by_images: dict[str, dict[int, dict[str, Any]]] = {}
    for name, group in groups.items():
        for count in sorted({answer["num_images"] for answer in group}):
            share = _proportion([answer for answer in group if answer["num_images"] == count])
            by_images.setdefault(name, {})[count] = {"accuracy": share.value, "count": share.total, "interval": _interval(share)}
    return {
        "accuracy": {name: share.value for name, share in overall.items()},
        "counts": {name: share.total for name, share in overall.items()},
        "intervals": {name: _interval(share) for name, share in overall.items()},
        "by_images": by_images,
        "mean_ratio": mean_ratios(answers),
    }


def _proportion(answers: Sequence[Mapping[str, Any]]) -> Proportion:
    return Proportion(sum(answer["correct"] for answer in answers), len(answers))


def _interval(share: Proportion) -> list[float]:
    return [share.low, share.high]
