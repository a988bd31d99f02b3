"""Models in 4 bits (QLoRA): exact against the same model with the dequantised weights, saved, read back, merged; and what is refused."""

from __future__ import annotations

import copy
import json
import math
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from tiny_models import TINY
from torch import nn
from training_cases import Gradients, config, preference_records, warm_adapter
from transformers import BitsAndBytesConfig

from mmdpo_kernels import patch_model
from mmdpo_trainers.answers.vllm_engine import check_vllm
from mmdpo_trainers.checks.training import preference_batch
from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.cli.flags import configuration
from mmdpo_trainers.config.run_config import RunConfig, merge
from mmdpo_trainers.config.sections.quantization import QuantizationConfig
from mmdpo_trainers.errors import ConfigError, StageError
from mmdpo_trainers.models import quantized
from mmdpo_trainers.models.encode import encode_prompts
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.models.merged import save_merged
from mmdpo_trainers.training import head, quantized_models
from mmdpo_trainers.training.reference.model_hash import model_fingerprint, reference_header
from mmdpo_trainers.training.reward.config import RewardConfig
from mmdpo_trainers.training.reward.inputs import RewardInputs
from mmdpo_trainers.training.reward.model import RewardModel
from mmdpo_trainers.training.reward.trainer import RewardTrainer
from mmdpo_trainers.training.trainer import PreferenceTrainer

FOUR = QuantizationConfig(load_in_4bit=True)
FAMILIES = ("llava", "qwen2_5_vl")
MDPO = ["sigmoid", "copo", "ancpo"]
CHECKPOINTING: dict[str, dict[str, Any]] = {
    "kept": {},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "not reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {family: TINY[family](root / family) for family in FAMILIES}


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, folders: dict[str, Path]) -> Path:
    return folders[request.param]


@pytest.fixture
def llava(folders: dict[str, Path]) -> Path:
    return folders["llava"]


def in_4_bits(folder: Path, dtype: torch.dtype = torch.float32, **options: Any) -> LoadedModel:
    return load_model(folder, dtype=dtype, device="cpu", quantization=QuantizationConfig(load_in_4bit=True, **options))


def dequantized(folder: Path) -> LoadedModel:
    """The whole model with the weights that the 4-bit one computes with, in `torch.nn.Linear`."""
    loaded = load_model(folder, dtype=torch.float32, device="cpu")
    for name, layer in quantized.quantized_layers(in_4_bits(folder).model).items():
        weight: Any = layer.weight
        whole = loaded.model.get_submodule(name)
        assert type(whole) is nn.Linear
        values = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        # Of so small weights double quantisation rounds the scales a good deal too.
        assert 0.01 < (values - whole.weight).norm() / whole.weight.norm() < 0.5
        whole.weight.data.copy_(values)
    return loaded


def trainer_of(loaded: LoadedModel, output: Path, *, warm: bool = True, model: Any = None, **options: Any) -> PreferenceTrainer:
    adapter, reference = options.pop("adapter", None), options.pop("reference", None)
    trainer = PreferenceTrainer(
        loaded.model if model is None else model,
        config(output, **{"loss_type": MDPO, **options}),
        processing_class=loaded.processor,
        train_dataset=preference_records(4),
        peft_config=adapter,
        ref_model=reference,
    )
    if warm:
        warm_adapter(trainer)
    return trainer


def step(loaded: LoadedModel, output: Path, **options: Any) -> tuple[dict[str, Any], dict[str, torch.Tensor], PreferenceTrainer]:
    """What one optimizer step logs, its gradients, and the trainer."""
    trainer, gradients = trainer_of(loaded, output, **options), Gradients()
    trainer.add_callback(gradients)
    trainer.train()
    (entry,) = [entry for entry in trainer.state.log_history if "loss" in entry]
    return entry, gradients.steps[0], trainer


def logps(loaded: LoadedModel, model: Any = None) -> torch.Tensor:
    """(n, b) log-probabilities of the records, in one tree."""
    batch = preference_batch(loaded, packing=True, records=preference_records(4))
    return head.batch_logps(patch_model(loaded.model if model is None else model), batch)


def test_the_language_tower_alone_is_in_4_bits(folder: Path) -> None:
    model: Any = in_4_bits(folder).model
    decoder = next(name for name, module in model.named_modules() if module is model.get_decoder())
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    found = quantized.quantized_layers(model)
    assert set(found) == {name for name in linears if name.startswith(f"{decoder}.")} != set() and linears - set(found)
    for layer in found.values():
        assert isinstance(layer, bitsandbytes.nn.Linear4bit) and layer.compute_dtype == torch.float32
        assert layer.weight.quant_type == "nf4" and layer.weight.quant_state.nested
        assert not layer.support_avx512bf16_for_cpu
    assert quantized.float_dtype(model) == torch.float32 == model.config.quantization_config.bnb_4bit_compute_dtype


