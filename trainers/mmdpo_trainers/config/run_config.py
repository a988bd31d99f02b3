"""What a run is made with: one keyword-only dataclass per stage, read from YAML. The flags of `mmdpo` come from them too."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr

from mmdpo_trainers.config.shipped import SHIPPED
from mmdpo_trainers.config.values import Finite, Settings, read_yaml, validated
from mmdpo_trainers.errors import ConfigError


def option(
    default: Any = dataclasses.MISSING,
    help: str = "",
    *,
    factory: Any = dataclasses.MISSING,
    result: bool | Callable[[Any], Any] = True,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    lt: float | None = None,
) -> Any:
    """A dataclass field with its help text. result=False: it cannot change what a stage writes, so fingerprints leave it out;
    a function gives what of its value can. ge to lt are pydantic's limits of a number."""
    metadata = {"description": help, "result": result, "ge": ge, "gt": gt, "le": le, "lt": lt}
    if factory is not dataclasses.MISSING:
        return field(default_factory=factory, metadata=metadata)
    return field(default=default, metadata=metadata)


Count = Annotated[StrictInt, Field(ge=0)]
"""A number of things, in a mapping, which an option's own limits do not reach into."""

Match = Literal["exact", "contains", "choice"]
"""How an answer is compared with the truth, see `data.match.is_right`."""

_MATCH = (
    "exact: the same text but for case, punctuation and article, or the same option; choice: also the only option named in a sentence; "
    "contains: choice where there are options, else the truth's words in a sentence, unless negated"
)


@dataclass(kw_only=True)
class DataConfig(Settings):
    """The single-image data that `augment` starts from."""

    source: StrictStr = option(
        "shapes",
        "LLaVA .json/.jsonl, a `datasets` folder, parquet or JSON with TRL's columns, or `shapes` (the built-in world)",
    )
    image_folder: StrictStr | None = option(None, "folder that the records' picture paths are relative to; no path may leave it")
    limit: StrictInt | None = option(None, "use at most this many source records, from the start of the file; None: all", ge=1)
    max_pixels: StrictInt = option(
        64_000_000,
        "pictures with more pixels than this are reported, not opened; later stages open none above the default",
        ge=1,
        le=64_000_000,
    )
    holdout: StrictFloat = option(
        0.1, "share of the pictures kept for evaluation if evaluate.source is None (`shapes` draws new ones)", ge=0, lt=1
    )
    pictures: StrictInt = option(2000, "`source: shapes` only: number of pictures to draw", ge=1)
    questions_per_picture: StrictInt = option(3, "`source: shapes` only: questions asked about each picture", ge=1)
    wrong_answers: StrictFloat = option(
        0.0, "`source: shapes` only: share of the records whose answer is wrong, as in real data; evaluation has none", ge=0, lt=1
    )

    def __post_init__(self) -> None:
        if self.wrong_answers and self.source != "shapes":
            raise ConfigError(
                f"data.wrong_answers is for data.source: shapes alone, got {self.wrong_answers} with {self.source}; set it to 0"
            )


@dataclass(kw_only=True)
class AugmentConfig(Settings):
    """Single-image records to multi-image prompts (MIA-DPO): which formats, how many, how they look."""

    formats: dict[StrictStr, StrictFloat] = option(
        help="share of each format (sequence, grid, pip, single); normalised to sum 1",
        factory=lambda: {"sequence": 0.5, "grid": 0.3, "pip": 0.2},
    )
    per_record: StrictFloat = option(1.0, "prompts made from each source record, if num_prompts is None", gt=0)
    num_prompts: StrictInt | None = option(
        None, "number of prompts to make; above the number of records, records are used again", ge=1
    )
    num_images: dict[StrictStr, dict[StrictInt, StrictFloat]] = option(
        help="for `sequence` (2-5) and `grid` (2, 3, 4, 6, 9): number of pictures -> share",
        factory=lambda: {
            "sequence": {2: 0.25, 3: 0.25, 4: 0.25, 5: 0.25},
            "grid": {2: 0.2, 3: 0.2, 4: 0.2, 6: 0.2, 9: 0.2},
        },
    )
    cell_size: StrictInt = option(448, "grid: side of a cell, in pixels", ge=1)
    margin: StrictInt = option(40, "grid: white margin around a cell, in pixels; labels are written in it", ge=0)
    label: StrictBool = option(True, "grid: write `Image{k}` above each cell")
    square: StrictBool = option(True, "grid and pip: pad with white to a square, because CLIP processors crop the centre")
    max_fraction: StrictFloat = option(
        0.7, "pip: the pasted picture is at most this share of the host's width and height", gt=0, le=1
    )
    pip_openings: list[StrictStr] | None = option(None, "pip: phrases a prompt may open with; None: the built-in list")
    patch_grid: tuple[StrictInt, StrictInt] | None = option(None, "patch rows and columns of one picture; None: from the model")


