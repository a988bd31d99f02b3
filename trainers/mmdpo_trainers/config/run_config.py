"""What a run is made with: one keyword-only dataclass per stage, read from YAML. The flags of `mmdpo` come from them too."""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

from pydantic import StrictBool, StrictInt, StrictStr

from mmdpo_trainers.config.options import option
from mmdpo_trainers.config.sections.answers import GenerateConfig, ScoreConfig
from mmdpo_trainers.config.sections.data import AugmentConfig, DataConfig, PairsConfig
from mmdpo_trainers.config.sections.evaluation import EvaluateConfig, ReportConfig
from mmdpo_trainers.config.sections.hallucination import HallucinateConfig
from mmdpo_trainers.config.sections.online import OnlineConfig
from mmdpo_trainers.config.sections.quantization import QuantizationConfig
from mmdpo_trainers.config.sections.ranking import RankConfig
from mmdpo_trainers.config.sections.rating import RateConfig
from mmdpo_trainers.config.sections.selection import SelectConfig
from mmdpo_trainers.config.sections.training import TrainConfig
from mmdpo_trainers.config.shipped import SHIPPED, config_file
from mmdpo_trainers.config.values import FILL_IN, Finite, Settings, flat, read_yaml, validated
from mmdpo_trainers.errors import ConfigError


@dataclass(kw_only=True)
class RunConfig(Settings):
    """A whole run."""

    name: StrictStr = option("run", "name of the run; its folder is runs/<name> unless run_dir is given")
    run_dir: StrictStr | None = option(None, "the run folder", result=False)
    model: StrictStr = option(
        "shapes",
        "Hugging Face folder of a supported model; its id on the hub, taken from the local cache or else downloaded; or a small one shipped "
        "here: `shapes`, `shapes_prior`, `shapes_looking`",
    )
    revision: StrictStr | None = option(
        None, "of a model that is given by its id on the hub: branch, tag or commit; None: main, as the local cache has it"
    )
    method: StrictStr = option("mia_dpo", "the method by name, or a .py file that declares one of your own")
    seed: StrictInt = option(
        0,
        "seed of every random choice",
        ge=0,
        lt=2**32,
        when="another seed tells how much of a result is chance",
    )
    threads: StrictInt | None = option(None, "CPU threads of PyTorch; None: PyTorch's own default", result=False, ge=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "number type the model is loaded in",
        when="bfloat16 halves the memory of a checkpoint in float32; in float16, steps lose small gradients",
    )
    quantization: QuantizationConfig = option(
        help="the model's weights in 4 bits (QLoRA), such as {load_in_4bit: true}", factory=QuantizationConfig
    )
    chat_template_kwargs: Finite[dict[StrictStr, Any]] = option(
        help="arguments of the model's chat template, such as {enable_thinking: false}; a record's own of that name win",
        factory=dict,
    )
    device: StrictStr | None = option(None, "cpu, cuda, cuda:1, ...; None: cuda if there is one")
    allow_missing: StrictBool = option(
        False,
        "go on where over half of the records are lost, or where prompts or pairs lack their pictures: these are left out",
        result=False,
    )
    data: DataConfig = option(help="source data", factory=DataConfig)
    augment: AugmentConfig = option(help="multi-image prompts", factory=AugmentConfig)
    generate: GenerateConfig = option(help="the model's answers", factory=GenerateConfig)
    score: ScoreConfig = option(help="attention ratios", factory=ScoreConfig)
    rate: RateConfig = option(help="ratings of answers", factory=RateConfig)
    select: SelectConfig = option(help="preference pairs", factory=SelectConfig)
    rank: RankConfig = option(help="rated answers that are trained on", factory=RankConfig)
    pairs: PairsConfig = option(help="preference pairs that exist already", factory=PairsConfig)
    hallucinate: HallucinateConfig = option(help="wrong answers made of true ones", factory=HallucinateConfig)
    online: OnlineConfig = option(help="answers sampled in training", factory=OnlineConfig)
    train: TrainConfig = option(help="training", factory=TrainConfig)
    evaluate: EvaluateConfig = option(help="accuracy", factory=EvaluateConfig)
    report: ReportConfig = option(help="the page", factory=ReportConfig)
    arms: Finite[dict[StrictStr, dict[StrictStr, Any]]] = option(
        help="control experiments: name -> overrides of `select`, `rank` and `train`; they share everything before", factory=dict
    )

    def __post_init__(self) -> None:
        for name in self.arms:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ConfigError(f"arms: {name!r} becomes a folder name: letters, digits, _ and - only")
            self.for_arm(name)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> RunConfig:
        """Read a YAML file, or a shipped one by its name. Raises ConfigError naming the file, the key and the nearest valid key, or the
        type expected."""
        return cls.from_dict(read_yaml(config_file(path)), where=str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "configuration") -> RunConfig:
        """The same from a nested dict; `where` opens the error messages."""
        missing = [key for key, value in flat(values) if value == FILL_IN]
        if missing:
            raise ConfigError(
                f"{where}: {', '.join(missing)}: expected a value of yours in place of {FILL_IN}; the comment there says which"
            )
        return validated(cls, values, where=where)

    def to_dict(self) -> dict[str, Any]:
        """Nested dict that `from_dict` reads back."""
        return dataclasses.asdict(self)

    def with_absolute_paths(self) -> RunConfig:
        """The same with data files and folders as absolute paths, so that what is saved holds from any working directory."""
        values = _absolute(self.to_dict())
        values["arms"] = {name: _absolute(overrides) for name, overrides in values["arms"].items()}
        return RunConfig.from_dict(values)

    @property
    def holds_out(self) -> bool:
        """Whether pictures for evaluation are taken out of the training data, because evaluation has no data of its own."""
        return self.data.source not in SHIPPED and not self.evaluate.input and not self.evaluate.source

    @property
    def run_path(self) -> Path:
        """The run folder."""
        return Path(self.run_dir or Path("runs") / self.name)

    @property
    def every_arm(self) -> list[RunConfig]:
        """This configuration, which is the main arm's, and those of the others."""
        return [self, *map(self.for_arm, self.arms)]

    def for_arm(self, arm: str | None) -> RunConfig:
        """The configuration of an arm: this one with the arm's overrides, merged key by key. None: the main arm, itself."""
        if arm is None:
            return self
        if arm not in self.arms:
            raise ConfigError(f"there is no arm {arm!r}; this run has {', '.join(self.arms) or 'none'}")
        values = merge(self.to_dict(), self.arms[arm])
        values["arms"] = {}
        return validated(RunConfig, values, where=f"arms.{arm}")


