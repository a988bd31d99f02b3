"""Generating with vLLM, by a double of its calls over the tiny model: the answers and perplexities of the transformers engine."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_double
from launches import launch
from prompt_records import make_prompts
from tiny_models import make_tiny_llava, make_tiny_qwen
from transformers import AutoConfig, GenerationConfig

from benchmarks.measure import RESULTS
from mmdpo_trainers.answers import server_engine, vllm_engine
from mmdpo_trainers.answers.transformers_engine import generate_responses
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.sections.endpoints import ServerConfig
from mmdpo_trainers.errors import ConfigError, RunFolderError, StageError
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.models.encode import encode_prompts, load_images
from mmdpo_trainers.models.families import FAMILIES, family_of
from mmdpo_trainers.models.families.conventional import OTHER_IN_VLLM
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.processes.parts import part_files
from mmdpo_trainers.run.pipeline import run_pipeline, run_stage
from mmdpo_trainers.stages import generate, score
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder

KINDS = [("sequence", 3), ("grid", 4), ("pip", 2), ("sequence", 2), ("single", 1)]
MAKERS: dict[str, Callable[[Path], Path]] = {"llava": make_tiny_llava, "qwen": make_tiny_qwen}


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    make_prompts(folder, KINDS)
    return folder / "prompts.jsonl"


def context_of(folder: Path, model: Path, prompts: Path, stage: str = "generate", **options: Any) -> StageContext:
    values = {"input": str(prompts), "max_new_tokens": 6, "batch_size": 2, **options}
    device = None if options.get("engine") == "vllm" else "cpu"
    config = RunConfig.from_dict({"model": str(model), "device": device, "generate": values})
    return StageContext(run=RunFolder(folder), config=config, stage=stage)


def answers(context: StageContext) -> list[dict[str, Any]]:
    generate.run(context)
    return list(read_jsonl(context.folder / "responses.jsonl"))


@pytest.fixture(scope="module", params=MAKERS)
def ending(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, prompts: Path) -> Path:
    """A model for which a token in the middle of an answer is the end token."""
    folder = MAKERS[request.param](tmp_path_factory.mktemp("ending"))
    [first, *_] = answers(context_of(tmp_path_factory.mktemp("run"), folder, prompts, record_attention=False))
    settings = GenerationConfig.from_pretrained(folder)
    settings.eos_token_id = first["response_ids"][2]
    settings.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("noise", ["none", "official_code"])
def test_answers_and_perplexity_are_those_of_transformers(
    tmp_path: Path, ending: Path, prompts: Path, noise: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = vllm_double.install(monkeypatch)
    expected = answers(context_of(tmp_path / "a", ending, prompts, noise=noise, record_attention=False))
    found = answers(context_of(tmp_path / "b", ending, prompts, noise=noise, engine="vllm", engine_args={"max_model_len": 500}))
    if noise == "none":
        assert any(answer["ended"] for answer in expected) and not all(answer["ended"] for answer in expected)
    for answer, other in zip(found, expected, strict=True):
        assert answer.pop("perplexity") == pytest.approx(other.pop("perplexity"), rel=1e-5)
        assert {**answer, "images": None} == {**other, "images": None}
    assert llm.made == [{"dtype": "float32", "images": 3, "max_model_len": 500}]


def test_score_measures_what_vllm_does_not_record(
    tmp_path: Path, llava: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_double.install(monkeypatch)
    scores = []
    for name, engine in (("a", "transformers"), ("b", "vllm")):
        answers(context_of(tmp_path / name, llava, prompts, engine=engine))
        context = context_of(tmp_path / name, llava, prompts, "score", engine=engine)
        assert score.run(context)["recorded"] == (0 if engine == "vllm" else len(KINDS))
        scores.append([record["ratio"] for record in read_jsonl(context.folder / "scores.jsonl")])
    assert scores[1] == pytest.approx(scores[0], rel=1e-4)


def test_sampling_has_a_seed_a_record(tmp_path: Path, llava: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The perplexity is of the likeliest tokens, also where others were taken; batches do not matter."""
    vllm_double.install(monkeypatch)
    sampled = {"engine": "vllm", "do_sample": True, "temperature": 2.0}
    first = answers(context_of(tmp_path / "a", llava, prompts, **sampled))
    again = answers(context_of(tmp_path / "b", llava, prompts, **sampled, batch_size=5))
    assert [answer["response_ids"] for answer in first] == [answer["response_ids"] for answer in again]
    greedy = answers(context_of(tmp_path / "c", llava, prompts, engine="vllm"))
    assert [answer["response_ids"] for answer in first] != [answer["response_ids"] for answer in greedy]
    assert all(1 < answer["perplexity"] < 50 for answer in first)


