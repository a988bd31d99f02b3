"""What a method declares: the one type that runs, stages, pages and tables ask. It is all they know of a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mmdpo_trainers.config.run_config import RunConfig


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way from data to a trained model. A file in `methods/`, or one of the user's own, holds one as `METHOD`."""

    name: str
    """What `method:` of a configuration says, and what the main arm is called beside the others."""
    title: str
    """What readers call it."""
    about: str
    """What it does, in a few words: for `--help`."""
    stages: tuple[str, ...]
    """Stages of a run in order, of `config.stages.STAGES`; the one before train writes the pairs that are trained on."""
    optional: Mapping[str, Callable[[RunConfig], bool]] = field(default_factory=dict)
    """Those of the stages that are not of every run -> whether a run with this configuration has it. None of them makes the pairs."""
    arm_sections: tuple[str, ...] = ("train",)
    """Sections of the configuration that an arm may override: `train`, and `select` where there is that stage."""
    trainer: Literal["preference", "reward_model"] = "preference"
    """What train trains with, of `training.trainers.TRAINERS`."""
    presets: Mapping[str, Mapping[str, Any]]
    """Name -> fields of the trainer's configuration (PreferenceConfig) that a paper or its released code trains with, and under `online`
    values of that section. The first is taken where a run names none."""
    evaluation_prompts: Literal["augmented", "pairs"]
    """augmented: multi-image prompts, made as augment makes them, each answer with its attention ratio; pairs: what stage pairs wrote."""
    measures: tuple[str, ...] = ("answers",)
    """What evaluate measures: `answers` to the evaluation prompts; of pairs that were not trained on `held_out`, their log-probabilities, or
    `rewards`, what a reward model gives them."""
    summary: Callable[[Path, Sequence[str]], dict[str, Any]]
    """(run folder, arms) -> what the run's summary.json says of the method's stages, from those that are done."""
    tables: tuple[str, ...]
    """Tables that a run ends with, of `run.tables.TABLES`."""
    page: tuple[str, ...]
    """Sections of the page in order, of `report.sections.SECTIONS`."""
    arm_names: Mapping[str, str] = field(default_factory=dict)
    """Arm -> what readers call it; any other arm is its own name."""
    baseline: str | None = None
    """Arm that the page's headline compares the main one with, where a run has it."""
    example: str | None = None
    """Shipped configuration of a real model, which `mmdpo init` takes values of data, answers and evaluation from."""
    file: Path | None = None
    """Where the declaration is, if that is a file of the user's own."""

    @property
    def default_preset(self) -> str:
        """The preset of a run that names none."""
        return next(iter(self.presets))

    def stages_of(self, config: RunConfig) -> tuple[str, ...]:
        """The stages of a run with this configuration."""
        return tuple(stage for stage in self.stages if stage not in self.optional or self.optional[stage](config))

    @property
    def pairs_stage(self) -> str:
        """The stage that writes the pairs which train reads."""
        return self.stages[self.stages.index("train") - 1]

    def name_of(self, arm: str) -> str:
        """An arm's name for readers."""
        return self.title if arm == self.name else self.arm_names.get(arm, arm.replace("_", " "))