def test_what_the_settings_say_is_what_is_made(llava: Path) -> None:
    options = {"bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": False, "llm_int8_skip_modules": ["o_proj"]}
    model = in_4_bits(llava, torch.bfloat16, bnb_4bit_compute_dtype="float32", **options).model
    found = quantized.quantized_layers(model)
    assert found and not any(name.endswith("o_proj") for name in found)
    for layer in found.values():
        weight: Any = layer.weight
        assert layer.compute_dtype == torch.float32 and weight.quant_type == "fp4" and not weight.quant_state.nested
    assert quantized.float_dtype(model) == torch.bfloat16
    own = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
    everywhere = load_model(llava, dtype="bfloat16", device="cpu", quantization=own).model
    assert len(quantized.quantized_layers(everywhere)) > len(found)
    assert next(iter(quantized.quantized_layers(everywhere).values())).compute_dtype == torch.bfloat16


def test_a_tied_head_stays_whole(tmp_path: Path) -> None:
    model: Any = in_4_bits(TINY["qwen2_5_vl"](tmp_path / "model", tied=True)).model
    assert quantized.quantized_layers(model)
    assert type(model.get_output_embeddings()) is nn.Linear
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


@pytest.mark.smoke
def test_logits_and_answers_are_the_dequantised_models(folder: Path) -> None:
    """In evaluation mode too, where bitsandbytes would round to bfloat16 on some CPUs."""
    ours, oracle = in_4_bits(folder), dequantized(folder)
    records = [
        {"id": "a", "prompt": record["prompt"][0]["content"], "images": record["images"]} for record in preference_records(3)
    ]
    inputs = encode_prompts(ours, records, padding_side="left").inputs
    for patched in (False, True):
        for loaded in (ours, oracle):
            if patched:
                patch_model(loaded.model)
        with torch.no_grad():
            assert torch.equal(ours.model(**inputs).logits, oracle.model(**inputs).logits)
        answers = [loaded.model.generate(**inputs, max_new_tokens=5, do_sample=False) for loaded in (ours, oracle)]
        assert torch.equal(*answers)
    whole = load_model(folder, dtype=torch.float32, device="cpu")
    with torch.no_grad():
        assert (ours.model(**inputs).logits - whole.model(**inputs).logits).abs().max() > 1e-3


@pytest.mark.smoke
@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_a_step_is_the_dequantised_models(folder: Path, tmp_path: Path, kind: str) -> None:
    """mDPO's three branches in a tree, with the reference beside the policy: losses, rewards and gradients, float32."""
    found, gradients, trainer = step(in_4_bits(folder), tmp_path / "ours", **CHECKPOINTING[kind])
    expected, theirs, _ = step(dequantized(folder), tmp_path / "oracle", **CHECKPOINTING[kind])
    for name in ("loss", *(name for name in expected if name.startswith(("rewards/", "logps/")))):
        assert found[name] == pytest.approx(expected[name], rel=1e-6, abs=1e-6), name
    assert gradients.keys() == theirs.keys() and any("layers.0" in name for name in gradients)
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, theirs[name], rtol=1e-5, atol=1e-6 * float(theirs[name].abs().max())), name
        assert gradient.abs().max() > 0
    assert {type(module).__name__ for module in trainer.model.modules() if hasattr(module, "lora_A")} == {"Linear4bit"}
    assert not any(p.requires_grad for p in trainer.model.parameters() if quantized.is_quantized(p))


def test_a_cached_reference_is_the_model_with_its_adapter_off(llava: Path, tmp_path: Path) -> None:
    """The pass without gradients, after which a layer packed for the CPU would have none."""
    found = [step(in_4_bits(llava), tmp_path / str(kept), precompute_ref_log_probs=kept)[:2] for kept in (False, True)]
    (entry, gradients), (cached, others) = found
    assert cached["loss"] == pytest.approx(entry["loss"], rel=1e-6) and abs(entry["loss"] - 2.0794) > 1e-3
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, others[name], rtol=1e-4, atol=1e-6), name


