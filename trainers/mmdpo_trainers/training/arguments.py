"""Names of arguments that mean something else here, or nothing: TRL's, of this version and older ones, and of transformers' own."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

ConfigT = TypeVar("ConfigT")


@dataclass(frozen=True)
class Argument:
    """An argument under a foreign name. `takes`: values that say what happens here anyway; any other is refused with `instead`."""

    instead: str
    takes: tuple[Any, ...] = ()

    def check(self, name: str, value: Any) -> None:
        """ValueError unless the value is one of those taken."""
        if not any(value is each or (type(value) is type(each) and value == each) for each in self.takes):
            expected = f"expected {' or '.join(map(repr, self.takes))}, got {value!r}; " if self.takes else ""
            raise ValueError(f"{name}: {expected}{self.instead}")


_NOT_HERE = "{} is not here; stay with TRL's DPOTrainer for it (docs/from_trl.md)"
_NEVER_CUT = "sequences are never cut here; too_long says what becomes of records longer than max_length ('drop' or 'error')"
_OLDER = "TRL itself has taken it out; "

ARGUMENTS: Mapping[str, Argument] = {
    "model_init_kwargs": Argument(
        "load the model with mmdpo_trainers.models.loading.load_model (dtype=…), and pass it", (None, {})
    ),
    "trust_remote_code": Argument("models are of transformers' own classes; load yours, and pass it", (False,)),
    "disable_dropout": Argument("dropout is always off, as policy and reference must differ by the weights only", (True,)),
    "dataset_num_proc": Argument("records are read as they are needed; dataloader_num_workers prepares batches ahead", (None,)),
    "truncation_mode": Argument(_NEVER_CUT),
    "padding_free": Argument("tree_packing, which is on, runs without padding", (False,)),
    "pad_to_multiple_of": Argument("token trees have no padding, and padded rows are padded to the longest", (None, "auto")),
    "precompute_ref_batch_size": Argument(
        "the reference's pass has batches of per_device_eval_batch_size records, or of max_tokens_per_batch tokens", (None,)
    ),
    "ld_alpha": Argument(_NOT_HERE.format("LD-DPO's weighting"), (None, 1.0, 1)),
    "f_divergence_type": Argument(_NOT_HERE.format("an f-divergence other than the reverse KL"), ("reverse_kl",)),
    "f_alpha_divergence_coef": Argument(_NOT_HERE.format("the alpha divergence"), (0.5,)),
    "use_weighting": Argument(_NOT_HERE.format("WPO's weighting"), (False,)),
    "discopop_tau": Argument(_NOT_HERE.format("DiscoPOP's loss"), (0.05,)),
    "sync_ref_model": Argument(_NOT_HERE.format("a reference that follows the policy (TR-DPO)"), (False,)),
    "ref_model_mixup_alpha": Argument(_NOT_HERE.format("a reference that follows the policy (TR-DPO)"), (0.6,)),
    "ref_model_sync_steps": Argument(_NOT_HERE.format("a reference that follows the policy (TR-DPO)"), (512,)),
    "pad_token": Argument("set processing_class.tokenizer.pad_token", (None,)),
    # What scripts for older versions still have.
    "max_prompt_length": Argument(f"{_OLDER}{_NEVER_CUT}", (None,)),
    "max_completion_length": Argument(f"{_OLDER}{_NEVER_CUT}", (None,)),
    "group_by_length": Argument("max_tokens_per_batch makes micro-batches of equal size in tokens", (False,)),
    "reference_free": Argument(f"{_OLDER}losses without a reference are simpo, orpo and nll (loss_type)", (False,)),
    "rpo_alpha": Argument(f"{_OLDER}add 'nll' to loss_type, with its factor in loss_weights", (None,)),
    "model_adapter_name": Argument(f"{_OLDER}the active adapter of the model is trained", (None,)),
    "ref_adapter_name": Argument(f"{_OLDER}the reference is the adapter off; for another one pass ref_model", (None,)),
    "force_use_ref_model": Argument("a ref_model is always taken, also beside an adapter; leave it out"),
    "ref_model_init_kwargs": Argument("load the reference with load_model, and pass it as ref_model", (None, {})),
    "generate_during_eval": Argument(f"{_OLDER}`mmdpo evaluate` generates answers", (False,)),
    "tools": Argument("give them in a column `tools` of the records", (None, [])),
}
"""Arguments of TRL's `DPOConfig` that are no field of `PreferenceConfig`."""

