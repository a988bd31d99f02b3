"""Whether an exported model is the one that was trained: read back by transformers alone, and compared with base and adapter."""

from __future__ import annotations

import dataclasses
import itertools
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from PIL import Image
from torch import Tensor, nn
from transformers import GenerationConfig

from mmdpo_trainers.checks.inputs import WIDE, drawn_image
from mmdpo_trainers.checks.result import CheckFailure, Differences
from mmdpo_trainers.data.image_paths import image_files
from mmdpo_trainers.data.records import read_prompts
from mmdpo_trainers.errors import MmdpoError, StageError
from mmdpo_trainers.models.encode import encode_prompts, load_images
from mmdpo_trainers.models.families import family_of
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import check_folder
from mmdpo_trainers.models.processors import load_processor
from mmdpo_trainers.models.template_date import TemplateDate
from mmdpo_trainers.models.whole_weights import without_bars
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.training.reference.model_hash import model_fingerprint

PROMPTS, TOKENS, _ROWS = 4, 16, 4
"""Prompts that are answered, tokens of an answer, and rows that a layer is tried on."""
_LOOKED_AT = 200
"""Records of a file among which prompts of different formats are looked for."""


@dataclass(frozen=True)
class Answer:
    """Greedy tokens (T), and the logits (T, V) that each was taken from, on the CPU."""

    ids: Tensor
    logits: Tensor


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the exported model is held to."""

    records: list[dict[str, Any]]
    own: bool
    """Whether the records are the run's own evaluation prompts."""
    unmerged: list[Answer]
    """Of base and adapter side by side."""
    layers: dict[str, tuple[Tensor, Tensor]]
    """Adapted layer -> rows of its input, and its output with the adapter at its side."""
    unchecked: bool
    """Whether there are adapted layers that are not among these."""
    dtype: torch.dtype
    device: torch.device
    date: TemplateDate
    merged: list[Answer] = field(default_factory=list)
    """Of the merged weights, before they were written."""
    weights: str = ""
    """`model_fingerprint` of the weights as they were written."""
    rounding: float = 0.0
    """The largest difference of an output of a merged layer, as a share of its largest."""


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the comparisons found. Differences are of a logit, as shares of the largest logit."""

    prompts: int
    own: bool
    same: int
    """Prompts whose greedy tokens are those of base and adapter to the end."""
    layers: int
    layer_difference: float
    from_merged: float
    from_unmerged: float
    limit: float
    dtype: str

    def __str__(self) -> str:
        what = "the run's own evaluation prompts" if self.own else "a built-in prompt"
        merged = f"{self.layers} merged layers off by at most {self.layer_difference:.1e}, " if self.layers else ""
        return (
            f"reloaded by transformers alone: weights bit for bit as merged; greedy tokens of {self.same} of {self.prompts} answers to {what} "
            f"as of base and adapter. {merged[:1].upper()}{merged[1:]}logits by at most {self.from_merged:.1e} from those before writing and "
            f"{self.from_unmerged:.1e} from those of base and adapter side by side, as shares of the largest (rounding of {self.dtype} in one "
            f"step: {self.limit:.1e})"
        )


def prompts_for(context: StageContext | None) -> tuple[list[dict[str, Any]], bool]:
    """A few prompts, and whether they are the run's own: one of each format that it evaluates, or a built-in one."""
    path = None if context is None else context.evaluation_prompts
    if path is not None and path.is_file():
        found: dict[str, dict[str, Any]] = {}
        for record in itertools.islice(read_prompts(path), _LOOKED_AT):
            if all(Path(file).is_file() for image in record["images"] for file in image_files(image)):
                found.setdefault(f"{record['format']} {record['num_images']}", record)
        if found:
            return list(found.values())[:PROMPTS], True
    picture = drawn_image(WIDE, 0).resize((224, 112))
    return [{"id": "built-in", "prompt": "<image>\nWhat is in the picture?", "images": [picture]}], False


@torch.no_grad()
def answered(loaded: LoadedModel, records: Sequence[Mapping[str, Any]]) -> list[Answer]:
    """Greedy answers by transformers' `generate`, one prompt after the other."""
    config = GenerationConfig(
        max_new_tokens=TOKENS,
        do_sample=False,
        num_beams=1,
        pad_token_id=loaded.pad_id,
        eos_token_id=sorted(loaded.end_ids) or None,
        suppress_tokens=[loaded.image_token_id],
        return_dict_in_generate=True,
        output_logits=True,
    )
    found = []
    for record in records:
        made = all(isinstance(each, Image.Image) for each in record["images"])
        shown: list[Image.Image] = list(record["images"]) if made else load_images(record)
        inputs = encode_prompts(loaded, [record], padding_side="left", pictures=[shown]).inputs
        output = loaded.model.generate(**inputs, generation_config=config)
        ids = output.sequences[0, inputs["input_ids"].shape[1] :].cpu()
        found.append(Answer(ids, torch.stack([step[0].cpu() for step in output.logits])))
    return found


@torch.no_grad()
def expected_of(loaded: LoadedModel, context: StageContext | None) -> Expected:
    """What base and adapter answer, and what each adapted layer makes of a few random rows, while they are side by side."""
    records, own = prompts_for(context)
    generator, layers, others = torch.Generator().manual_seed(0), {}, False
    for name, module in loaded.model.named_modules():
        if isinstance(module, BaseTunerLayer) and isinstance(module.get_base_layer(), nn.Linear):
            width = int(module.get_base_layer().in_features)  # type: ignore[arg-type]
            rows = torch.randn(_ROWS, width, generator=generator).to(loaded.device, loaded.dtype)
            layers[name] = rows, module(rows)  # type: ignore[operator]
        elif isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper):
            others = True
    return Expected(
        records=records,
        own=own,
        unmerged=answered(loaded, records),
        layers=layers,
        unchecked=others,
        dtype=loaded.dtype,
        device=loaded.device,
        date=loaded.date,
    )