def test_the_hash_is_of_the_quantised_weights(llava: Path) -> None:
    loaded = in_4_bits(llava)
    header = reference_header(loaded.model)
    logps(loaded)
    assert reference_header(loaded.model) == header == reference_header(in_4_bits(llava).model)
    adapted = get_peft_model(loaded.model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    assert model_fingerprint(adapted) == header["weights"]
    others = [
        load_model(llava, dtype=torch.float32, device="cpu").model,
        in_4_bits(llava, bnb_4bit_quant_type="fp4").model,
        in_4_bits(llava, bnb_4bit_use_double_quant=False).model,
        in_4_bits(llava, llm_int8_skip_modules=["o_proj"]).model,
    ]
    assert len({header["weights"], *(model_fingerprint(model) for model in others)}) == 5
    with torch.no_grad():
        next(iter(quantized.quantized_layers(loaded.model).values())).weight.data[0] ^= 1
    assert model_fingerprint(loaded.model) != header["weights"]
    lower = reference_header(in_4_bits(llava, bnb_4bit_compute_dtype="bfloat16").model)
    assert lower["weights"] == header["weights"] and lower["config"] != header["config"]


def test_saved_read_back_and_merged(folder: Path, tmp_path: Path) -> None:
    """On the model in 4 bits it is the policy, bit for bit; in the whole model each weight is W + scaling B A."""
    loaded = in_4_bits(folder)
    trainer = trainer_of(loaded, tmp_path / "output")
    trainer.save_model(str(tmp_path / "final"))
    policy = logps(loaded, trainer.model.eval())
    assert json.loads((tmp_path / "final" / "quantization.json").read_text())["load_in_4bit"] is True
    again = load_model(folder, adapter=tmp_path / "final", dtype=torch.float32, device="cpu", quantization=FOUR)
    assert len(quantized.quantized_layers(again.model)) > 0 and not isinstance(again.model, PeftModel)
    assert torch.equal(logps(again), policy)
    whole = load_model(folder, dtype=torch.float32, device="cpu")
    before = {name: value.clone() for name, value in whole.model.state_dict().items()}
    merged = save_merged(folder, tmp_path / "final", tmp_path / "merged", dtype="float32")
    read = load_model(merged, dtype=torch.float32, device="cpu")
    settings, changed = trainer.model.peft_config["default"], 0
    adapted = dict(trainer.model.get_base_model().named_modules())
    for name, value in read.model.state_dict().items():
        layer: Any = adapted.get(name.removesuffix(".weight"))
        if name.endswith(".weight") and hasattr(layer, "lora_A"):
            delta = layer.lora_B["default"].weight @ layer.lora_A["default"].weight * (settings.lora_alpha / settings.r)
            assert torch.equal(value, before[name] + delta), name
            changed += 1
        else:
            assert torch.equal(value, before[name]), name
    assert changed == len(quantized.quantized_layers(loaded.model))
    # What 4 bits round away, and no more.
    assert 1e-4 < (logps(read) - policy).abs().max() < 0.2 * policy.abs().max()
    with pytest.raises(StageError, match="merged holds something already"):
        save_merged(folder, tmp_path / "final", tmp_path / "merged")


def test_a_stopped_training_goes_on(llava: Path, tmp_path: Path) -> None:
    settings = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "warm": False}
    whole = trainer_of(in_4_bits(llava), tmp_path / "whole", **settings)
    whole.train()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "last")
    assert (tmp_path / "last" / "quantization.json").is_file()
    again = trainer_of(in_4_bits(llava), tmp_path / "whole", **settings)
    again.train(resume_from_checkpoint="auto")
    assert again.state.global_step == 2
    for name, value in again.model.named_parameters():
        assert torch.equal(value, whole.model.get_parameter(name)), name


def test_a_checkpoint_in_4_bits_is_taken_as_it_is(llava: Path, tmp_path: Path) -> None:
    loaded = in_4_bits(llava)
    loaded.model.save_pretrained(tmp_path / "small")
    loaded.processor.save_pretrained(tmp_path / "small")
    again = load_model(tmp_path / "small", dtype=torch.float32, device="cpu")
    assert model_fingerprint(again.model) == model_fingerprint(loaded.model)
    assert torch.equal(logps(again), logps(loaded))
    entry, _, _ = step(again, tmp_path / "output", model=str(tmp_path / "small"))
    expected, _, _ = step(in_4_bits(llava), tmp_path / "expected")
    assert entry["loss"] == pytest.approx(expected["loss"], rel=1e-6)
    with pytest.raises(StageError, match="quantised already.*bitsandbytes_4bit.*leave quantization out"):
        load_model(tmp_path / "small", device="cpu", quantization=FOUR)
    with pytest.raises(StageError, match="merged into whole weights, and these are in 4 bits"):
        save_merged(tmp_path / "small", tmp_path, tmp_path / "merged")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, "are quantised .*: gptq.*expected float32"),
        ({"quant_method": "awq", "bits": 4}, "are quantised .*: awq"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes_8bit.*whole columns of a batch"),
    ],
)
def test_checkpoints_that_are_quantised_otherwise_are_refused(llava: Path, tmp_path: Path, settings: Any, message: str) -> None:
    for file in llava.iterdir():
        (tmp_path / file.name).symlink_to(file)
    values = json.loads((llava / "config.json").read_text())
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({**values, "quantization_config": settings}))
    with pytest.raises(StageError, match=message):
        load_model(tmp_path, device="cpu")