TRL_LOSSES: Mapping[str, str] = {
    "sft": "here it is 'nll'",
    "sigmoid_norm": "here it is 'sigmoid' with length_normalised=True",
    **dict.fromkeys(
        ("exo_pair", "nca_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop"),
        "it is not here; stay with TRL's DPOTrainer for it",
    ),
}
"""Losses of TRL that have another name here, or are not here."""

INHERITED: Mapping[str, Argument] = {
    "neftune_noise_alpha": Argument(
        "noise on the embeddings would reach the reference, and depend on how records are packed; leave it out", (None,)
    ),
    "label_smoothing_factor": Argument(
        "it is of the cross-entropy with labels; label_smoothing acts on the losses cdpo and robust", (0.0, 0)
    ),
    "use_liger_kernel": Argument(
        "head and losses have kernels of their own here, chosen by themselves (`mmdpo env`); Liger's layers can be put into the model "
        "before it is passed",
        (False,),
    ),
    "include_for_metrics": Argument("there is no compute_metrics here; what evaluation measures is in its log", ([],)),
    "batch_eval_metrics": Argument("there is no compute_metrics here; what evaluation measures is in its log", (False,)),
    "include_num_input_tokens_seen": Argument(
        "token trees hold shared tokens once, and are not counted; leave it out", ("no", False)
    ),
    "label_names": Argument("records have no labels but chosen and rejected; leave it out", (None, [])),
}
"""Fields of `transformers.TrainingArguments` that would do nothing here, or something else."""

TRAINER_ARGUMENTS: Mapping[str, Argument] = {
    "data_collator": Argument("the trainer makes token trees by a collator of its own; leave it out", (None,)),
    "compute_metrics": Argument("rewards, accuracies and margins are in the evaluation's log already; leave it out", (None,)),
    "optimizers": Argument(
        "an optimizer made before the adapter would not hold it; use optim, optim_args, lr_scheduler_type of PreferenceConfig",
        (None, (None, None)),
    ),
    "quantization_config": Argument(
        "load the model with mmdpo_trainers.models.loading.load_model (quantization=…), and pass it", (None,)
    ),
    "tokenizer": Argument("the model's processor, tokenizer and pictures in one, goes into processing_class"),
}
"""Arguments of TRL's `DPOTrainer` that `PreferenceTrainer` does not have."""


def takes_foreign_names(config: type[ConfigT]) -> type[ConfigT]:
    """Let a configuration's constructor know `ARGUMENTS`: a value that says what happens anyway is taken, another is a ValueError."""
    own: Any = config.__init__

    @functools.wraps(own)
    def __init__(self: Any, *args: Any, **values: Any) -> None:
        for name in ARGUMENTS.keys() & values.keys():
            ARGUMENTS[name].check(name, values.pop(name))
        own(self, *args, **values)

    config.__init__ = __init__  # type: ignore[assignment, method-assign]
    return config


def check_inherited(config: Any) -> None:
    """ValueError for a field of transformers' that would do nothing here."""
    for name, argument in INHERITED.items():
        if hasattr(config, name):
            argument.check(name, getattr(config, name))
    if config.train_sampling_strategy == "group_by_length":
        raise ValueError(
            f"train_sampling_strategy: expected 'random' or 'sequential', got 'group_by_length'; {ARGUMENTS['group_by_length'].instead}"
        )


def check_trainer_arguments(args: Any, others: Mapping[str, Any], config: type) -> None:
    """Raise for the trainer's own arguments: `args` of another trainer (ValueError), names that it does not have (TypeError if unknown)."""
    if not isinstance(args, config):
        raise ValueError(
            f"args: expected {config.__name__}, got {type(args).__name__}; {config.__name__} has the same names where it has the same "
            "thing (docs/from_trl.md)"
        )
    for name, value in others.items():
        if name in TRAINER_ARGUMENTS:
            TRAINER_ARGUMENTS[name].check(name, value)
        elif name in ARGUMENTS or name in {field.name for field in dataclasses.fields(config)}:
            raise ValueError(f"{name}: it is an argument of {config.__name__}; pass it there")
        else:
            raise TypeError(f"PreferenceTrainer got an unexpected argument {name!r}")