_HOW_VLLM_RUNS = frozenset(
    {
        *(
            "gpu_memory_utilization",
            "max_model_len",
            "max_num_seqs",
            "max_num_batched_tokens",
            "kv_cache_memory_bytes",
            "block_size",
        ),
        *("tensor_parallel_size", "pipeline_parallel_size", "distributed_executor_backend", "disable_custom_all_reduce"),
        *("enforce_eager", "compilation_config", "enable_prefix_caching", "enable_chunked_prefill", "num_gpu_blocks_override"),
        *(
            "swap_space",
            "cpu_offload_gb",
            "max_parallel_loading_workers",
            "mm_processor_cache_gb",
            "disable_log_stats",
            "use_tqdm_on_load",
        ),
    }
)
"""Arguments of vllm.LLM for memory, speed and lengths. An answer that max_model_len would cut is an error."""


def _changing_answers(arguments: dict[str, Any]) -> dict[str, Any]:
    """Those arguments of vllm.LLM that may change answers: all that are not known to leave them alone, such as quantization."""
    return {name: value for name, value in arguments.items() if name not in _HOW_VLLM_RUNS}


@dataclass(kw_only=True)
class GenerateConfig(Settings):
    """The model's own answers to the prompts."""

    input: StrictStr | None = option(None, "your own prompts .jsonl in place of augment/prompts.jsonl")
    # Not chosen by what is installed: one configuration means one way to its answers on every machine.
    engine: Literal["transformers", "vllm"] = option(
        "transformers", "what generates: transformers, or vllm, which is faster and leaves attention to be measured by score"
    )
    engine_args: Finite[dict[StrictStr, Any]] = option(
        help="`engine: vllm` only: arguments of vllm.LLM, such as gpu_memory_utilization, max_model_len",
        factory=dict,
        result=_changing_answers,
    )
    batch_size: StrictInt = option(16, "prompts generated together", ge=1)
    max_new_tokens: StrictInt = option(64, "longest answer, in tokens", ge=1)
    do_sample: StrictBool = option(False, "sample the answers; False: greedy")
    temperature: StrictFloat = option(1.0, "sampling temperature", gt=0)
    top_p: StrictFloat = option(1.0, "nucleus sampling: smallest set of tokens with this probability", gt=0, le=1)
    noise: Literal["none", "paper", "official_code"] = option(
        "none", "noise on the pictures the answers are given to; training sees clean ones"
    )
    record_attention: StrictBool = option(
        True,
        "`engine: transformers` only: record attention ratios while generating (with noise: on the noisy pictures, as MIA-DPO's "
        "code), so that score needs no pass",
    )


@dataclass(kw_only=True)
class ScoreConfig(Settings):
    """Attention ratio of each answer: how much of the attention on pictures goes to the asked-about one."""

    input: StrictStr | None = option(None, "your own responses .jsonl in place of generate/responses.jsonl")
    batch_size: StrictInt = option(16, "prompts scored together", ge=1)
    layer: StrictInt | None = option(None, "decoder layer, 0-based; None: the middle one (16 of 32)", ge=0)
    statistic: Literal["mass", "mean"] = option("mass", "attention summed over a picture's tokens, or averaged (official code)")
    regions: Literal["box", "official_code"] = option("box", "grid and pip: the exact box, or the official code's rectangle")
    drop_first_row: StrictBool = option(
        False, "leave out the row that predicts the first answer token, as the official code does"
    )

    @property
    def recording(self) -> dict[str, Any]:
        """What recorded attention depends on; `statistic` is applied afterwards."""
        return {"layer": self.layer, "regions": self.regions, "drop_first_row": self.drop_first_row}


