"""Before or after training: accuracy by format or group of questions; attention ratios on the target; held-out pairs."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from mmdpo_trainers.answers.attention_ratios import mean_ratios, ratios_at, resolve_layer
from mmdpo_trainers.answers.config_only import check_prompts
from mmdpo_trainers.answers.layer_choice import FILE, chosen_layers
from mmdpo_trainers.answers.transformers_engine import generate_responses
from mmdpo_trainers.data.left_out import lost
from mmdpo_trainers.data.match import answers_match
from mmdpo_trainers.data.pair_records import PAIR, response_text
from mmdpo_trainers.data.pairs import read_pairs
from mmdpo_trainers.data.records import FORMATS
from mmdpo_trainers.errors import ConfigError, StageError
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.methods import preset_args
from mmdpo_trainers.methods.held_out import held_out_figures
from mmdpo_trainers.methods.ranking import with_attributes
from mmdpo_trainers.methods.reward_figures import reward_figures
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.processes import ranks
from mmdpo_trainers.report.intervals import Proportion
from mmdpo_trainers.stages.batches import Record, own_records, require, run_batches
from mmdpo_trainers.stages.benchmarks import answer_benchmarks, benchmark_questions, check_benchmarks
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.engine_answers import OWN, Questions, answered, engine_answers
from mmdpo_trainers.stages.models import LazyModel, load_evaluated, load_reward_model
from mmdpo_trainers.stages.prompts import build_evaluation_prompts, evaluation_inputs
from mmdpo_trainers.training.pair_logps import pair_logps

HELD_OUT, REWARDS = "held_out.jsonl", "rewards.jsonl"


def inputs(context: StageContext) -> list[Path]:
    """The evaluation prompts or what they are made of, the held-out pairs with the base's figures, and what was trained. Of benchmarks
    see `benchmark_marks`."""
    for name, given in (("input", context.options.input), ("engine", context.options.engine != "transformers")):
        if context.rewards and given:
            raise ConfigError(f"evaluate.{name}: a reward model rates answers and gives none; leave it out")
    trained = [context.trained] if context.moment == "after" else []
    files = []
    if _is_augmented(context):
        files = evaluation_inputs(context)
    elif _has_prompts(context):
        files = [context.evaluation_prompts]
    if context.config.score.layer == "best" and (layers := context.folder_of("score") / FILE).is_file():
        files = [*files, layers]
    if _has_held_out(context):
        files += [context.held_out_pairs, *([_base_figures(context)] if trained else [])]
    if context.rewards:
        files.append(context.held_out_pairs)
    check_benchmarks(context)
    return [*files, *trained]


def run(context: StageContext) -> dict[str, Any]:
    """With the base (`before`) or the trained model (`after`): `answers.jsonl` to the evaluation prompts.

    Of a method that measures held-out pairs also `held_out.jsonl`, their log-probabilities. Of what stage pairs made, either may be missing.
    Of a reward model only `rewards.jsonl`, its rewards of held-out pairs. Of published benchmarks see `stages/benchmarks.py`.
    """
    if context.rewards:
        return _rewards(context)
    model = LazyModel(lambda: load_evaluated(context))
    prompts: Path | None = None
    if _is_augmented(context):
        prompts = Path(ranks.on_rank_0(lambda: str(build_evaluation_prompts(context))))
    elif _has_prompts(context):
        prompts = context.evaluation_prompts
    elif not _has_held_out(context) and not context.options.benchmarks:
        raise StageError(f"{context.held_out_pairs} does not exist: run pairs first, or give prompts with answers with --input")
    records: list[Record] = []
    left_out: dict[str, Any] = {}
    if prompts is not None:
        records, left_out = _records(context, prompts)
    given: Mapping[str, Mapping[str, Record]] = {}
    if context.options.engine == "vllm":
        about, longest = f"answers {context.moment or ''}".strip(), context.options.max_new_tokens
        own = [Questions(OWN, _asked(context, records), longest, about)] if records else []
        given = engine_answers(context, [*own, *benchmark_questions(context)])
    summary = _answers(context, records, given.get(OWN), model) | left_out if records else {}
    if _has_held_out(context):
        summary |= _held_out(context, model)
    return summary | answer_benchmarks(context, model, chosen_layers(context.run.path, context.config.score.layer), given)


def _records(context: StageContext, path: Path) -> tuple[list[Record], dict[str, Any]]:
    """The evaluation prompts, and what of them is left out."""
    records, left_out = own_records(context, path, "evaluation prompts")
    require(records, {"answer": str}, path)
    check_prompts(context.model, records, context.date)
    return records, left_out


def _asked(context: StageContext, batch: Sequence[Record]) -> Sequence[Record]:
    asked = context.asked_attributes
    return [{**each, "prompt": with_attributes(each["prompt"], asked, context.config.rank)} for each in batch] if asked else batch


def _answers(
    context: StageContext, records: Sequence[Record], given: Mapping[str, Record] | None, model: LazyModel
) -> dict[str, Any]:
    """given: answers by an engine, by the records' ids."""
    options, asked = context.options, context.asked_attributes
    chosen = chosen_layers(context.run.path, context.config.score.layer)

    def work(number: int, batch: Sequence[Record]) -> list[dict[str, Any]]:
        batch = _asked(context, batch)
        if given is not None:
            return measure_batch(model, batch, given, options=options, score=context.config.score, chosen=chosen)
        return answer_batch(model(), batch, options=options, score=context.config.score, chosen=chosen)

    title = f"evaluate {context.moment or ''}".strip()
    path = run_batches(context, "answers.jsonl", records, options.batch_size, work, title, opened=True)
    if not ranks.is_rank_0():
        return {}
    # With the formats that were asked for and have no prompt.
    wanted = (
        [name for name, count in options.per_format.items() if count]
        if not options.input and context.method.evaluation_prompts == "augmented"
        else []
    )
    named = {"asked": str(with_attributes("", asked, context.config.rank)).strip()} if asked else {}
    return {**accuracy_summary(list(read_jsonl(path)), wanted), "match": options.match, **named}


