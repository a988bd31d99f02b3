"""vLLM itself, in the environment of `make test-vllm`: the double's signatures, and answers of transformers from what `mmdpo export` writes."""

from __future__ import annotations

import dataclasses
import inspect
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_double
import vllm_models
from exported_run import make_adapter
from prompt_records import make_prompts
from transformers import GenerationConfig

from benchmarks.measure import RESULTS
from mmdpo_trainers.answers.transformers_engine import generate_responses
from mmdpo_trainers.answers.vllm_engine import VllmEngine
from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.errors import StageError
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.models.encode import encode_prompts, load_images
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.models.published import copy_files, write_weights
from mmdpo_trainers.run.pipeline import run_stage
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder

pytestmark = pytest.mark.vllm

PROMPTS = [kind for kinds in vllm_models.KINDS.values() for kind in kinds[:3]]
_FAMILIES: dict[str, Any] = json.loads((RESULTS / "vllm_families.json").read_text(encoding="utf-8"))["families"]
AGREEING = {
    name: kinds
    for name, row in _FAMILIES.items()
    if (kinds := [kind for kind in vllm_models.KINDS if vllm_models.alike(row[kind])])
}


@pytest.fixture(scope="module", autouse=True)
def settled() -> None:
    vllm_models.settle()


@pytest.fixture(scope="module")
def models() -> Path:
    """Checkpoints that the newest transformers has written, as `mmdpo export` does."""
    return Path(os.environ[vllm_models.FOLDER])


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    make_prompts(folder, PROMPTS)
    return folder / "prompts.jsonl"


