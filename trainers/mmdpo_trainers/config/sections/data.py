"""What a run starts from: single-image data and the prompts made of it, or preference pairs that exist."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import StrictBool, StrictFloat, StrictInt, StrictStr

from mmdpo_trainers.config.options import COLUMNS_WORDS, ColumnName, Count, option
from mmdpo_trainers.config.values import Settings
from mmdpo_trainers.errors import ConfigError


@dataclass(kw_only=True)
class DataConfig(Settings):
    """The single-image data that `augment` starts from."""

    source: StrictStr = option(
        "shapes",
        "single-image data in any layout of docs/your_data.md (.jsonl, .json, .parquet, a `datasets` folder), or `shapes` (the built-in world)",
        path=True,
    )
    columns: dict[ColumnName, StrictStr] | None = option(None, f"{COLUMNS_WORDS}; of evaluate.source too")
    image_folder: StrictStr | None = option(
        None, "folder that the records' picture paths are relative to; no path may leave it", path=True
    )
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
        when="as your questions will be; pictures one behind the other are sequence",
    )
    per_record: StrictFloat = option(1.0, "prompts made from each source record, if num_prompts is None", gt=0)
    num_prompts: StrictInt | None = option(
        None,
        "number of prompts to make; above the number of records, records are used again",
        ge=1,
        when="several times the pairs that you want, since selection drops most; a few hundred for a first look",
    )
    num_images: dict[StrictStr, dict[StrictInt, StrictFloat]] = option(
        help="for `sequence` (2-5) and `grid` (2, 3, 4, 6, 9): number of pictures -> share",
        factory=lambda: {
            "sequence": {2: 0.25, 3: 0.25, 4: 0.25, 5: 0.25},
            "grid": {2: 0.2, 3: 0.2, 4: 0.2, 6: 0.2, 9: 0.2},
        },
    )
    cell_size: StrictInt = option(
        448,
        "grid: side of a cell, in pixels",
        ge=1,
        when="with the size of pictures that the model takes; smaller cells make shorter prompts",
    )
    margin: StrictInt = option(40, "grid: white margin around a cell, in pixels; labels are written in it", ge=0)
    label: StrictBool = option(True, "grid: write `Image{k}` above each cell")
    square: StrictBool = option(True, "grid and pip: pad with white to a square, because CLIP processors crop the centre")
    max_fraction: StrictFloat = option(
        0.7, "pip: the pasted picture is at most this share of the host's width and height", gt=0, le=1
    )
    text_source: StrictStr | None = option(
        None,
        "questions without pictures to mix in: a source as data.source, of whose records those without pictures are taken",
        path=True,
    )
    text_share: StrictFloat = option(0.0, "prompts without pictures, as a share of those with pictures", ge=0)
    pip_openings: list[StrictStr] | None = option(None, "pip: phrases a prompt may open with; None: the built-in list")
    patch_grid: tuple[StrictInt, StrictInt] | None = option(None, "patch rows and columns of one picture; None: from the model")


@dataclass(kw_only=True)
class PairsConfig(Settings):
    """Preference pairs that exist already, of methods with a stage `pairs`: the built-in ones, or your own."""

    source: StrictStr = option(
        "shapes_prior",
        "preference data in any layout of docs/your_data.md (.jsonl, .json, .parquet, a `datasets` folder), or `shapes_prior` (built in)",
        path=True,
    )
    columns: dict[ColumnName, StrictStr] | None = option(None, COLUMNS_WORDS)
    held_out: StrictFloat = option(
        0.1,
        "share of the pairs kept for evaluation, whole pictures at a time (`shapes_prior` draws new ones)",
        ge=0,
        lt=1,
        when="higher for few pairs, of which as many should be left as the comparison needs, some hundred",
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