def test_a_model_of_the_users_own_gets_the_same_checks(llava: Path, tmp_path: Path) -> None:
    loaded = in_4_bits(llava)
    adapters = {
        "modules_to_save: expected whole weights.*'o_proj', of which .*o_proj is in 4 bits": LoraConfig(
            r=2, target_modules=["q_proj"], modules_to_save=["o_proj"]
        ),
        "modules_to_save: .*'layers.1.mlp', of which .*layers.1.mlp.gate_proj": LoraConfig(
            r=2, target_modules=["q_proj"], modules_to_save=["layers.1.mlp"]
        ),
        "init_lora_weights='olora' changes the model's own layers, which are in 4 bits": LoraConfig(
            r=2, target_modules=["q_proj"], init_lora_weights="olora"
        ),
        "expected a kind that PEFT has for 4-bit weights, such as LoRA, got peft.tuners.loha": LoHaConfig(
            r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"
        ),
    }
    for message, adapter in adapters.items():
        with pytest.raises(ValueError, match=message):
            trainer_of(loaded, tmp_path, adapter=adapter, reference=dequantized(llava).model)
    with pytest.raises(ValueError, match="full_finetune: the model's weights are in 4 bits"):
        trainer_of(loaded, tmp_path, full_finetune=True)
    # Nothing of these was left in the model.
    saved = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    trainer_of(loaded, tmp_path, adapter=saved, warm=False).train()


def test_a_quantised_head_is_refused(llava: Path, tmp_path: Path) -> None:
    own = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=["vision_tower"])
    with pytest.raises(StageError, match="output head: expected whole weights.*llm_int8_skip_modules"):
        load_model(llava, dtype=torch.float32, device="cpu", quantization=own)
    loaded = in_4_bits(llava)
    model = type(loaded.model).from_pretrained(llava, dtype=torch.float32, quantization_config=own, device_map={"": "cpu"})
    with pytest.raises(ValueError, match="output head: expected whole weights.*llm_int8_skip_modules"):
        trainer_of(loaded, tmp_path, model=model)


def test_8_bits_are_refused(llava: Path, tmp_path: Path) -> None:
    own = BitsAndBytesConfig(load_in_8bit=True)
    with pytest.raises(StageError, match="quantization: expected load_in_4bit, got llm_int8.*whole columns"):
        load_model(llava, dtype=torch.float32, device="cpu", quantization=own)
    loaded = in_4_bits(llava)
    model = type(loaded.model).from_pretrained(llava, dtype=torch.float32, quantization_config=own, device_map={"": "cpu"})
    with pytest.raises(ValueError, match="model: expected whole weights, or bitsandbytes' 4 bits, got 8 bits at .*_proj"):
        trainer_of(loaded, tmp_path, model=model)


def test_weights_that_a_cpu_repacked_are_refused(llava: Path, tmp_path: Path) -> None:
    loaded = in_4_bits(llava)
    model = copy.deepcopy(loaded.model)
    next(iter(quantized.quantized_layers(model).values())).weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ValueError, match="the 4-bit weight of .* was repacked, and rounded"):
        trainer_of(loaded, tmp_path, model=model)


def test_shards_are_refused(llava: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(tmp_path)
    for stage, refused in ((2, False), (3, True)):
        settings.deepspeed_plugin = SimpleNamespace(zero_stage=stage)
        with pytest.raises(ValueError, match="deepspeed: expected the whole model in each process") if refused else nullcontext():
            quantized_models.check_settings(settings)
    loaded = in_4_bits(llava)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fsdp: expected the whole model in each process with 4-bit weights"):
        trainer_of(loaded, tmp_path)


def test_float64_and_a_missing_package_are_refused(llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StageError, match="dtype: 4-bit weights compute in float32, bfloat16 or float16, got float64"):
        in_4_bits(llava, torch.float64)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *_: None if name == "bitsandbytes" else object())
    with pytest.raises(
        StageError, match=r"bitsandbytes, which 4-bit weights need, is not installed here; pip install 'mmdpo-kernels\[qlora\]'"
    ):
        in_4_bits(llava)


