"""What a stage knows: the settings, the run folder, and where the files are that it reads and writes."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.stages import STAGES
from mmdpo_trainers.data.pair_records import IMAGES, corrupted_view, is_corrupted, own_column
from mmdpo_trainers.data.records import Moment
from mmdpo_trainers.errors import ConfigError, StageError
from mmdpo_trainers.files.fingerprint import content_hash
from mmdpo_trainers.methods import Method, method_named, preset_args
from mmdpo_trainers.methods.ranking import asked_values
from mmdpo_trainers.models.hub import MAIN, commit_of, is_hub_id, resolve_model_path
from mmdpo_trainers.models.template_date import TemplateDate
from mmdpo_trainers.processes import ranks
from mmdpo_trainers.processes.progress import Progress
from mmdpo_trainers.stages.folder import RunFolder


class StageModule(Protocol):
    """What the pipeline asks of a stage's module."""

    def inputs(self, context: StageContext) -> list[Path]: ...

    def run(self, context: StageContext) -> dict[str, Any]: ...


@dataclass(kw_only=True)
class StageContext:
    """All a stage knows. `config` already holds the arm's overrides."""

    run: RunFolder
    config: RunConfig
    stage: str
    moment: Moment | None = None
    """evaluate only: the model before or after training."""
    arm: str | None = None
    own: str | None = None
    """evaluate only: name of an evaluation beside the run's, on prompts of the user's own."""
    adapter: Path | None = None
    """evaluate only: what is evaluated in place of what the run trained."""
    progress: Progress = field(default_factory=Progress)

    @property
    def name(self) -> str:
        """Path of this stage in the run folder: `score`, `evaluate/before`, `evaluate/own/mine-before`, `arms/<arm>/train`."""
        name = f"{self.stage}/{self.moment}" if self.moment else self.stage
        if self.own:
            name = f"{self.stage}/own/{self.own}-{self.moment}"
        return f"arms/{self.arm}/{name}" if self._belongs_to_arm(self.stage, self.moment) else name

    @property
    def folder(self) -> Path:
        """The folder this stage writes to, created if need be."""
        return self.run.folder(self.name)

    @property
    def options(self) -> Any:
        """This stage's own part of the configuration."""
        return getattr(self.config, self.stage)

    @property
    def device(self) -> str:
        """Where this process puts a model: the configured device, or with several processes each its own GPU."""
        chosen = self.config.device
        if ranks.is_distributed() and chosen not in (None, "auto", "cpu", "cuda"):
            raise ConfigError(
                f"device: {chosen} would be shared by {ranks.world_size()} processes; leave it out, and each takes the GPU of its number"
            )
        return ranks.device() if chosen in (None, "auto") or (chosen == "cuda" and ranks.is_distributed()) else str(chosen)

    @property
    def method(self) -> Method:
        """What the run does."""
        return method_named(self.config.method)

    @property
    def rewards(self) -> bool:
        """Whether what is trained is a reward model, which is evaluated on held-out pairs alone."""
        return "rewards" in self.method.measures

    @property
    def seed(self) -> int:
        return self.config.seed

    @property
    def date(self) -> TemplateDate:
        """What the chat template is told in all of the run: the date, where it prints one, and its arguments."""
        return TemplateDate.read(self.run.date()).with_arguments(self.config.chat_template_kwargs)

    @property
    def model(self) -> Path:
        """Local folder of the base model; of one that is given by its id on the hub, the commit that the run began with."""
        model, revision = self.config.model, self.config.revision
        return resolve_model_path(model, self.run.commit(model, revision or MAIN) or revision)

    @property
    def model_mark(self) -> str:
        """What tells the base model from any other: its id and commit, or a hash of its folder."""
        if is_hub_id(self.config.model):
            return f"{self.config.model}@{commit_of(self.model)}"
        return content_hash(self.model)

    def keep_commit(self) -> None:
        """Write into the run folder which commit the id of a model on the hub stands for, there and then."""
        if is_hub_id(self.config.model):
            self.run.keep_commit(self.config.model, self.config.revision or MAIN, str(commit_of(self.model)))

    def folder_of(self, stage: str, moment: Moment | None = None) -> Path:
        """Where a stage of the same arm keeps its files; stages that arms share are those of the run."""
        path = f"{stage}/{moment}" if moment else stage
        return self.run.path / (f"arms/{self.arm}/{path}" if self._belongs_to_arm(stage, moment) else path)

    def _belongs_to_arm(self, stage: str, moment: Moment | None) -> bool:
        if stage == "evaluate":
            return self.arm is not None and moment == "after"
        return self.arm is not None and STAGES[stage].arm

    def _input(self, override: str | None, default: Path) -> Path:
        return Path(override) if override else default

    @property
    def prompts(self) -> Path:
        """What generate reads."""
        return self._input(self.config.generate.input, self.folder_of("augment") / "prompts.jsonl")

    @property
    def responses(self) -> Path:
        """What score reads."""
        return self._input(self.config.score.input, self.folder_of("generate") / "responses.jsonl")

    @property
    def to_rate(self) -> Path:
        """What rate reads: the answers that the method's later stages are given."""
        given = (getattr(self.config, stage).input for stage in ("rate", "select", "score") if stage in self.method.stages)
        return self._input(next(filter(None, given), None), self.folder_of("generate") / "responses.jsonl")

    @property
    def judged(self) -> Path:
        """What rate writes."""
        return self.folder_of("rate") / "ratings.jsonl"

    @property
    def scores(self) -> Path:
        """What select reads."""
        return self._input(self.config.select.input, self.folder_of("score") / "scores.jsonl")

    @property
    def true_answers(self) -> Path:
        """What hallucinate reads."""
        return self._input(self.config.hallucinate.input, self.run.path / "pairs" / "pairs.jsonl")

    @property
    def ratings(self) -> Path:
        """What rank reads."""
        return self._input(self.config.rank.input, self.folder_of("rate") / "ratings.jsonl")

    @property
    def asked_attributes(self) -> dict[str, float]:
        """evaluate only: attributes that a prompt names beside its question, of a model that was trained on prompts with them."""
        trained = self.moment == "after" and "rank" in self.method.stages and self.config.rank.make == "attributes"
        return asked_values(self.config.rank, self.config.rate) if trained else {}

    @property
    def pairs(self) -> Path:
        """What train reads."""
        return self._input(self.config.train.input, self.folder_of(self.method.pairs_stage) / "pairs.jsonl")

    @property
    def further_views(self) -> tuple[str, ...]:
        """Columns of the pairs that hold images beside `images` and `rejected_images`, for branches and corrupted views of this run's arms."""
        configs = [self.config, *map(self.config.for_arm, self.config.arms)]
        settings = [preset_args(each) for each in configs]
        declared = [each.get("further_branches") for each in settings]
        lists = [each.get("corruptions") for each in settings]
        most = max(len(each) if isinstance(each, list) else 1 for each in lists)
        own = [own_column(corrupted_view(number)) for number in range(2, most + 1)]
        # What declares no branch is refused when the trainer's settings are made.
        branches = [branch for each in declared if isinstance(each, dict) for branch in each.values()]
        views = [branch[0] for branch in branches if isinstance(branch, list | tuple) and len(branch) == 2]
        return tuple(dict.fromkeys([*(view for view in views if view != IMAGES and not is_corrupted(str(view))), *own]))

    @property
    def held_out_pairs(self) -> Path:
        """Pairs that stage pairs keeps from training, for evaluation."""
        return self.run.path / "pairs" / "held_out.jsonl"

    @property
    def main_pairs(self) -> Path:
        """The main arm's pairs, whose numbers per format a control arm matches."""
        return self.run.path / "select" / "pairs.jsonl"

    @property
    def evaluation_prompts(self) -> Path:
        """What evaluate reads where it is not the user's own: `prompts.build_evaluation_prompts` makes it, or stage pairs."""
        made_by = "pairs" if self.method.evaluation_prompts == "pairs" else "evaluate"
        return self._input(self.config.evaluate.input, self.run.path / made_by / "prompts.jsonl")

    @property
    def trained(self) -> Path:
        """What train leaves: a PEFT adapter folder or a whole model."""
        return self.adapter or self.folder_of("train") / "final"


def stage_module(stage: str) -> StageModule:
    """The module of a stage, imported now."""
    if stage not in STAGES:
        raise StageError(f"there is no stage {stage!r}; the stages are {', '.join(STAGES)}")
    return cast(StageModule, importlib.import_module(f"mmdpo_trainers.stages.{stage}"))
