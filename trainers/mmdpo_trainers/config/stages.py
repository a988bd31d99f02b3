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
        "score": StageKind(
            about="Measure how much attention each answer pays to the asked-about picture.",
            examples=("score --run runs/mine --model llava-1.5-7b-hf --layer 16",),
            model=True,
            shared=True,
        ),
        "select": StageKind(
            about="Keep the wrong answers that looked at the wrong picture, as rejected answers of preference pairs.",
            examples=(
                "select --run runs/mine --preset official_code",
                "select --run runs/mine --thresholds '{sequence: {2: 0.6, 3: 0.5}}'",
            ),
            arm=True,
        ),
        "pairs": StageKind(
            about="Take preference pairs that exist already, and hold some out for evaluation.",
            examples=(
                "pairs --run runs/mine --source my_pairs.jsonl --held-out 0.05",
                "pairs --run runs/shapes --source shapes_prior --pictures 400",
            ),
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
        ),
        "evaluate": StageKind(
            about="Measure accuracy by format, before or after training.",
            examples=(
                "evaluate --run runs/mine --moment before",
                "evaluate --run runs/mine --moment after --input my_questions.jsonl   # to evaluate/own/my_questions-after",
            ),
            model=True,
            shared=True,
            arm=True,
            also=("score",),
        ),
        "report": StageKind(
            about="Write report.html, one self-contained page about the run.",
            examples=("report --run runs/mine",),
            model=True,
        ),
    }
)
"""Name -> stage. A method's stages come in this order."""


def stage_folders(arms: Sequence[str]) -> list[str]:
    """Folders of a run's stages in order, those of the arms after the main one's: `score`, `evaluate/before`, `arms/sft/train`."""
    main = [folder for stage in STAGES for folder in _folders(stage, "before", "after")]
    own = [folder for stage, kind in STAGES.items() if kind.arm for folder in _folders(stage, "after")]
    return [*main, *(f"arms/{arm}/{folder}" for arm in arms for folder in own)]


def _folders(stage: str, *moments: str) -> list[str]:
    return [f"{stage}/{moment}" for moment in moments] if stage == "evaluate" else [stage]