@dataclass(kw_only=True)
class SelectConfig(Settings):
    """Which answers become rejected answers."""

    input: StrictStr | None = option(None, "your own scores .jsonl in place of score/scores.jsonl")
    preset: Literal["paper", "official_code", "custom"] = option("paper", "threshold table; custom: `thresholds` alone")
    rule: Literal["attention", "random_wrong", "perplexity"] = option(
        "attention", "attention: MIA-DPO; the others are control arms with the attention arm's number of pairs per format"
    )
    match: Match | Literal["preset"] = option(
        "preset",
        "how an answer is compared with the truth: one that is right, or of which nobody can tell, is never rejected; preset: contains "
        f"(paper, custom), exact (official_code); {_MATCH}",
    )
    thresholds: dict[StrictStr, dict[StrictInt, StrictFloat]] = option(
        help="format -> number of pictures -> attention ratio to stay under; entries replace the preset's", factory=dict
    )
    min_perplexity: StrictFloat | None = option(1.1, "answers with a perplexity at or below this are dropped; None: no rule")
    max_truth_chars: StrictInt | None = option(
        512, "records with a true answer this long or longer are dropped; None: no rule", ge=1
    )
    max_length_ratio: StrictFloat | Literal["preset"] | None = option(
        "preset", "longer over shorter of truth and response, in characters; preset: 5 (paper, custom), no rule (official_code)"
    )
    min_edit_distance: StrictFloat | Literal["preset"] | None = option(
        "preset", "smallest edit distance as a share of the longer text; preset: 0.1 (paper, custom), no rule (official_code)"
    )
    max_pairs: StrictInt | None = option(None, "keep at most this many pairs, drawn with the run's seed; None: all", ge=1)


@dataclass(kw_only=True)
class PairsConfig(Settings):
    """Preference pairs that exist already, of methods with a stage `pairs`: the built-in ones, or your own."""

    source: StrictStr = option(
        "shapes_prior", "preference data with TRL's columns (.jsonl, .parquet, a `datasets` folder), or `shapes_prior` (built in)"
    )
    held_out: StrictFloat = option(
        0.1,
        "share of the pairs kept for evaluation, whole pictures at a time (`shapes_prior` draws new ones)",
        ge=0,
        lt=1,
    )
    max_held_out: StrictInt | None = option(
        None,
        "keep at most about this many of your own pairs for evaluation, whole pictures at a time; None: the share",
        ge=1,
    )
    pictures: StrictInt = option(800, "`source: shapes_prior` only: number of pictures, one pair each", ge=1)
    captions: StrictFloat = option(
        0.5, "`source: shapes_prior` only: share of whole captions, the rest are one-word answers", ge=0, le=1
    )
    counterfactual: StrictFloat = option(
        0.8, "`source: shapes_prior` only: share of pictures that disagree with the prior", ge=0, le=1
    )
    questions: dict[StrictStr, Count] = option(
        help="`source: shapes_prior` only: evaluation pictures that disagree and agree with the prior, two questions each",
        factory=lambda: {"disagree": 200, "agree": 100},
    )


@dataclass(kw_only=True)
class TrainConfig(Settings):
    """Preference training; everything of `PreferenceConfig` goes through `args`."""

    input: StrictStr | None = option(None, "your own preference data (TRL columns) in place of the pairs of this run")
    preset: StrictStr | None = option(
        None,
        "losses, rates and adapter of a paper or of its released code, which `args` may change one by one; None: the method's paper",
    )
    args: Finite[dict[StrictStr, Any]] = option(
        help="fields of PreferenceConfig, such as learning_rate, beta, loss_type", factory=dict
    )
    replay: StrictFloat = option(
        0.0, "single-image pairs mixed in, as a share of the selected pairs; they keep the single-image skill", ge=0
    )
    replay_source: StrictStr | None = option(
        None, "prompt records with answers (.jsonl) for the replay; None: augment/singles.jsonl"
    )
    held_out: StrictFloat = option(
        0.0, "share of the selected pairs that is not trained on but evaluated on, as eval_* in the log", ge=0, lt=1
    )
    reference: Literal["adapter", "model"] = option("adapter", "reference model: the adapter switched off, or a second copy")

    def __post_init__(self) -> None:
        # YAML reads a bare `no` as False.
        self.args = {key: "no" if value is False and key.endswith("_strategy") else value for key, value in self.args.items()}