def test_several_answers_count_on_from_the_seed(
    tmp_path: Path, llava: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order of their numbers; the first is the only one's of a run with one."""
    vllm_double.install(monkeypatch)
    sampled = {"engine": "vllm", "do_sample": True, "temperature": 2.0}
    one = {answer["id"]: answer for answer in answers(context_of(tmp_path / "a", llava, prompts, **sampled))}
    for answer in answers(context_of(tmp_path / "b", llava, prompts, **sampled, num_answers=3, batch_size=5)):
        single = one[answer["id"]]
        assert len(answer["responses"]) == 3 and len(set(answer["responses"])) > 1
        assert [answer[name][0] for name in ("responses", "num_tokens", "ended")] == [
            single[name] for name in ("response", "num_tokens", "ended")
        ]
        assert answer["perplexity"][0] == pytest.approx(single["perplexity"], rel=1e-5)


def test_image_tokens_are_never_taken(llava: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_double.install(monkeypatch)
    engine = vllm_engine.VllmEngine(llava, dtype="auto", device="cpu", most_images=4, arguments={})
    records = list(read_jsonl(prompts))
    options: Any = {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "seeds": [0] * len(records)}
    options["pictures"] = [load_images(record) for record in records]
    [first, *_] = engine.generate_responses(records, max_new_tokens=1, **options)[0]["response_ids"]
    loaded = engine._llm.loaded
    favoured = loaded.model.lm_head.weight.detach().clone()
    favoured[loaded.image_token_id] = favoured[first] * 3
    monkeypatch.setattr(loaded.model.lm_head, "weight", torch.nn.Parameter(favoured))
    found = engine.generate_responses(records, max_new_tokens=6, **options)
    assert all(loaded.image_token_id not in answer["response_ids"] for answer in found)
    # Probabilities are those before the image token was ruled out, as with transformers.
    expected = generate_responses(loaded, records, max_new_tokens=6)
    assert [each["perplexity"] for each in found] == pytest.approx([each["perplexity"] for each in expected], rel=1e-5)


def test_vllm_that_is_not_installed(tmp_path: Path, llava: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    context = context_of(tmp_path, llava, prompts, engine="vllm")
    message = r"vllm is not installed here; pip install 'mmdpo-kernels\[vllm\]', or set it to transformers"
    for work in (lambda: generate.run(context), lambda: run_pipeline(context.config, until="generate")):
        with pytest.raises(ConfigError, match=message):
            work()


def broken(what: str) -> Callable[[Any, Any], Any]:
    def change(prompts: Any, outputs: Any) -> Any:
        for prompt, output in zip(prompts, outputs, strict=True):
            answer = output.outputs[0]
            if what == "prompt":
                output.prompt_token_ids = output.prompt_token_ids[1:]
            elif what == "a prompt of three":
                # The prompts of the first batch have one picture.
                if len(prompt["multi_modal_data"]["image"]) == 3:
                    output.prompt_token_ids = output.prompt_token_ids[1:]
            elif what == "cut":
                answer.token_ids, answer.logprobs = answer.token_ids[:2], answer.logprobs[:2]
            elif what == "logprobs":
                answer.logprobs = None
            elif what == "abort":
                answer.finish_reason = "abort"
            else:
                answer.finish_reason = "stop"
        return outputs

    return change


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (
            "prompt",
            r"vLLM reads the prompt as \d+ tokens, transformers as \d+, and they differ from token 0 on; set generate.engine",
        ),
        ("logprobs", "got finish_reason 'length', 6 tokens, log-probabilities of None"),
        ("abort", "got finish_reason 'abort'"),
        ("a prompt of three", r"record r0/sequence: vLLM reads the prompt as \d+ tokens"),
        (
            "cut",
            "vLLM cut the answer after 2 of 6 tokens, because .* longer than max_model_len; raise it in generate.engine_args",
        ),
        ("no end token", "expected vLLM's answer to end with an end token"),
    ],
)
def test_what_vllm_must_not_answer(
    tmp_path: Path, llava: Path, prompts: Path, what: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = vllm_double.install(monkeypatch)
    original = llm.generate
    monkeypatch.setattr(
        llm, "generate", lambda llm, prompts, *args, **options: broken(what)(prompts, original(llm, prompts, *args, **options))
    )
    with pytest.raises(StageError, match=message):
        answers(context_of(tmp_path, llava, prompts, engine="vllm"))


def test_a_model_that_vllm_cannot_load(tmp_path: Path, llava: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_double.install(monkeypatch)
    for arguments in ({"gpu_memory_utilization": 2.0}, {"no_such_argument": 1}):
        with pytest.raises(StageError, match="vLLM cannot load it .*see generate.engine_args, which are {'.*}, or set"):
            answers(context_of(tmp_path, llava, prompts, engine="vllm", engine_args=arguments))


def test_errors_of_a_batch_name_its_records(tmp_path: Path, llava: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt that is too long for vLLM, and one whose answer is cut."""
    vllm_double.install(monkeypatch)
    lengths = [*map(tokens_of(llava), read_jsonl(prompts))]
    too_long = r"records r0/sequence: vLLM cannot answer them \(The decoder prompt \(length \d+\) is longer .* which are {'max"
    for longest, message in ((max(lengths) - 1, too_long), (max(lengths) + 2, "vLLM cut the answer after 2 of 6 tokens")):
        with pytest.raises(StageError, match=message):
            answers(context_of(tmp_path / str(longest), llava, prompts, engine="vllm", engine_args={"max_model_len": longest}))


def test_settings_that_vllm_would_not_follow(tmp_path: Path, llava: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm_double.install(monkeypatch)
    context = context_of(tmp_path, llava, prompts, engine="vllm", do_sample=True, temperature=0.001)
    with pytest.raises(ConfigError, match="generate.temperature: vLLM samples at 0.01 or more, got 0.001"):
        generate.run(context)
    context = context_of(tmp_path, llava, prompts, engine="vllm")
    context.config.device = "cpu"
    for work in (lambda: generate.run(context), lambda: run_pipeline(context.config, until="generate")):
        with pytest.raises(ConfigError, match="device: expected none, cuda or cuda:N with generate.engine: vllm"):
            work()


def test_a_family_whose_answers_are_others_is_refused(
    tmp_path: Path, llava: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before any work, and where the engine is started; a server, which need not be vLLM, is warned of."""
    llm = vllm_double.install(monkeypatch)
    monkeypatch.setattr(FAMILIES["llava"], "other_in_vllm", "other tokens")
    message = (
        "{}.engine: expected transformers for a model of family 'llava', got vllm, which gives other tokens .docs/generation"
    )
    context = context_of(tmp_path, llava, prompts, engine="vllm")
    for work in (lambda: generate.run(context), lambda: run_pipeline(context.config, until="generate")):
        with pytest.raises(ConfigError, match=message.format("generate")):
            work()
    with pytest.raises(ConfigError, match=message.format("rate")):
        vllm_engine.VllmEngine(llava, dtype="auto", device="auto", most_images=1, arguments={}, section="rate")
    assert llm.made == []
    said: list[str] = []
    monkeypatch.setattr(server_engine.logger, "warning", lambda text, *values: said.append(text % values))
    server_engine.ServerEngine(llava, ServerConfig(), kept=tmp_path)
    assert said == [
        "family 'llava': vLLM gives other tokens (docs/generation.md); where the server is one, set generate.engine to transformers"
    ]


def test_those_are_the_ones_that_were_measured_to_differ() -> None:
    """A family is refused if, and only if, the committed table says that its answers or perplexities are others."""
    table = json.loads((RESULTS / "vllm_families.json").read_text(encoding="utf-8"))["families"]
    differing = {
        name
        for name, row in table.items()
        if any("same" in found and (found["same"] < found["prompts"] or found["perplexity"] > 0.01) for found in row.values())
    }
    assert {*OTHER_IN_VLLM, *(name for name, family in FAMILIES.items() if family.other_in_vllm)} == differing
    assert all(family_of(AutoConfig.for_model(name)).other_in_vllm for name in differing)


def test_the_tokenizers_end_token_is_not_the_models(llava: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what ends an answer with transformers ends it with vLLM."""
    vllm_double.install(monkeypatch)
    engine = vllm_engine.VllmEngine(llava, dtype="auto", device="auto", most_images=4, arguments={})
    records = list(read_jsonl(prompts))
    expected = generate_responses(engine._llm.loaded, records, max_new_tokens=6)
    engine._llm.eos = expected[0]["response_ids"][2]
    assert engine._llm.eos not in engine.config_only.end_ids
    found = engine.generate_responses(
        records, max_new_tokens=6, do_sample=False, temperature=1.0, top_p=1.0, seeds=[0] * len(records),
        pictures=[load_images(record) for record in records],
    )  # fmt: skip
    assert [answer["response_ids"] for answer in found] == [answer["response_ids"] for answer in expected]


def test_more_memory_continues_a_stage_and_another_quantization_does_not(
    tmp_path: Path, llava: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = vllm_double.install(monkeypatch)
    original, batches = llm.generate, 0

    def second_fails(*args: Any, **options: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(*args, **options)

    monkeypatch.setattr(llm, "generate", second_fails)
    context = lambda **arguments: context_of(tmp_path, llava, prompts, engine="vllm", engine_args=arguments)  # noqa: E731
    with pytest.raises(StageError, match="vLLM cannot answer them .CUDA out of memory.; see generate.engine_args, which are"):
        run_stage(context(gpu_memory_utilization=0.9))
    with pytest.raises(RunFolderError, match="made with other settings .generate.engine_args"):
        run_stage(context(quantization="fp8"))
    assert run_stage(context(gpu_memory_utilization=0.8, max_model_len=500))["responses"]
    assert batches == 2 + 2


def test_auto_is_the_type_that_transformers_takes(tmp_path: Path, llava: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where config.json names none: that of the first floating weight, in one file or in several."""
    llm = vllm_double.install(monkeypatch)
    model = load_model(llava).model.to(torch.bfloat16)
    for name, size in (("whole", "1GB"), ("parts", "20KB")):
        folder = Path(shutil.copytree(llava, tmp_path / name))
        for file in folder.glob("*.safetensors"):
            file.unlink()
        model.save_pretrained(folder, max_shard_size=size)
        without_dtype(folder / "config.json")
        assert len(list(folder.glob("*.safetensors"))) == 1 or name == "parts"
        assert load_model(folder).dtype == torch.bfloat16
        vllm_engine.VllmEngine(folder, dtype="auto", device="auto", most_images=1, arguments={})
    assert [made["dtype"] for made in llm.made] == ["bfloat16", "bfloat16"]
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(StageError, match="expected a number type in config.json, or safetensors weights in float64, .*set dtype"):
        vllm_engine.VllmEngine(folder, dtype="auto", device="auto", most_images=1, arguments={})


def without_dtype(path: Path) -> None:
    def stripped(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: stripped(each) for name, each in value.items() if name not in ("dtype", "torch_dtype")}

    path.write_text(json.dumps(stripped(json.loads(path.read_text()))))


def tokens_of(folder: Path) -> Callable[[dict[str, Any]], int]:
    loaded = load_model(folder, device="cpu")
    return lambda record: encode_prompts(loaded, [record], padding_side="left").inputs["input_ids"].shape[1]


def generate_beside_others(folder: Path, model: Path, prompts: Path, rank: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        llm = vllm_double.install(patch)
        original = llm.__init__

        def made(self: Any, *args: Any, **options: Any) -> None:
            assert "WORLD_SIZE" not in os.environ and "MASTER_PORT" not in os.environ, "vLLM would look for the launcher's store"
            original(self, *args, **options)

        patch.setattr(llm, "__init__", made)
        generate.run(context_of(folder, model, prompts, engine="vllm"))
        assert llm.made


def test_several_processes_have_a_vllm_each(tmp_path: Path, llava: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launch(2, partial(generate_beside_others, tmp_path / "b", llava, prompts)) == [0, 0]
    vllm_double.install(monkeypatch)
    path = context_of(tmp_path / "b", llava, prompts, engine="vllm").folder / "responses.jsonl"
    assert list(read_jsonl(path)) == answers(context_of(tmp_path / "a", llava, prompts, engine="vllm"))
    assert part_files(path) == []


def test_a_process_shows_vllm_its_own_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    for shown, expected in ((None, "2"), ("4,5,6,7", "6"), ("GPU-a,GPU-b,GPU-c", "GPU-c")):
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        if shown:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", shown)
        before = dict(os.environ)
        with vllm_engine._own_environment("cuda:2"):
            assert os.environ["CUDA_VISIBLE_DEVICES"] == expected and "TORCHELASTIC_USE_AGENT_STORE" not in os.environ
        assert dict(os.environ) == before
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with (
        pytest.raises(ConfigError, match="cuda:1 is not among the 1 GPUs that CUDA_VISIBLE_DEVICES shows .0., counted from 0"),
        vllm_engine._own_environment("cuda:1"),
    ):
        pass
