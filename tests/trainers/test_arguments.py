"""Arguments under names that mean something else here: taken, or refused with the word that is used here."""

from __future__ import annotations

import dataclasses
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
from training_cases import config

from mmdpo_trainers.training.arguments import ARGUMENTS, INHERITED, TRAINER_ARGUMENTS, TRL_LOSSES, check_trainer_arguments
from mmdpo_trainers.training.config import LOSS_TYPES, PreferenceConfig


def test_every_field_of_trls_configuration_is_known() -> None:
    """A field that TRL adds belongs into `PreferenceConfig` or into `ARGUMENTS`."""
    trl = pytest.importorskip("trl", reason="TRL is a peer, installed with the extra `peers`")
    theirs = {field.name: field for field in dataclasses.fields(trl.DPOConfig)}
    ours = {field.name for field in dataclasses.fields(PreferenceConfig)}
    assert not theirs.keys() - ours - ARGUMENTS.keys()
    assert not ours & ARGUMENTS.keys()
    losses = set(re.findall(r"`'(\w+)'`", theirs["loss_type"].metadata["help"]))
    assert len(losses) > 10 and losses <= {*LOSS_TYPES, *TRL_LOSSES} and not TRL_LOSSES.keys() & set(LOSS_TYPES)


def test_every_argument_of_trls_trainer_is_known() -> None:
    import inspect

    trl = pytest.importorskip("trl", reason="TRL is a peer, installed with the extra `peers`")
    from mmdpo_trainers.training.trainer import PreferenceTrainer

    theirs, ours = (inspect.signature(each.__init__).parameters.keys() for each in (trl.DPOTrainer, PreferenceTrainer))
    assert not theirs - ours - TRAINER_ARGUMENTS.keys()


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_values_that_say_what_happens_anyway_are_taken_and_others_refused(tmp_path: Path, name: str) -> None:
    for value in ARGUMENTS[name].takes:
        assert not hasattr(config(tmp_path, **{name: value}), name)
    with pytest.raises(ValueError, match=f"^{name}: .*{re.escape(ARGUMENTS[name].instead)}$"):
        config(tmp_path, **{name: "something else"})


OTHERS: dict[str, tuple[dict[str, Any], str]] = {
    "dropout": ({"disable_dropout": False}, "disable_dropout: expected True, got False; dropout is always off"),
    "not a number for a flag": ({"padding_free": 0}, "padding_free: expected False, got 0"),
    "cutting": ({"truncation_mode": "keep_start"}, "truncation_mode: sequences are never cut here; too_long says"),
    "sft": ({"loss_type": ["sigmoid", "sft"]}, "loss_type: .*; sft: here it is 'nll'$"),
    "normalised": ({"loss_type": "sigmoid_norm"}, "sigmoid_norm: here it is 'sigmoid' with length_normalised=True$"),
    "aot": ({"loss_type": ["aot"]}, "aot: it is not here; stay with TRL's DPOTrainer for it$"),
    "neftune": ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: expected None, got 5.0; noise on the embeddings"),
    "smoothing": ({"label_smoothing_factor": 0.1}, "label_smoothing_factor: .*label_smoothing acts on the losses cdpo"),
    "liger": ({"use_liger_kernel": True}, "use_liger_kernel: expected False, got True; head and losses have kernels"),
    "metrics": ({"include_for_metrics": ["inputs"]}, "include_for_metrics: .*there is no compute_metrics here"),
    "tokens": ({"include_num_input_tokens_seen": "all"}, "include_num_input_tokens_seen: .*token trees hold"),
    "lengths": ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy: .*max_tokens_per_batch"),
}


@pytest.mark.parametrize("case", list(OTHERS))
def test_refusals_name_the_word_that_is_used_here(tmp_path: Path, case: str) -> None:
    options, message = OTHERS[case]
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_a_name_that_nobody_knows_is_pythons_to_refuse(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="no_such_argument"):
        config(tmp_path, no_such_argument=1)


def test_transformers_defaults_of_what_is_refused_are_taken(tmp_path: Path) -> None:
    defaults = config(tmp_path)
    for name in INHERITED.keys() & {field.name for field in dataclasses.fields(PreferenceConfig)}:
        INHERITED[name].check(name, getattr(defaults, name))


def test_checkpointing_is_handed_on_by_the_name_that_transformers_has_for_it(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        args = config(tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False})
    names = [name for name in ("gradient_checkpointing", "activation_checkpointing") if hasattr(args, name)]
    assert [getattr(args, name) for name in names] == [True] * len(names)
    assert [getattr(args, f"{name}_kwargs") for name in names] == [{"use_reentrant": False}] * len(names)
    assert config(tmp_path).gradient_checkpointing is False


def test_arguments_of_the_trainer(tmp_path: Path) -> None:
    args = config(tmp_path)
    check_trainer_arguments(args, {"compute_metrics": None, "optimizers": (None, None)}, PreferenceConfig)
    for name, message in (
        ("compute_metrics", "compute_metrics: .*are in the evaluation's log already"),
        ("tokenizer", "tokenizer: the model's processor.*goes into processing_class"),
        ("beta", "beta: it is an argument of PreferenceConfig"),
        ("disable_dropout", "disable_dropout: it is an argument of PreferenceConfig"),
    ):
        with pytest.raises(ValueError, match=message):
            check_trainer_arguments(args, {name: object()}, PreferenceConfig)
    with pytest.raises(TypeError, match="unexpected argument 'no_such'"):
        check_trainer_arguments(args, {"no_such": 1}, PreferenceConfig)
    with pytest.raises(ValueError, match="args: expected PreferenceConfig, got TrainingArguments"):
        from transformers import TrainingArguments

        check_trainer_arguments(TrainingArguments(str(tmp_path), use_cpu=True), {}, PreferenceConfig)
