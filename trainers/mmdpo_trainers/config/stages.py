"""The stages of runs, in order: what the pipeline and the command line have to know of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class StageKind:
    """What a stage is to a run. Its work is `mmdpo_trainers/stages/<name>.py`, its settings the section of its name."""

    about: str
    """What it does, one sentence: for `--help`."""
    examples: tuple[str, ...]
    """Commands, without the leading `mmdpo`."""
    model: bool = False
    """Whether its result depends on the model."""
    shared: bool = False
    """Whether all processes of a launch work on it; else the first one does everything."""
    arm: bool = False
    """Whether an arm has it for itself (of evaluate only `after`)."""
    also: tuple[str, ...] = ()
    """Sections of the configuration that its result depends on beside its own."""
    shown: tuple[str, ...] = ()
    """Files of its folder that the page is drawn from."""


STAGES: Mapping[str, StageKind] = MappingProxyType(
    {
        "augment": StageKind(
            about="Make multi-image prompts (sequence, grid collage, pic-in-pic) from single-image data.",
            examples=(
                "augment --run runs/mine --data llava_665k.json --image-folder images --model llava-1.5-7b-hf",
                "augment --run runs/mine --formats '{sequence: 0.5, grid: 0.5}' --num-prompts 20000",
            ),
            also=("data",),
        ),
        "generate": StageKind(
            about="Let the model answer the prompts.",
            examples=(
                "generate --run runs/mine --model llava-1.5-7b-hf --batch-size 32",
                "generate --run runs/mine --model llava-1.5-7b-hf --input my_prompts.jsonl",
            ),
            model=True,
            shared=True,
        ),
        "rate": StageKind(
            about="Rate the answers: by the truth, a file, a judge behind an endpoint or a local model.",
            examples=(
                "rate --run runs/mine --source endpoint --endpoint '{url: http://localhost:8000/v1, model: my-judge}'",
                "rate --run runs/mine --source model --judge llava-1.5-13b-hf --facts '[answer]'",
                "rate --run runs/mine --source file --file my_ratings.jsonl --input my_responses.jsonl",
            ),
            shared=True,
            shown=("ratings.jsonl",),
        ),
        "score": StageKind(
            about="Measure how much attention each answer pays to the asked-about picture.",
            examples=(
                "score --run runs/mine --model llava-1.5-7b-hf --layer 16",
                "score --run runs/mine --model llava-1.5-7b-hf --layer best   # the one that tells right answers from wrong ones",
            ),
            model=True,
            shared=True,
            shown=("scores.jsonl", "layers.json"),
        ),
        "select": StageKind(
            about="Keep the wrong answers that looked at the wrong picture, as rejected answers of preference pairs.",
            examples=(
                "select --run runs/mine --preset official_code",
                "select --run runs/mine --thresholds '{sequence: {2: 0.6, 3: 0.5}}'",
                "select --run runs/mine --quantile 0.3",
            ),
            arm=True,
            shown=("pairs.jsonl", "dropped.jsonl"),
        ),
        "rank": StageKind(
            about="Make preference pairs, or records of the best answers, out of rated answers.",
            examples=(
                "rank --run runs/mine --min-gap 2",
                "rank --run runs/mine --input my_ratings.jsonl --weights '{helpfulness: 1, correctness: 1}'",
            ),
            arm=True,
            shown=("pairs.jsonl",),
        ),
        "pairs": StageKind(
            about="Take preference pairs that exist already, and hold some out for evaluation.",
            examples=(
                "pairs --run runs/mine --source my_pairs.jsonl --held-out 0.05",
                "pairs --run runs/shapes --source shapes_prior --pictures 400",
            ),
            shown=("pairs.jsonl",),
        ),
        "hallucinate": StageKind(
            about="Let the model make wrong answers of true ones, with part of the pictures hidden, as rejected answers.",
            examples=(
                "hallucinate --run runs/mine --model llava-v1.6-vicuna-7b-hf --embedding all-mpnet-base-v2",
                "hallucinate --run runs/mine --model llava-v1.6-vicuna-7b-hf --input my_prompts_with_answers.jsonl",
            ),
            model=True,
            shared=True,
            arm=True,
            shown=("answers.jsonl", "summary.json"),
        ),
        "train": StageKind(
            about="Train on the preference pairs.",
            examples=(
                "train --run runs/mine --model llava-1.5-7b-hf --args '{learning_rate: 5e-5, num_train_epochs: 1}'",
                "train --run runs/mine --model llava-1.5-7b-hf --input my_pairs.jsonl",
            ),
            model=True,
            shared=True,
            arm=True,
            shown=("log.jsonl", "online.jsonl"),
        ),
        "evaluate": StageKind(
            about="Measure accuracy by format, before or after training.",
            examples=(
                "evaluate --run runs/mine --moment before",
                "evaluate --run runs/mine --moment after --input my_questions.jsonl   # to evaluate/own/my_questions-after",
                "evaluate --run runs/mine --moment after --benchmarks '{blink: BLINK.tsv}'   # to evaluate/own/benchmarks-after",
                "evaluate --adapter my-adapter --model llava-1.5-7b-hf --input my_questions.jsonl   # without a run, beside its base",
            ),
            model=True,
            shared=True,
            arm=True,
            also=("score",),
            shown=("answers.jsonl", "held_out.jsonl", "rewards.jsonl", "benchmarks.json"),
        ),
        "report": StageKind(
            about="Write report.html, one self-contained page about the run.",
            examples=("report --run runs/mine",),
            model=True,
        ),
    }
)
"""Name -> stage. A method's stages come in this order."""


def stage_folders(arms: Sequence[str]) -> dict[str, str]:
    """Folders of a run's stages in order, those of the arms after the main one's -> the stage: `score`, `evaluate/before`, `arms/sft/train`."""
    main = {folder: stage for stage in STAGES for folder in _folders(stage, "before", "after")}
    own = {folder: stage for stage, kind in STAGES.items() if kind.arm for folder in _folders(stage, "after")}
    return main | {f"arms/{arm}/{folder}": stage for arm in arms for folder, stage in own.items()}


def _folders(stage: str, *moments: str) -> list[str]:
    return [f"{stage}/{moment}" for moment in moments] if stage == "evaluate" else [stage]