def assert_alike(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    for answer, other in zip(found, expected, strict=True):
        assert answer["perplexity"] == pytest.approx(other["perplexity"], rel=vllm_models.ALIKE)
        assert {**answer, "perplexity": None, "images": None} == {**other, "perplexity": None, "images": None}


def test_the_doubles_signatures_are_vllms_own() -> None:
    """Every name that the double takes or gives, vLLM has, with the same default."""
    from vllm import LLM, CompletionOutput, RequestOutput, SamplingParams
    from vllm.engine.arg_utils import EngineArgs
    from vllm.logprobs import Logprob

    params = SamplingParams()
    for field in dataclasses.fields(vllm_double.SamplingParams):
        assert (getattr(params, field.name) or None) == (field.default or None), field.name
    known = {**{f.name: f.default for f in dataclasses.fields(EngineArgs)}, **defaults(LLM.__init__)}
    for name, default in defaults(vllm_double.LLM.__init__).items():
        assert name in known, name
        if name in ("dtype", "logprobs_mode", "max_model_len", "quantization"):
            assert known[name] == default, name
    assert list(inspect.signature(LLM.generate).parameters)[:3] == ["self", "prompts", "sampling_params"]
    assert defaults(LLM.generate)["use_tqdm"] is defaults(vllm_double.LLM.generate)["use_tqdm"] is True
    for own, theirs in ((vllm_double.RequestOutput, RequestOutput), (vllm_double.CompletionOutput, CompletionOutput)):
        names = {*inspect.signature(theirs.__init__).parameters}
        assert {field.name for field in dataclasses.fields(own)} <= names
    assert {field.name for field in dataclasses.fields(vllm_double.Logprob)} <= {f.name for f in dataclasses.fields(Logprob)}


def defaults(function: Any) -> dict[str, Any]:
    return {name: each.default for name, each in inspect.signature(function).parameters.items() if name != "self"}


@pytest.mark.parametrize("name", AGREEING)
def test_families_agree(models: Path, tmp_path: Path, name: str) -> None:
    """All that the committed table says do, with the kinds of prompts that it says."""
    folder = models if (models / name).is_dir() else vllm_models.write(name, tmp_path).parent
    found = dict(vllm_models.compare(folder / name, {kind: vllm_models.KINDS[kind] for kind in AGREEING[name]}))
    assert all(map(vllm_models.alike, found.values())), found


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_answers_that_end(models: Path, prompts: Path, tmp_path: Path, name: str) -> None:
    """A token in the middle of an answer is the end token; on noisy pictures too."""
    model = Path(shutil.copytree(models / name, tmp_path / "model"))
    [first, *_] = vllm_models.responses(model, prompts, "transformers")
    settings = GenerationConfig.from_pretrained(model)
    settings.eos_token_id = first["response_ids"][2]
    settings.save_pretrained(model)
    expected = vllm_models.responses(model, prompts, "transformers", noise="official_code")
    assert any(answer["ended"] for answer in vllm_models.responses(model, prompts, "transformers"))
    assert_alike(vllm_models.responses(model, prompts, "vllm", noise="official_code"), expected)
    assert_alike(vllm_models.responses(model, prompts, "vllm"), vllm_models.responses(model, prompts, "transformers"))


def test_what_is_asked_of_an_engine(models: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several sampled answers in their order and by their seeds, perplexity of the likeliest tokens, no image token, what is too long."""
    records = list(read_jsonl(prompts))
    engine = VllmEngine(models / "llava", dtype="auto", device="auto", most_images=4, arguments=vllm_models.ENGINE)
    common: dict[str, Any] = {"max_new_tokens": 6, "top_p": 1.0, "pictures": [load_images(record) for record in records]}
    sampled = {**common, "do_sample": True, "temperature": 2.0, "seeds": [7 * n for n in range(len(records))]}
    one = engine.generate_responses(records, **sampled)
    several = engine.generate_responses(records, **sampled, num_answers=3)
    assert [answer["responses"][0] for answer in several] == [answer["response"] for answer in one]
    assert any(len(set(answer["responses"])) > 1 for answer in several)
    again = [engine.generate_responses([r], **{**sampled, "pictures": [p], "seeds": [s]})[0] for r, p, s in zip(
        records, sampled["pictures"], sampled["seeds"], strict=True
    )]  # fmt: skip
    assert [answer["response_ids"] for answer in again] == [answer["response_ids"] for answer in one]
    loaded = load_model(models / "llava", device="cpu")
    greedy = engine.generate_responses(records, **common, do_sample=False, temperature=1.0, seeds=[0] * len(records))
    assert [each["response_ids"] for each in greedy] != [each["response_ids"] for each in one]
    assert_alike(greedy, generate_responses(loaded, records, max_new_tokens=6))
    engine.close()


def test_what_vllm_refuses(models: Path, prompts: Path) -> None:
    with pytest.raises(
        StageError, match="vLLM cannot load it .*no_such_argument.*see generate.engine_args, which are {'.*}, or set"
    ):
        vllm_models.responses(models / "llava", prompts, "vllm", engine_args={"no_such_argument": 1})
    loaded = load_model(models / "llava", device="cpu")
    lengths = [
        encode_prompts(loaded, [record], padding_side="left").inputs["input_ids"].shape[1] for record in read_jsonl(prompts)
    ]
    for longest, message in (
        (max(lengths) - 1, "vLLM cannot answer them"),
        (max(lengths) + 2, "vLLM cut the answer after 2 of 8"),
    ):
        with pytest.raises(StageError, match=message):
            arguments = {**vllm_models.ENGINE, "max_model_len": longest}
            vllm_models.responses(models / "llava", prompts, "vllm", engine_args=arguments)


def test_image_tokens_are_never_taken(models: Path, prompts: Path, tmp_path: Path) -> None:
    """Of a model that favours the image token, both engines take another."""
    loaded = load_model(models / "llava", device="cpu")
    records = list(read_jsonl(prompts))
    [first, *_] = generate_responses(loaded, records, max_new_tokens=1)[0]["response_ids"]
    with torch.no_grad():
        loaded.model.lm_head.weight[loaded.image_token_id] = loaded.model.lm_head.weight[first] * 3
    write_weights(loaded.model, tmp_path / "model")
    copy_files(models / "llava", tmp_path / "model", loaded.dtype)
    found = vllm_models.responses(tmp_path / "model", prompts, "vllm")
    assert_alike(found, vllm_models.responses(tmp_path / "model", prompts, "transformers"))
    assert all(loaded.image_token_id not in answer["response_ids"] for answer in found)


def test_exports_and_evaluations_of_an_adapter(models: Path, prompts: Path, tmp_path: Path) -> None:
    """The same answers of base and adapter by transformers, of the exported model by vLLM, and of `evaluate.engine: vllm`."""
    base, adapter, out = models / "llava", make_adapter(models / "llava", tmp_path / "adapter"), tmp_path / "exported"
    assert cli.main(["export", str(adapter), str(out), "--base", str(base)]) == 0
    records = list(read_jsonl(prompts))
    expected = generate_responses(load_model(base, adapter=adapter, device="cpu"), records, max_new_tokens=8)
    assert [each["response_ids"] for each in vllm_models.responses(base, prompts, "vllm")] != [
        each["response_ids"] for each in expected
    ]
    by_id = {record["id"]: answer for record, answer in zip(records, expected, strict=True)}
    for answer in vllm_models.responses(out, prompts, "vllm"):
        assert answer["response_ids"] == by_id[answer["id"]]["response_ids"]
        assert answer["perplexity"] == pytest.approx(by_id[answer["id"]]["perplexity"], rel=1e-3)
    answers = [evaluation(tmp_path / engine, base, adapter, prompts, engine) for engine in ("transformers", "vllm")]
    for other, answer in zip(*answers, strict=True):
        names = ("id", "response_ids", "ended", "correct")
        assert [answer[name] for name in names] == [other[name] for name in names]
        ratios = [each["ratio"] for each in (answer, other)]
        assert ratios == [None, None] if answer["num_images"] == 1 else ratios[0] == pytest.approx(ratios[1], rel=1e-4)


def evaluation(folder: Path, base: Path, adapter: Path, prompts: Path, engine: str) -> list[dict[str, Any]]:
    settings = {"input": str(prompts), "engine": engine, "max_new_tokens": 8, "engine_args": vllm_models.ENGINE}
    config = RunConfig.from_dict({"model": str(base), "evaluate": settings})
    context = StageContext(run=RunFolder(folder), config=config, stage="evaluate", moment="after", adapter=adapter)
    run_stage(context)
    return list(read_jsonl(context.folder / "answers.jsonl"))
