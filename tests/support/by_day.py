"""What `make test` runs of the longest sweeps: cases that together go through all of their code. `make nightly` runs the others too.

On a GPU machine all run, since what is interpreted here takes no time there.
"""

from __future__ import annotations

import re

import pytest
import torch

NONE = r"(?!)"
CASES = {
    # A family that goes a way of its own each through every check, the others through what they declare.
    "trainers/test_every_family.py::test_every_family_is_exact": (
        r"^(llava|qwen2_5_vl|qwen3_5|gemma3|mllama)-|-(tree|prompts|mass|segments)$"
    ),
    "trainers/test_family_runs.py::test_other_families": r"gemma3",
    "trainers/test_mdpo_exactness.py::test_mdpo_equals_separate_sequences": r"llava|True-True",
    "trainers/test_both_ways_training.py::test_a_packed_step_is_the_padded_one": r"gemma.-mask|paligemma.?-crop",
    "trainers/test_router_loss.py::test_training_adds_a_mean_over_micro_batches": r"full",
    "trainers/test_hidden_images.py::test_hidden_keys_are_those_of_a_padded_model": r"^(gemma|llava|qwen|internvl|smolvlm)",
    # Every strategy shards in its own way; what they share is shown with one.
    "trainers/test_distributed_training.py::test_two_processes_end_as_one": r"zero3|fsdp2",
    "trainers/test_distributed_training.py::test_experts_in_two_processes": r"qwen3_5_moe-zero3|qwen3_vl_moe-fsdp2",
    "trainers/test_distributed_training.py::test_other_families": r"gemma4-fsdp2",
    "trainers/test_accelerate_launch.py::test_the_command_trains_as_one_process": NONE,
    "trainers/test_resume.py::test_killed_between_checkpoints": r"steps0-True|steps1-False",
    "trainers/test_resume.py::test_killed_while_a_checkpoint_is_written": r"mark_complete|_save_optimizer",
    "trainers/test_resume.py::test_truncated_checkpoint_is_passed_over": r"adapter_model",
    "trainers/test_run_end_to_end.py::test_killed_a_run_ends_as_an_undisturbed_one": r"generate-train",
    "trainers/test_mdpo_trainer.py::test_presets_are_settings": r"(mdpo|mia_dpo|bdhs|rated|sym_mpo|mpo)_paper",
    "trainers/test_mdpo_trainer.py::test_every_loss_trains": r"ipo|bco_pair|kto_pair|ancpo",
    "trainers/test_mdpo_trainer.py::test_mdpo_starts_at_three_log_two": r"True",
    "trainers/test_branches.py::test_a_cached_reference_changes_nothing": r"options[04]",
    "trainers/test_training_mode.py::test_noise_of_training_mode_reaches_neither_policy_nor_reference": r"True",
    "trainers/test_attention_target.py::test_gradient_is_autograds_through_eager_maps": r"options[02]",
    "trainers/test_quantized.py::test_a_step_is_the_dequantised_models": r"llava-(kept|reentrant)|qwen2_5_vl-not",
    "benchmarks/test_benchmark_runs.py::test_seeds_of_mia_dpo": NONE,
    # Kernels one instruction at a time.
    "kernels/test_compiled.py::test_families": NONE,
    "kernels/test_compiled.py::test_generate_with_a_compiled_forward": NONE,
    "kernels/test_triton_tree_attention.py::test_as_accurate_as_pytorch": (
        r"^(one token|ragged last.*|a branch skips its sibling's block|no row.*|window along.*|softcap|segments|more segments.*|"
        r"bfloat16|reach|reach, window.*|reach over.*|every token.*)$"
    ),
    "kernels/test_triton_tree_attention.py::test_same_bits_every_time": NONE,
    "kernels/test_triton_attention_mass.py::test_reach": (
        r"None-(plain|softcap)-pictures|mean-(window-prefix|softcap-pictures)|tokens-plain-prefix"
    ),
    "kernels/test_triton_attention_mass.py::test_sizes": r"^(?!odd)|odd-mean",
    "kernels/test_triton_attention_mass.py::test_forward_is_as_accurate_as_pytorch": r"^True-",
    "kernels/test_properties.py::test_large_scores_under_a_softcap": r"^3-|17-.*-native",
    "kernels/test_attention_mass.py::test_gradcheck": r"options2-mean|options1-None|options0-tokens",
}
"""Test -> cases for every run, an expression that is searched in their id."""


def leave_to_the_night(items: list[pytest.Item], root: str) -> None:
    """Mark the other cases `nightly`, before pytest chooses by marks."""
    if torch.cuda.is_available():
        return
    for item in items:
        name, _, case = item.nodeid.removeprefix(root).partition("[")
        by_day = CASES.get(name)
        if by_day is not None and not re.search(by_day, case.removesuffix("]")):
            item.add_marker(pytest.mark.nightly)