def _absolute(values: dict[str, Any]) -> dict[str, Any]:
    absolute = dict(values)
    for section, hint in get_type_hints(RunConfig).items():
        if dataclasses.is_dataclass(hint) and values.get(section):
            absolute[section] = _absolute_section(hint, values[section])
    if values.get("method", "").endswith(".py"):
        absolute["method"] = _placed(values["method"])
    # What is no folder may be a name on a hub, which the error about it is to repeat as it was given.
    if values.get("model", "shapes") not in SHIPPED and Path(values["model"]).expanduser().is_dir():
        absolute["model"] = _placed(values["model"])
    return absolute


def _absolute_section(section: Any, values: dict[str, Any]) -> dict[str, Any]:
    """The values of a section, and of those in it, with absolute paths."""
    hints, absolute = get_type_hints(section), dict(values)
    for each in dataclasses.fields(section):
        value = values.get(each.name)
        if each.metadata["path"]:
            absolute[each.name] = _placed(value)
        elif dataclasses.is_dataclass(hints[each.name]) and isinstance(value, dict):
            absolute[each.name] = _absolute_section(hints[each.name], value)
    return {name: value for name, value in absolute.items() if name in values}


def _placed(path: Any) -> Any:
    """A path, or a list or a mapping to them, as absolute ones; names of what is shipped stay."""
    if isinstance(path, list):
        return [_placed(each) for each in path]
    if isinstance(path, dict):
        return {name: _placed(each) for name, each in path.items()}
    return str(Path(path).expanduser().absolute()) if path and path not in SHIPPED else path


def merge(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`values` with `overrides` laid over it, mapping by mapping."""
    merged = dict(values)
    for key, value in overrides.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