@dataclass(kw_only=True)
class EvaluateConfig(Settings):
    """Accuracy before and after training, by format."""

    input: StrictStr | None = option(
        None,
        "your own prompts with answers (.jsonl) in place of evaluate/prompts.jsonl; as a flag: an evaluation beside the run's",
    )
    source: StrictStr | None = option(
        None, "single-image data to make evaluation prompts from, as in data.source; None: data.source"
    )
    image_folder: StrictStr | None = option(
        None, "folder that the picture paths of `source` are relative to; None: the folder `source` is in"
    )
    per_format: dict[StrictStr, Count] = option(
        help="evaluation prompts of each format (sequence, grid, pip, single)",
        factory=lambda: {"sequence": 300, "grid": 300, "pip": 100, "single": 400},
    )
    batch_size: StrictInt = option(32, "prompts answered together", ge=1)
    max_new_tokens: StrictInt = option(16, "longest answer, in tokens", ge=1)
    match: Match = option("exact", f"how an answer is compared with the truth; {_MATCH}")


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
    )


@dataclass(kw_only=True)
class RunConfig(Settings):
    """A whole run."""

    name: StrictStr = option("run", "name of the run; its folder is runs/<name> unless run_dir is given")
    run_dir: StrictStr | None = option(None, "the run folder", result=False)
    model: StrictStr = option(
        "shapes",
        "local Hugging Face folder of a supported model, or a small one shipped here: `shapes`, `shapes_prior`, `shapes_looking`",
    )
    method: StrictStr = option("mia_dpo", "the method by name, or a .py file that declares one of your own")
    seed: StrictInt = option(0, "seed of every random choice", ge=0, lt=2**32)
    threads: StrictInt | None = option(None, "CPU threads of PyTorch; None: PyTorch's own default", result=False, ge=1)
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "number type the model is loaded in")
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
    select: SelectConfig = option(help="preference pairs", factory=SelectConfig)
    pairs: PairsConfig = option(help="preference pairs that exist already", factory=PairsConfig)
    train: TrainConfig = option(help="training", factory=TrainConfig)
    evaluate: EvaluateConfig = option(help="accuracy", factory=EvaluateConfig)
    report: ReportConfig = option(help="the page", factory=ReportConfig)
    arms: Finite[dict[StrictStr, dict[StrictStr, Any]]] = option(
        help="control experiments: name -> overrides of `select` and `train`; they share everything before", factory=dict
    )

    def __post_init__(self) -> None:
        for name in self.arms:
            if not name.replace("_", "").replace("-", "").isalnum():
                raise ConfigError(f"arms: {name!r} becomes a folder name: letters, digits, _ and - only")
            self.for_arm(name)

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> RunConfig:
        """Read a YAML file. Raises ConfigError naming the file, the key and the nearest valid key, or the type expected."""
        return cls.from_dict(read_yaml(path), where=str(path))

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "configuration") -> RunConfig:
        """The same from a nested dict; `where` opens the error messages."""
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

    def for_arm(self, arm: str | None) -> RunConfig:
        """The configuration of an arm: this one with the arm's overrides, merged key by key. None: the main arm, itself."""
        if arm is None:
            return self
        if arm not in self.arms:
            raise ConfigError(f"there is no arm {arm!r}; this run has {', '.join(self.arms) or 'none'}")
        values = merge(self.to_dict(), self.arms[arm])
        values["arms"] = {}
        return validated(RunConfig, values, where=f"arms.{arm}")


_PATHS = {
    "data": ("source", "image_folder"),
    "generate": ("input",),
    "score": ("input",),
    "select": ("input",),
    "pairs": ("source",),
    "train": ("input", "replay_source"),
    "evaluate": ("input", "source", "image_folder"),
}


def _absolute(values: dict[str, Any]) -> dict[str, Any]:
    absolute = dict(values)
    for section, names in _PATHS.items():
        given = {name: values.get(section, {}).get(name) for name in names}
        paths = {name: str(Path(path).expanduser().absolute()) for name, path in given.items() if path and path not in SHIPPED}
        if paths:
            absolute[section] = {**values[section], **paths}
    if values.get("method", "").endswith(".py"):
        absolute["method"] = str(Path(values["method"]).expanduser().absolute())
    # What is no folder may be a name on a hub, which the error about it is to repeat as it was given.
    if values.get("model", "shapes") not in SHIPPED and Path(values["model"]).expanduser().is_dir():
        absolute["model"] = str(Path(values["model"]).expanduser().absolute())
    if seeds := values.get("report", {}).get("seeds"):
        absolute["report"] = {**values["report"], "seeds": [str(Path(path).expanduser().absolute()) for path in seeds]}
    return absolute


def merge(values: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """`values` with `overrides` laid over it, mapping by mapping."""
    merged = dict(values)
    for key, value in overrides.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged
