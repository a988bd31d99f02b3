"""Evaluation, and the page."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from pydantic import StrictInt, StrictStr

from mmdpo_trainers.config.options import MATCH_WORDS, Count, Match, option
from mmdpo_trainers.config.sections.answers import changing_answers
from mmdpo_trainers.config.sections.rating import JudgeConfig, changing_judgements
from mmdpo_trainers.config.values import Finite, Settings


@dataclass(kw_only=True)
class EvaluateConfig(Settings):
    """Accuracy before and after training, by format."""

    input: StrictStr | None = option(
        None,
        "your own prompts with answers (.jsonl) in place of evaluate/prompts.jsonl; as a flag: an evaluation beside the run's",
        path=True,
    )
    source: StrictStr | None = option(
        None, "single-image data to make evaluation prompts from, as in data.source; None: data.source", path=True
    )
    image_folder: StrictStr | None = option(
        None, "folder that the picture paths of `source` are relative to; None: the folder `source` is in", path=True
    )
    per_format: dict[StrictStr, Count] = option(
        help="evaluation prompts of each format (sequence, grid, pip, single)",
        factory=lambda: {"sequence": 300, "grid": 300, "pip": 100, "single": 400},
        when="fewer for a first look; an accuracy of 500 prompts is known to about four points",
    )
    engine: Literal["transformers", "vllm"] = option(
        "transformers", "what answers: transformers, or vllm, after which attention is measured by a teacher-forced pass"
    )
    engine_args: Finite[dict[StrictStr, Any]] = option(
        help="`engine: vllm` only: arguments of vllm.LLM, as in generate.engine_args", factory=dict, result=changing_answers
    )
    batch_size: StrictInt = option(32, "prompts answered together", ge=1)
    max_new_tokens: StrictInt = option(
        16,
        "longest answer, in tokens",
        ge=1,
        when="as long as the answers of your data",
    )
    match: Match = option(
        "exact",
        f"how an answer is compared with the truth; {MATCH_WORDS}",
        when="exact for one-word answers, contains where a model answers in sentences",
    )
    benchmarks: dict[StrictStr, StrictStr] = option(
        help="published benchmarks before and after training, such as {pope: coco_pope_random.json, blink: BLINK.tsv}: name -> file or "
        "folder; as a flag: an evaluation beside the run's",
        factory=dict,
        path=True,
        result=sorted,
    )
    benchmark_images: dict[StrictStr, StrictStr] = option(
        help="benchmark -> folder that the picture paths in its files are relative to, where that is not the folder of the files",
        factory=dict,
        path=True,
        result=False,
    )
    benchmark_suffix: dict[StrictStr, StrictStr] = option(
        help="benchmark -> text behind each of its questions, in place of its own",
        factory=dict,
        when="what the model was trained to be asked with, such as {pope: ' Answer with yes or no.'}",
    )
    benchmark_tokens: StrictInt | None = option(
        None, "longest answer to a question of a benchmark, in tokens; None: what each benchmark says", ge=1
    )
    judge: JudgeConfig = option(
        help="who marks the answers to benchmarks that need a judge, such as {source: endpoint, endpoint: {url: …, model: …}}",
        factory=JudgeConfig,
        result=changing_judgements,
    )


@dataclass(kw_only=True)
class ReportConfig(Settings):
    """The HTML page."""

    title: StrictStr | None = option(None, "headline; None: the run's name")
    heat_maps: StrictInt = option(6, "prompts shown with attention maps before and after training", ge=0)
    batch_size: StrictInt = option(8, "prompts run together for the heat maps", ge=1)
    pairs: StrictInt = option(6, "example pairs shown", ge=0)
    seeds: list[StrictStr] = option(
        help="pages with a section `seeds`: folders of finished runs with other seeds, whose figures are shown beside this run's",
        factory=list,
        path=True,
    )
