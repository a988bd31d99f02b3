"""What a method declares: the one type that runs, stages, pages and tables ask. It is all they know of a method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal


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
    arm_sections: tuple[str, ...] = ("train",)
    """Sections of the configuration that an arm may override: `train`, and `select` where there is that stage."""
    presets: Mapping[str, Mapping[str, Any]]
    """Name -> fields of PreferenceConfig that a paper or its released code trains with. The first is taken where a run names none."""
    evaluation_prompts: Literal["augmented", "pairs"]
    """augmented: multi-image prompts, made as augment makes them, each answer with its attention ratio; pairs: what stage pairs wrote."""
    measures: tuple[str, ...] = ("answers",)
    """What evaluate measures: `answers` to the evaluation prompts, `held_out` log-probabilities of pairs that were not trained on."""
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
    file: Path | None = None
    """Where the declaration is, if that is a file of the user's own."""

    @property
    def default_preset(self) -> str:
        """The preset of a run that names none."""
        return next(iter(self.presets))

    @property
    def pairs_stage(self) -> str:
        """The stage that writes the pairs which train reads."""
        return self.stages[self.stages.index("train") - 1]

    def name_of(self, arm: str) -> str:
        """An arm's name for readers."""
        return self.title if arm == self.name else self.arm_names.get(arm, arm.replace("_", " "))