def _held_out(context: StageContext, model: LazyModel) -> dict[str, Any]:
    """Log-probabilities of the held-out pairs, and their figures against the base's."""

    def work(number: int, batch: Sequence[Record]) -> list[dict[str, Any]]:
        return [{"logps": logps} for logps in pair_logps(model(), batch, seed=context.seed)]

    missing: list[str] | None = [] if context.config.allow_missing else None
    records = read_pairs(context.held_out_pairs, missing)
    left_out = lost(len(records) + len(missing or ()), {"missing": len(missing or ())})
    path = run_batches(context, HELD_OUT, records, context.options.batch_size, work, f"held-out pairs {context.moment}")
    if not ranks.is_rank_0():
        return {}
    beta = float(preset_args(context.config).get("beta", 0.1))
    base = list(read_jsonl(_base_figures(context))) if context.moment == "after" else None
    return {"held_out": held_out_figures(list(read_jsonl(path)), base, beta=beta), "beta": beta, **left_out}


def _rewards(context: StageContext) -> dict[str, Any]:
    """Rewards of both responses of the held-out pairs, and how often the chosen one has the higher."""
    if not context.held_out_pairs.is_file():
        raise StageError(f"{context.held_out_pairs} does not exist: run pairs first, with pairs.held_out above 0")
    model = functools.cache(lambda: load_reward_model(context))

    def work(number: int, batch: Sequence[Record]) -> list[dict[str, Any]]:
        answers = [[response_text(record, name) for name in PAIR] for record in batch]
        return [{"rewards": dict(zip(PAIR, row, strict=True))} for row in model().rewards(batch, answers)]

    missing: list[str] | None = [] if context.config.allow_missing else None
    records = read_pairs(context.held_out_pairs, missing)
    left_out = lost(len(records) + len(missing or ()), {"missing": len(missing or ())})
    path = run_batches(context, REWARDS, records, context.options.batch_size, work, f"held-out pairs {context.moment}")
    if not ranks.is_rank_0():
        return {}
    figures = reward_figures(list(read_jsonl(path)))
    for each in figures.values():
        each["interval"] = _interval(Proportion(each["right"], each["pairs"]))
    return {"rewards": figures, **left_out}


def _has_prompts(context: StageContext) -> bool:
    """An evaluation of the user's own beside the run's is of what it was given alone."""
    asked = "answers" in context.method.measures and not context.own and context.evaluation_prompts.is_file()
    return bool(context.options.input) or asked


def _is_augmented(context: StageContext) -> bool:
    return context.method.evaluation_prompts == "augmented" and (not context.own or bool(context.options.input))


def _has_held_out(context: StageContext) -> bool:
    """An evaluation of the user's own beside the run's is of prompts only; pairs given to train come without held-out ones."""
    measured = "held_out" in context.method.measures and not context.own and not context.config.train.input
    return measured and context.held_out_pairs.is_file()


def _base_figures(context: StageContext) -> Path:
    return context.folder_of("evaluate", "before") / HELD_OUT