def test_a_reward_model_is_read_back_in_4_bits(llava: Path, tmp_path: Path) -> None:
    loaded = in_4_bits(llava)
    args = config(tmp_path / "output", kind=RewardConfig)
    trainer = RewardTrainer(loaded.model, args, processing_class=loaded.processor, train_dataset=preference_records(4))
    warm_adapter(trainer)
    trainer.save_model(str(tmp_path / "final"))
    trainer.model.eval()
    again = RewardModel.load(tmp_path / "final", dtype="float32", device="cpu")
    assert quantized.quantized_layers(again.loaded.model)
    records = [{"id": "a", "prompt": "is there a star ?", "images": []}]
    (found,) = again.rewards(records, [["yes", "no it is not"]])
    live = LoadedModel(model=trainer.model, processor=loaded.processor, path=llava)
    assert RewardModel(live, RewardInputs()).rewards(records, [["yes", "no it is not"]]) == [found]
    (tmp_path / "final" / "quantization.json").unlink()
    (whole,) = RewardModel.load(tmp_path / "final", dtype="float32", device="cpu").rewards(records, [["yes", "no it is not"]])
    assert whole != pytest.approx(found, abs=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load_in_8bit": True}, "quantization.load_in_8bit: expected false.*packed with; set load_in_4bit"),
        ({"bnb_4bit_quant_type": "fp4"}, "quantization.bnb_4bit_quant_type: it does nothing without"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "int4"}, "quantization.bnb_4bit_quant_type must be one of nf4, fp4"),
        ({"load_in_4bit": "yes"}, "quantization.load_in_4bit must be true or false"),
        ({"load_in_4bits": True}, "unknown key 'quantization.load_in_4bits'; did you mean 'quantization.load_in_4bit'"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RunConfig.from_dict({"quantization": settings})


def test_the_command_line_takes_the_settings_as_one_flag() -> None:
    options = cli.make_parser().parse_args(
        ["train", "--run", "somewhere", "--quantization", "{load_in_4bit: true, bnb_4bit_quant_type: fp4}"]
    )
    found = configuration(options, Path("somewhere/config.yaml")).quantization
    assert found == QuantizationConfig(load_in_4bit=True, bnb_4bit_quant_type="fp4")
    options = cli.make_parser().parse_args(["train", "--run", "somewhere", "--quantization", "{load_in_8bit: true}"])
    with pytest.raises(ConfigError, match="load_in_8bit: expected false"):
        configuration(options, Path("somewhere/config.yaml"))


def test_vllm_would_answer_with_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda *_: object())
    config = RunConfig.from_dict({"quantization": {"load_in_4bit": True}, "generate": {"engine": "vllm"}})
    with pytest.raises(ConfigError, match="vllm would answer with the whole model.*quantization: bitsandbytes"):
        check_vllm(config)
    check_vllm(RunConfig.from_dict(merge(config.to_dict(), {"generate": {"engine_args": {"quantization": "bitsandbytes"}}})))


def test_the_checks_of_a_family_hold_in_4_bits(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Packed trees, recorded attention and answers against the unpatched model; gradients with checkpointing against those without."""
    names = "parity,mass,tree,gradients,heads,unpatch"
    given = ["--model", str(folder), "--dtype", "float32", "--device", "cpu", "--quantization", "{load_in_4bit: true}"]
    assert cli.main(["check", *given, "--only", names, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["in_4_bits"] and [each["verdict"] for each in found["checks"]] == ["exact"] * 6


def test_bfloat16_starts_where_the_reference_is(llava: Path, tmp_path: Path) -> None:
    """As on a GPU: quantised, computed and adapted in bfloat16 under autocast, the adapter in float32."""
    loaded = in_4_bits(llava, torch.bfloat16)
    assert {layer.compute_dtype for layer in quantized.quantized_layers(loaded.model).values()} == {torch.bfloat16}
    entry, gradients, trainer = step(loaded, tmp_path, warm=False, bf16=True)
    assert entry["loss"] == pytest.approx(3 * math.log(2), rel=1e-6) and entry["rewards/margins"] == 0
    assert {gradient.dtype for gradient in gradients.values()} == {torch.float32}
    assert all(gradient.isfinite().all() for gradient in gradients.values())