@torch.no_grad()
def with_merged(expected: Expected, loaded: LoadedModel, has_adapter: bool) -> Expected:
    """The same with what the merged model makes of it. StageError where a layer is not what it was with the adapter at its side.

    Layer by layer, as the rounding of one grows on its way through all the others, and more in some models than in others.
    """
    differences = Differences(loaded.dtype)
    for name, (rows, before) in expected.layers.items():
        differences.add(loaded.model.get_submodule(name)(rows), before, name)
    if differences.largest > differences.limit:
        raise StageError(
            f"{differences.where}: merged, its output is off by {differences.largest:.1e} of the largest from that with the adapter beside it, "
            f"and rounding of {_name(loaded.dtype)} is at most {differences.limit:.1e}; {_REMEDY}"
        )
    merged = answered(loaded, expected.records) if has_adapter else expected.unmerged
    weights = model_fingerprint(loaded.model)
    return dataclasses.replace(expected, merged=merged, weights=weights, rounding=differences.largest)


@torch.no_grad()
def verify(folder: Path, expected: Expected) -> Verdict:
    """Read the exported folder as anyone would, and compare. Raises StageError, saying what differs."""
    again = _reloaded(folder, expected)
    if model_fingerprint(again.model) != expected.weights:
        raise StageError(f"{folder}: transformers reads other weights than were written; {_REMEDY}")
    after = answered(again, expected.records)
    merged = _compared(folder, expected.records, expected.merged, after, again.dtype, strict=True)
    unmerged = _compared(folder, expected.records, expected.unmerged, after, again.dtype, strict=expected.unchecked)
    return Verdict(
        prompts=len(expected.records),
        own=expected.own,
        same=unmerged[1],
        layers=len(expected.layers),
        layer_difference=expected.rounding,
        from_merged=merged[0].largest,
        from_unmerged=unmerged[0].largest,
        limit=merged[0].limit,
        dtype=_name(again.dtype),
    )


def _compared(
    folder: Path,
    records: Sequence[Mapping[str, Any]],
    before: Sequence[Answer],
    after: Sequence[Answer],
    dtype: torch.dtype,
    *,
    strict: bool,
) -> tuple[Differences, int]:
    """Differences of logits, and how many answers have the same tokens. strict: StageError for more than rounding."""
    differences, same = Differences(dtype), 0
    try:
        for record, one, other in zip(records, before, after, strict=True):
            same += _compare(record["id"], one, other, differences, strict=strict)
    except CheckFailure as error:
        raise StageError(f"{folder}: {error}; {_REMEDY}") from error
    if strict and differences.largest > differences.limit:
        raise StageError(
            f"{folder}: the exported model's logits are off by {differences.largest:.1e} of the largest ({differences.where}), and rounding of "
            f"{_name(dtype)} is at most {differences.limit:.1e}; {_REMEDY}"
        )
    return differences, same


_REMEDY = (
    "nothing was kept. Report it with `mmdpo env`; --dtype float32 tells rounding from faults, and --no-verify keeps the folder"
)


def _compare(id: str, before: Answer, after: Answer, differences: Differences, *, strict: bool = True) -> bool:
    """Add the logits of the steps that both answers have the same tokens before; whether they have the same tokens to the end."""
    length = min(len(before.ids), len(after.ids))
    other = (before.ids[:length] != after.ids[:length]).nonzero()
    shared = length if not len(other) else int(other[0]) + 1
    for step in range(shared):
        differences.add(after.logits[step], before.logits[step], f"prompt {id}, token {step}")
    if not len(other) and len(before.ids) == len(after.ids):
        return True
    step = shared - 1
    row, scale = before.logits[step].double(), float(before.logits[step].double().abs().max())
    gap = float(row[before.ids[step]] - row[after.ids[step]]) / max(scale, 1e-30)
    if strict and gap > 2 * differences.limit:
        raise CheckFailure(
            f"prompt {id}, token {step}: another greedy token, {gap:.1e} of the largest logit below the one expected"
        )
    return False


def _reloaded(folder: Path, expected: Expected) -> LoadedModel:
    """The folder's model by transformers' own class, without a patch. StageError where a weight is missing, left over or of another shape."""
    config = check_folder(folder)
    model_class = family_of(config).model_class
    try:
        with warnings.catch_warnings(), without_bars():
            warnings.simplefilter("ignore")
            model, info = model_class.from_pretrained(
                folder, dtype=expected.dtype, local_files_only=True, output_loading_info=True
            )
        processor = load_processor(folder, config.model_type)
    except MmdpoError:
        raise
    except (OSError, RuntimeError, ValueError, KeyError, TypeError) as error:
        raise StageError(f"{folder}: transformers cannot read it back ({' '.join(str(error).split())}); {_REMEDY}") from error
    for kind, names in info.items():
        if kind.endswith("_keys") and names:
            first = sorted(map(str, names))[0]
            raise StageError(f"{folder}: read back, {len(names)} {kind.replace('_', ' ')}, such as {first}; {_REMEDY}")
    model = model.to(expected.device).eval()
    if model.dtype == torch.float64:
        model.set_experts_implementation("eager")
    return LoadedModel(model=model, processor=processor, path=folder, date=expected.date)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