def answer_batch(
    loaded: LoadedModel,
    batch: Sequence[Mapping[str, Any]],
    *,
    options: Any,
    score: Any,
    chosen: Mapping[str, int] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """Greedy answers with `correct`, and where there is more than one picture the attention ratio on the target.

    options: an `EvaluateConfig`. score: a `ScoreConfig`, so that the ratios are those that selection looks at. chosen: the layers that stage
    score chose, see `resolve_layer`.
    """
    several = [record for record in batch if record["num_images"] > 1]
    layers, wanted = _recording(loaded, several, score, chosen)
    answers = generate_responses(loaded, batch, max_new_tokens=options.max_new_tokens, record=wanted if several else None)
    recorded = [answer.pop("recorded", None) for answer in answers]
    return [_judged(*each, layers, options, score) for each in zip(batch, answers, recorded, strict=True)]


def measure_batch(
    model: Callable[[], LoadedModel],
    batch: Sequence[Mapping[str, Any]],
    given: Mapping[str, Mapping[str, Any]],
    *,
    options: Any,
    score: Any,
    chosen: Mapping[str, int] = MappingProxyType({}),
) -> list[dict[str, Any]]:
    """`answer_batch` of answers that are there, by the records' ids: attention comes of a teacher-forced pass, if there is any to measure."""
    several = [record for record in batch if record["num_images"] > 1]
    layers: Mapping[str, int] = {}
    wanted: Mapping[str, Any] | None = None
    if several:
        layers, wanted = _recording(model(), several, score, chosen)
    answers = answered(model, batch, given, max_new_tokens=options.max_new_tokens, record=wanted)
    recorded = [answer.pop("recorded", None) for answer in answers]
    return [_judged(*each, layers, options, score) for each in zip(batch, answers, recorded, strict=True)]


def _recording(
    loaded: LoadedModel, records: Sequence[Mapping[str, Any]], score: Any, chosen: Mapping[str, int]
) -> tuple[dict[str, int], dict[str, Any]]:
    """The layer that each format goes by; and what is recorded: one layer, or where they go by different ones all, in the same pass."""
    layers = {name: resolve_layer(loaded.image_layers, score.layer, chosen, name) for name in {r["format"] for r in records}}
    layer = next(iter(layers.values())) if len(set(layers.values())) == 1 else "all"
    return layers, {**score.recording, "layer": layer}


def _judged(
    record: Mapping[str, Any],
    answer: Mapping[str, Any],
    recorded: Any,
    layers: Mapping[str, int],
    options: Any,
    score: Any,
) -> dict[str, Any]:
    """An answer with what is found of it: whether it is right, and its ratios."""
    correct = answers_match(answer["response"], record["answer"], options=record.get("options"), match=options.match)
    # The only picture of a single-image prompt has all the attention on pictures: nothing to measure.
    counts = record["num_images"] > 1
    ratios = ratios_at(record, recorded, score.statistic, layers[record["format"]]) if counts else {"ratio": None}
    return {**answer, "correct": correct, **ratios}


def accuracy_summary(answers: Sequence[Mapping[str, Any]], asked: Sequence[str] = ()) -> dict[str, Any]:
    """`accuracy`, `counts`, `intervals` (Wilson, 95 %) and `mean_ratio` by format; `by_images` by number of pictures too.

    asked: formats that are counted, with 0, though they have no answers.
    Answers with a `group`, a name of the prompts' own, count under it in place of their format.
    """
    groups: dict[str, list[Mapping[str, Any]]] = {name: [] for name in FORMATS}
    for answer in answers:
        groups.setdefault(answer.get("group") or answer["format"], []).append(answer)
    groups = {name: group for name, group in groups.items() if group}
    overall = {name: _proportion(group) for name, group in groups.items()}
    by_images: dict[str, dict[int, dict[str, Any]]] = {}
    for name, group in groups.items():
        for count in sorted({answer["num_images"] for answer in group}):
            share = _proportion([answer for answer in group if answer["num_images"] == count])
            by_images.setdefault(name, {})[count] = {"accuracy": share.value, "count": share.total, "interval": _interval(share)}
    return {
        "accuracy": {name: share.value for name, share in overall.items()},
        "counts": {**{name: share.total for name, share in overall.items()}, **{name: 0 for name in asked if name not in groups}},
        "intervals": {name: _interval(share) for name, share in overall.items()},
        "by_images": by_images,
        "mean_ratio": mean_ratios(answers),
    }


def _proportion(answers: Sequence[Mapping[str, Any]]) -> Proportion:
    return Proportion(sum(answer["correct"] for answer in answers), len(answers))


def _interval(share: Proportion) -> list[float]:
    return [share.low, share.high]
