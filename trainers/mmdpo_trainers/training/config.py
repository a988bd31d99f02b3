"""`PreferenceConfig`: what preference training is made with; TRL's names where TRL has the same thing."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from mmdpo_kernels.losses import EXTENDED, LOSSES, NEEDS_LENGTHS, REFERENCE_FREE, SMOOTHED, LossParameters, values_of
from mmdpo_trainers.data.conversation import Conversation
from mmdpo_trainers.data.corruption import KINDS, Corruption
from mmdpo_trainers.data.pair_records import (
    BRANCHES,
    PAIR,
    USUAL_BRANCHES,
    Branch,
    corrupted_view,
    is_corrupted,
    record_conversation,
    shows_corrupted,
)
from mmdpo_trainers.models.template_date import TemplateDate
from mmdpo_trainers.training.arguments import TRL_LOSSES, check_inherited, takes_foreign_names
from mmdpo_trainers.training.running_shift import SHIFTS

LOSS_TYPES = tuple(LOSSES)
"""Losses by name; their equations and sources are in `mmdpo_kernels.losses`."""
ATTENTION_TARGETS = ("log_share", "sayo", "kl")
"""Forms of `attention_target`; their equations and sources are in `training.attention_target`."""
GIVEN = "given"
"""As a corruption: the records' own images."""
_METRICS = ("accuracies", "margins")
"""What the log has beside the rewards of branches."""
_NEWER_NAMES = {
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
}
"""Fields of TrainingArguments that transformers 5.20 has renamed."""


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@takes_foreign_names
@dataclass
class PreferenceConfig(TrainingArguments):
    """`transformers.TrainingArguments` with the fields of TRL's `DPOConfig` that apply, and ours.

    TRL's other arguments are taken where they say what happens here anyway, else refused with what is in their place (`arguments.py`).

    Defaults are MIA-DPO's (arXiv 2410.17637): beta 0.1, LoRA 128/256 on every linear of the language tower, learning rate 5e-5
    linear with a tenth of warm-up. Dropout is always off: policy and reference must differ by the weights only.

    Raises ValueError naming the field where values do not fit together.
    """

    learning_rate: float = _option(5e-5, "peak learning rate")
    warmup_steps: float = _option(0.1, "warm-up steps; below 1: as a share of all steps")
    logging_steps: float = _option(10, "log every so many steps; below 1: as a share of all steps")
    save_total_limit: int | None = _option(2, "checkpoints kept; at least 2, so that a kill during a save leaves a whole one")
    report_to: None | str | list[str] = _option("none", "experiment trackers to report to, as in transformers")
    remove_unused_columns: bool = _option(False, "must stay off: the collator reads the columns itself")

    beta: float = _option(0.1, "strength of the pull towards the reference model, above 0")
    loss_type: list[str] = field(
        default_factory=lambda: ["sigmoid"],
        metadata={"help": f"losses to add up, of {', '.join(LOSS_TYPES)}; MIA-DPO is sigmoid nll"},
    )
    loss_weights: list[float] | None = _option(None, "one factor a loss (the one of nll is MIA-DPO's gamma); None: 1 each")
    label_smoothing: float = _option(
        0.0, "cdpo and robust: share of the pairs whose preference is taken to be the wrong way round"
    )
    length_normalised: bool = _option(
        False, "per-token means in place of sums over responses, wherever the loss has no rule of its own"
    )
    changed_token_weight: float = _option(
        1.0, "weight of the tokens in which chosen and rejected differ (DDPO, arXiv 2312.00849); 1: every token alike"
    )
    simpo_gamma: float = _option(0.5, "simpo: margin that the chosen response's mean reward is to keep")
    anchor: float = _option(0.0, "ancpo: delta, the reward that anchored responses are to stay above (chosen) or below (others)")
    anchors: list[str] = field(
        default_factory=lambda: ["chosen"], metadata={"help": f"ancpo: rewards that are anchored, of {', '.join(BRANCHES)}"}
    )
    extra_negative: str | None = _option(
        None,
        f"{', '.join(sorted(EXTENDED))}: a branch of further_branches, such as {{hallucinated: [images, hallucinated]}}, that is a second "
        "rejected response (arXiv 2407.02477); None: there is none",
    )
    extra_negative_weight: float = _option(
        0.5, "extra_negative: its share of the loss; rejected has the rest, which is the paper's gamma"
    )
    bco_shift: str = _option(
        "none",
        "bco_pair: its reward shift. none: 0; previous: the mean reward of all steps before (MPO, arXiv 2411.10442); present: as MPO's released "
        "code, each micro-batch taken in before its own loss",
    )
    similar_beta: float | None = _option(
        None, "similar_anchor (SymMPO): beta of the anchor on the similar picture's answer; None: beta"
    )
    further_branches: dict[str, list[str]] | None = _option(
        None,
        "what else losses may look at: name -> [view, response]. A view is images, corrupted, or a column that holds an image for each of "
        "images; a response is a column. Only branches that a loss looks at are run",
    )
    corruption: str = _option(
        "crop",
        f"copo: how the picture is corrupted, {', '.join(KINDS)}; in prompts with several pictures only the asked-about one is. A record's "
        "own rejected_images stand in its place; given: every record has them",
    )
    corruptions: list[str] | None = _option(
        None,
        "copo: several corrupted views in place of one, over which it is a mean: each what `corruption` may be, or {kind: noise, strength: 50}. "
        "The views are corrupted, corrupted_2, …; a record's own images for them rejected_images, rejected_images_2, …",
    )
    corruption_keep: tuple[float, float] = _option(
        (0.01, 0.20), "crop: share of the picture's area that is kept, drawn evenly between these"
    )
    corruption_strength: float | None = _option(
        None,
        "blur: radius as a share of the shorter side; noise: sigma in grey levels; mask: share of image tokens. None: the kind's own",
    )
    corruption_seed: int | None = _option(None, "seed of the corruption; None: `seed`")
    corruption_draw: str = _option(
        "shared", "shared: policy and reference see the same corrupted picture; separate: two draws, as mDPO's released code"
    )
    template_date: str | None = _option(
        None,
        "date, such as 2025-03-01, that a chat template which prints today's is told; None: the day of the first start, kept in output_dir",
    )
    chat_template_kwargs: dict[str, Any] | None = _option(
        None, "arguments of the chat template, such as {enable_thinking: false}; those of a record's own column of that name win"
    )
    no_image: bool = _option(False, "DPO (No Image): leave the pictures out of every prompt")
    precompute_ref_log_probs: bool = _option(
        False, "run the reference once over the data, before the first step, in place of once every step"
    )
    reference_cache: str | None = _option(
        None, "file that keeps the reference's log-probabilities, by content of the records; None: reference.jsonl in output_dir"
    )
    max_length: int | None = _option(
        None, "longest prompt + response in tokens, with picture tokens, which are never cut. None: no limit"
    )
    too_long: str = _option("drop", "records longer than max_length: `drop` leaves them out and names them, `error` stops")
    max_tokens_per_batch: int | None = _option(
        None, "pack each micro-batch up to this many tokens, in place of per_device_train_batch_size records; None: by records"
    )
    group_by_pictures: bool = _option(
        False, "bring records about the same pictures into one micro-batch, whose token tree then runs the pictures once"
    )
    full_finetune: bool = _option(False, "train the weights themselves in place of a LoRA adapter")
    lora_r: int = _option(128, "rank of the LoRA adapter")
    lora_alpha: int = _option(256, "LoRA scale: the update is multiplied by lora_alpha / lora_r")
    lora_target: str = _option(
        "language", "what LoRA adapts: `language` (every linear of the language tower, not lm_head), or a PEFT regular expression"
    )
    freeze_vision: bool = _option(True, "full fine-tuning: keep the vision tower as it is")
    freeze_projector: bool = _option(True, "full fine-tuning: keep the projector between vision and language as it is")
    tree_packing: bool = _option(
        True, "run each micro-batch as one token tree, shared prompts and pictures once; False: padded, separate sequences"
    )
    activation_offloading: bool = _option(
        False, "keep what gradient checkpointing keeps in the CPU's memory; needs gradient_checkpointing"
    )
    mlp_chunk_rows: int | None = _option(
        None,
        "gradient checkpointing: a layer's MLP takes at most this many rows at a time, whose activations alone are then in memory; None: 512 "
        "where that costs no time (not full_finetune, not with a norm behind the MLP); 0: all rows at once",
    )
    stop_on_nonfinite_loss: bool = _option(
        True,
        "stop before the optimizer step where a loss is NaN or infinite, naming the records; float16's skipped steps are no such loss",
    )
    attention_layer: int | None = _option(
        None, "decoder layer (0-based) whose attention ratio on the asked-about picture is logged (attn/ratio_*); None: none"
    )
    attention_target: str | None = _option(
        None,
        f"objective on where the chosen response looks, added to the losses: {', '.join(ATTENTION_TARGETS)} (docs/training.md). Records "
        "without an asked-about picture among several, or part of one, are left out of it; None: none",
    )
    attention_target_weight: float = _option(1.0, "attention_target: its factor")
    attention_target_layer: int | None = _option(
        None, "attention_target: decoder layer (0-based) whose attention it is; None: attention_layer"
    )
    router_aux_loss_coef: float | None = _option(
        None,
        "mixture-of-experts models: factor of the load-balancing loss, which is added to the losses; None: what the model's configuration says, "
        "0: there is none",
    )
    log_attention_every: int = _option(1, "steps between recordings of the attention ratio; 0: during evaluation only")

    def __post_init__(self) -> None:
        self._check_numbers()
        self._name_as_transformers_does()
        super().__post_init__()
        if isinstance(self.loss_type, str):
            self.loss_type = [self.loss_type]
        self._check_further_branches()
        self._check_loss()
        self._check_corruption()
        self._check_batches()
        if self.template_date is not None:
            TemplateDate.read(self.template_date)
        self._check_strategies()
        check_inherited(self)
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns: expected False (the collator reads the columns itself), got True")
        if self.save_total_limit is not None and self.save_total_limit < 2:
            raise ValueError(
                f"save_total_limit: expected at least 2, got {self.save_total_limit}; a kill during a save would lose the run"
            )
        if self.lora_r < 1 or self.lora_alpha <= 0:
            raise ValueError(f"lora_r, lora_alpha: expected values above 0, got {self.lora_r}, {self.lora_alpha}")
        self._check_attention_target()
        coefficient = self.router_aux_loss_coef
        if coefficient is not None and not (_is_number(coefficient) and coefficient >= 0):
            raise ValueError(f"router_aux_loss_coef: expected a number of 0 or more, or None, got {coefficient!r}")
        if self.log_attention_every < 0:
            raise ValueError(f"log_attention_every: expected 0 or more, got {self.log_attention_every}")

    def _name_as_transformers_does(self) -> None:
        """gradient_checkpointing under the name that transformers 5.20 gave it; it keeps both, and warns of the older one."""
        for older, newer in _NEWER_NAMES.items():
            if hasattr(self, newer) and getattr(self, newer) is None:
                setattr(self, newer, getattr(self, older))

    def _check_attention_target(self) -> None:
        if self.attention_target is None:
            return
        if self.attention_target not in ATTENTION_TARGETS:
            raise ValueError(f"attention_target: expected one of {', '.join(ATTENTION_TARGETS)}, got {self.attention_target!r}")
        if not _is_number(self.attention_target_weight):
            raise ValueError(f"attention_target_weight: expected a finite number, got {self.attention_target_weight!r}")
        if self.target_layer is None:
            raise ValueError("attention_target: it needs a layer; set attention_target_layer, or attention_layer")
        if self.no_image:
            raise ValueError("attention_target: without pictures (no_image) there is nothing to look at; leave it out")
        if self.torch_compile:
            raise ValueError(
                "attention_target: a compiled model's attention is recorded without a gradient; leave torch_compile out"
            )
        recomputed: Any = self.gradient_checkpointing_kwargs or {}
        if self.gradient_checkpointing and recomputed.get("use_reentrant"):
            raise ValueError(
                "attention_target: re-entrant checkpointing runs layers without a gradient; set use_reentrant: false in "
                "gradient_checkpointing_kwargs"
            )

    def _check_numbers(self) -> None:
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name}: expected a whole number of 1 or more, got {value!r}")
        if not _is_number(self.num_train_epochs) or not self.num_train_epochs > 0:
            raise ValueError(f"num_train_epochs: expected a number above 0, got {self.num_train_epochs!r}")
        if not _is_number(self.learning_rate) or self.learning_rate < 0:
            raise ValueError(f"learning_rate: expected a number of 0 or more, such as 5.0e-5, got {self.learning_rate!r}")

    def _check_strategies(self) -> None:
        if self.save_strategy != SaveStrategy.STEPS:
            return
        for name in ("eval_strategy", "logging_strategy"):
            if getattr(self, name) == IntervalStrategy.EPOCH:
                raise ValueError(
                    f"{name}: 'epoch' needs save_strategy 'epoch' too; a run continued from a checkpoint at the end of an epoch "
                    "would miss it"
                )

    def _check_further_branches(self) -> None:
        several = self.corruptions
        if several is not None and (not isinstance(several, list) or not several or self.corruption_strength is not None):
            raise ValueError(
                f"corruptions: expected a list of one or more, such as [crop, {{kind: noise, strength: 50}}], and no corruption_strength beside "
                f"it, got {several!r}"
            )
        for name, branch in (self.further_branches or {}).items():
            if not str(name).isidentifier() or name in BRANCHES or is_corrupted(str(name)) or str(name).endswith(_METRICS):
                raise ValueError(
                    f"further_branches: expected names of letters and digits other than {', '.join(BRANCHES)}, without {' or '.join(_METRICS)} "
                    f"at the end, got {name!r}"
                )
            pair = branch if isinstance(branch, list | tuple) else ()
            if len(pair) != 2 or not all(isinstance(each, str) and each for each in pair):
                raise ValueError(
                    f"further_branches: expected {name}: [view, response], such as [corrupted, rejected], got {branch!r}"
                )

    def _check_loss(self) -> None:
        unknown = [name for name in self.loss_type if name not in LOSSES]
        words = "".join(f"; {name}: {TRL_LOSSES[name]}" for name in unknown if name in TRL_LOSSES)
        if unknown or not self.loss_type:
            raise ValueError(f"loss_type: expected one or more of {', '.join(LOSSES)}, got {self.loss_type}{words}")
        if self.loss_weights is not None and len(self.loss_weights) != len(self.loss_type):
            raise ValueError(f"loss_weights: expected one a loss ({len(self.loss_type)}), got {self.loss_weights}")
        if self.loss_weights is not None and not all(map(_is_number, self.loss_weights)):
            raise ValueError(f"loss_weights: expected finite numbers, got {self.loss_weights}")
        for name in self.loss_type:
            self._check_branches_of(name)
        if not _is_number(self.beta) or not self.beta > 0:
            raise ValueError(f"beta: expected a value above 0, got {self.beta}")
        if not _is_number(self.label_smoothing) or not 0 <= self.label_smoothing < 0.5:
            raise ValueError(f"label_smoothing: expected a share in [0, 0.5), got {self.label_smoothing!r}")
        if self.label_smoothing and SMOOTHED.isdisjoint(self.loss_type):
            raise ValueError(f"label_smoothing: it acts on {', '.join(sorted(SMOOTHED))} only, got loss_type {self.loss_type}")
        self._check_second_rejected()
        if self.bco_shift not in SHIFTS:
            raise ValueError(f"bco_shift: expected one of {', '.join(SHIFTS)}, got {self.bco_shift!r}")
        if not _is_number(self.anchor):
            raise ValueError(f"anchor: expected a finite number, got {self.anchor!r}")
        if not _is_number(self.simpo_gamma) or self.simpo_gamma < 0:
            raise ValueError(f"simpo_gamma: expected a finite number of 0 or more, got {self.simpo_gamma!r}")
        for name in ("loss_type", "anchors"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name}: expected each once, got {getattr(self, name)}; a loss counts more by its weight")
        if not self.anchors or not set(BRANCHES).issuperset(self.anchors):
            raise ValueError(f"anchors: expected one or more of {', '.join(BRANCHES)}, got {self.anchors}")
        if not _is_number(self.changed_token_weight) or not self.changed_token_weight > 0:
            raise ValueError(f"changed_token_weight: expected a value above 0, got {self.changed_token_weight!r}")
        if self.changed_token_weight != 1 and (self.length_normalised or not NEEDS_LENGTHS.isdisjoint(self.loss_type)):
            raise ValueError(
                "changed_token_weight: weighted log-probabilities have a length of their own; leave it at 1 with length_normalised "
                f"and with {', '.join(sorted(NEEDS_LENGTHS & set(self.loss_type))) or 'losses of token means'}"
            )

    def _check_branches_of(self, name: str) -> None:
        others = {value.branch for value in values_of(name, self.loss_parameters)}.difference(self._known_branches)
        if others:
            missing = sorted(others)
            declared = ", ".join(f"{each}: {USUAL_BRANCHES.get(each, '[images, ' + each + ']')}" for each in missing)
            raise ValueError(
                f"loss_type: {name!r} looks at the branches {', '.join(missing)}; training records have "
                f"{', '.join(self._known_branches)}; add the columns with further_branches: {{{declared}}}"
            )

    def _check_second_rejected(self) -> None:
        if self.extra_negative is not None and EXTENDED.isdisjoint(self.loss_type):
            raise ValueError(f"extra_negative: it acts on {', '.join(sorted(EXTENDED))} only, got loss_type {self.loss_type}")
        if self.extra_negative in PAIR:
            raise ValueError(f"extra_negative: expected a branch other than {' and '.join(PAIR)}, got {self.extra_negative!r}")
        if not _is_number(self.extra_negative_weight) or not 0 <= self.extra_negative_weight <= 1:
            raise ValueError(f"extra_negative_weight: expected a share in [0, 1], got {self.extra_negative_weight!r}")
        if self.similar_beta is not None and (not _is_number(self.similar_beta) or self.similar_beta <= 0):
            raise ValueError(f"similar_beta: expected a value above 0, or None for beta, got {self.similar_beta!r}")

    def _check_corruption(self) -> None:
        self.corruption_keep = tuple(self.corruption_keep)  # type: ignore[assignment]
        self.image_corruptions  # noqa: B018 - raises ValueError where their parts do not fit
        if self.no_image and shows_corrupted(self.branches):
            raise ValueError("no_image: without pictures there is none to corrupt; leave copo out of loss_type")

    def _check_batches(self) -> None:
        if self.too_long not in ("drop", "error"):
            raise ValueError(f"too_long: expected 'drop' or 'error', got {self.too_long!r}")
        for name in ("max_length", "max_tokens_per_batch"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected 1 or more tokens, or None, got {value!r}")
        if self.mlp_chunk_rows is not None and self.mlp_chunk_rows < 0:
            raise ValueError(f"mlp_chunk_rows: expected a number of rows, 0 or None, got {self.mlp_chunk_rows}")
        if self.activation_offloading and not self.gradient_checkpointing:
            raise ValueError("activation_offloading: it moves what gradient checkpointing keeps; set gradient_checkpointing too")
        for name in ("max_tokens_per_batch", "group_by_pictures"):
            if getattr(self, name) and not self.tree_packing:
                raise ValueError(f"{name}: padded, separate sequences share nothing and waste padding; leave tree_packing on")

    @property
    def weight_of(self) -> dict[str, float]:
        """Loss -> its factor."""
        weights = self.loss_weights or [1.0] * len(self.loss_type)
        return dict(zip(self.loss_type, map(float, weights), strict=True))

    @property
    def target_layer(self) -> int | None:
        """The layer of `attention_target`."""
        return self.attention_layer if self.attention_target_layer is None else self.attention_target_layer

    @property
    def needs_reference(self) -> bool:
        """Whether some loss compares with the reference model."""
        return any(name not in REFERENCE_FREE for name in self.loss_type)

    @property
    def loss_parameters(self) -> LossParameters:
        """What losses are made with, but for the running `bco_shift`."""
        return LossParameters(
            beta=self.beta,
            label_smoothing=self.label_smoothing,
            anchor=self.anchor,
            anchors=tuple(self.anchors),
            simpo_gamma=self.simpo_gamma,
            extra_negative=self.extra_negative,
            extra_negative_weight=self.extra_negative_weight,
            similar_beta=self.similar_beta,
            corrupted=self._corrupted,
        )

    @property
    def _known_branches(self) -> dict[str, Branch]:
        views = {view: Branch(view, "chosen") for view in self._corrupted}
        return {**BRANCHES, **views, **{name: Branch(*pair) for name, pair in (self.further_branches or {}).items()}}

    @property
    def branches(self) -> dict[str, Branch]:
        """The branches that some loss looks at, "chosen" and "rejected" first."""
        looked_at = {value.branch for name in self.loss_type for value in values_of(name, self.loss_parameters)}
        return {name: branch for name, branch in self._known_branches.items() if name in PAIR or name in looked_at}

    @property
    def prompt_of(self) -> Callable[[Mapping[str, Any]], Conversation]:
        """What makes a record's prompt, an `<image>` for each picture."""
        return record_conversation

    @property
    def reference_path(self) -> Path:
        """File of the reference's log-probabilities."""
        return Path(self.reference_cache or Path(str(self.output_dir)) / "reference.jsonl")

    @property
    def image_corruptions(self) -> tuple[Corruption | None, ...]:
        """How pictures are corrupted, by corrupted view; None: the records' own images alone."""
        return tuple(self._corruption_of(each) for each in self.corruptions or [self.corruption])

    def _corruption_of(self, described: Any) -> Corruption | None:
        fields: Any = described if isinstance(described, dict) else {"kind": described}
        if not {"kind"} <= set(fields) <= {"kind", "keep", "strength"}:
            raise ValueError(f"corruptions: expected a kind, or kind with keep or strength, got {described!r}")
        if fields == {"kind": GIVEN}:
            return None
        return Corruption(
            kind=fields["kind"],
            keep=fields.get("keep", self.corruption_keep),
            strength=fields.get("strength", None if self.corruptions else self.corruption_strength),
            seed=self.seed if self.corruption_seed is None else self.corruption_seed,
            draw=self.corruption_draw,  # type: ignore[arg-type]
        )

    @property
    def draws_pictures(self) -> bool:
        """Whether other records' pictures stand in the place of corrupted ones."""
        return any(each is not None and each.kind == "other" for each in self.image_corruptions)

    @property
    def _corrupted(self) -> tuple[str, ...]:
        """Corrupted views, and the branches that are the chosen response under them."""
        return tuple(corrupted_view(number) for number in range(1, 1 + len(self.corruptions or [self.corruption])))


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
