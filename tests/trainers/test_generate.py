"""Answers, their token ids and perplexity; noise at generation; resuming at a batch."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prompt_records import make_prompts
from tiny_models import make_tiny_llava, make_tiny_llava_next, make_tiny_mllama, make_tiny_qwen

from mmdpo_kernels import patch_model
from mmdpo_trainers.answers.noise import noisy_images
from mmdpo_trainers.answers.transformers_engine import generate_responses
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.data.compose import add_noise
from mmdpo_trainers.data.records import check_prompt
from mmdpo_trainers.errors import ConfigError, DataError, StageError
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.models.encode import encode_prompts, load_images
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.stages import generate, score
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder

KINDS = [("sequence", 3), ("grid", 4), ("pip", 2), ("sequence", 2), ("single", 1)]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("prompts")
    return folder / "prompts.jsonl", make_prompts(folder, KINDS)


@pytest.fixture(scope="module")
def loaded(model_path: Path) -> LoadedModel:
    loaded = load_model(model_path)
    patch_model(loaded.model)
    return loaded


@pytest.mark.smoke
def test_greedy_answers_and_perplexity_equal_a_teacher_forced_pass(loaded: LoadedModel, model_path: Path, prompts: Any) -> None:
    """The ids continue the prompt exactly, each is the most likely token, and the perplexity is that of those probabilities."""
    records = prompts[1]
    plain = load_model(model_path)
    for record, answer in zip(records, generate_responses(loaded, records, max_new_tokens=5), strict=True):
        encoded = encode_prompts(plain, [record], padding_side="right", answers=[answer["response_ids"]])
        start, stop = encoded.response_spans[0]
        with torch.no_grad():
            logits = plain.model(**encoded.inputs).logits[0, start - 1 : stop - (not answer["ended"])]
        largest = logits.log_softmax(-1).max(-1)
        steps = answer["response_ids"] + ([plain.tokenizer.eos_token_id] if answer["ended"] else [])
        assert largest.indices.tolist() == steps
        assert answer["perplexity"] == pytest.approx(math.exp(-largest.values.mean().item()), rel=1e-4)
        assert answer["num_tokens"] == len(answer["response_ids"]) and answer["perplexity"] > 1
        assert answer["response"] == plain.tokenizer.decode(answer["response_ids"], skip_special_tokens=True).strip()


def test_the_end_token_closes_an_answer(loaded: LoadedModel, prompts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    records = prompts[1][:2]
    free = generate_responses(loaded, records, max_new_tokens=6)
    assert not any(answer["ended"] for answer in free)
    end = free[0]["response_ids"][2]
    monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", end)
    answers = generate_responses(loaded, records, max_new_tokens=6)
    assert answers[0]["num_tokens"] < answers[1]["num_tokens"]
    # What the batch goes on to write after a row has ended is no part of that row.
    [alone] = generate_responses(loaded, records[:1], max_new_tokens=6)
    assert answers[0]["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-4)
    for before, answer in zip(free, answers, strict=True):
        ids = before["response_ids"]
        assert answer["ended"] == (end in ids)
        assert answer["response_ids"] == (ids[: ids.index(end)] if end in ids else ids)


def test_sampling_follows_its_seed_alone(loaded: LoadedModel, prompts: Any) -> None:
    def sample(seed: int) -> list[list[int]]:
        answers = generate_responses(loaded, prompts[1], max_new_tokens=8, do_sample=True, temperature=1.5, seed=seed)
        return [answer["response_ids"] for answer in answers]

    torch.manual_seed(1)
    first = sample(3)
    state = torch.random.get_rng_state()
    assert sample(3) == first and sample(4) != first
    assert torch.equal(torch.random.get_rng_state(), state)
    greedy = generate_responses(loaded, prompts[1], max_new_tokens=8)
    cold = generate_responses(loaded, prompts[1], max_new_tokens=8, do_sample=True, temperature=1e-4, seed=0)
    assert [a["response_ids"] for a in cold] == [a["response_ids"] for a in greedy]
    # The temperature must not change the perplexity.
    assert [a["perplexity"] for a in cold] == pytest.approx([a["perplexity"] for a in greedy])


def test_image_tokens_are_never_generated(loaded: LoadedModel, prompts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    head = loaded.model.lm_head
    weight = head.weight.detach().clone()
    favoured = weight.clone()
    [first] = generate_responses(loaded, prompts[1][:1], max_new_tokens=1)[0]["response_ids"]
    favoured[loaded.image_token_id] = favoured[first] * 3
    monkeypatch.setattr(head, "weight", torch.nn.Parameter(favoured))
    answers = generate_responses(loaded, prompts[1], max_new_tokens=6)
    assert all(loaded.image_token_id not in answer["response_ids"] for answer in answers)


def test_noise_presets(prompts: Any) -> None:
    sequence, grid, pip = prompts[1][:3]
    pixels = lambda pictures: np.array(pictures[0]).astype(int)  # noqa: E731
    for preset in ("paper", "official_code"):
        assert (pixels(noisy_images(sequence, preset, 0)) == pixels(load_images(sequence))).all()
        changed = (pixels(noisy_images(grid, preset, 0)) != pixels(load_images(grid))).any(-1)
        x0, y0, x1, y1 = (round(v * s) for v, s in zip(grid["box"], changed.shape[::-1] * 2, strict=True))
        assert changed[y0:y1, x0:x1].mean() > 0.9
        changed[y0:y1, x0:x1] = False
        assert not changed.any()
    clean, clipped, wrapped = (pixels(noisy_images(pip, preset, 0)) for preset in ("none", "paper", "official_code"))
    assert (clean == pixels(load_images(pip))).all()
    assert 30 < (clipped - clean).std() < 50 and abs(clipped - clean).max() < 255
    assert ((wrapped - clipped) != 0).any() and ((wrapped == clipped) | (clipped == 0) | (clipped == 255)).all()
    assert (pixels(noisy_images(pip, "paper", 1)) != clipped).any(), "noise must follow the seed"
    with pytest.raises(DataError, match="noise needs the target's `box`"):
        noisy_images({**grid, "box": None}, "paper", 0)
    assert add_noise(load_images(pip)[0], 0.0, 0).tobytes() == load_images(pip)[0].tobytes()


def context_of(folder: Path, model: Path, prompts: Path, **options: Any) -> StageContext:
    config = {"model": str(model), "generate": {"input": str(prompts), "max_new_tokens": 5, "batch_size": 2, **options}}
    return StageContext(run=RunFolder(folder), config=RunConfig.from_dict(config), stage="generate")


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "noise": "official_code"}])
def test_a_killed_stage_gives_the_same_file(tmp_path: Path, model_path: Path, prompts: Any, options: dict[str, Any]) -> None:
    context = context_of(tmp_path / "run", model_path, prompts[0], **options)
    summary = generate.run(context)
    path = context.folder / "responses.jsonl"
    whole = path.read_bytes()
    assert summary["responses"] == {"grid": 1, "pip": 1, "single": 1, "sequence": 2}
    assert {record["id"] for record in read_jsonl(path)} == {record["id"] for record in prompts[1]}
    assert all(record["response_ids"] for record in read_jsonl(path))

    lines = whole.splitlines(keepends=True)
    for kept in (lines[:1] + [lines[1][:30]], lines[:3], lines):
        path.write_bytes(b"".join(kept))
        assert generate.run(context) == summary
        assert path.read_bytes() == whole


def test_an_empty_file_is_an_error(tmp_path: Path, model_path: Path) -> None:
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(StageError, match="holds no prompts"):
        generate.run(context_of(tmp_path / "run", model_path, tmp_path / "none.jsonl"))


def sample(loaded: LoadedModel, records: list[dict[str, Any]], num_answers: int, seed: int = 3) -> list[dict[str, Any]]:
    options: Any = {"do_sample": True, "temperature": 1.5, "seed": seed, "num_answers": num_answers}
    return generate_responses(loaded, records, max_new_tokens=6, **options)


def text_record(question: str = "what colour is the sky ?") -> dict[str, Any]:
    return check_prompt({"id": "t/text", "images": [], "prompt": question, "answer": "blue"}, "here")


@pytest.mark.parametrize("maker", [make_tiny_llava, make_tiny_llava_next, make_tiny_qwen, make_tiny_mllama])
def test_several_answers_are_those_of_the_prompt_repeated(tmp_path: Path, maker: Any, prompts: Any) -> None:
    """Each row sees its own pictures in their order, whatever shape a family gives them, and a prompt without any stands among them."""
    loaded = load_model(maker(tmp_path / "model"))
    patch_model(loaded.model)
    records = [*prompts[1][:1], *prompts[1][3:], text_record()]
    found = sample(loaded, records, 3)
    repeated = [{**record, "id": f"{record['id']}/{k}"} for k in range(3) for record in records]
    alone = generate_responses(loaded, repeated, max_new_tokens=6, do_sample=True, temperature=1.5, seed=3)
    for index, answer in enumerate(found):
        rows = alone[index :: len(records)]
        assert answer["responses"] == [row["response"] for row in rows]
        assert answer["num_tokens"] == [row["num_tokens"] for row in rows] and answer["ended"] == [row["ended"] for row in rows]
        assert answer["perplexity"] == pytest.approx([row["perplexity"] for row in rows], rel=1e-5)
    assert len({text for answer in found for text in answer["responses"]}) > len(records)


def test_one_answer_is_as_it_was(model_path: Path, prompts: Any) -> None:
    loaded = load_model(model_path)
    once = generate_responses(loaded, prompts[1], max_new_tokens=6, do_sample=True, temperature=1.5, seed=3)
    assert sample(loaded, prompts[1], 1) == once
    with pytest.raises(ValueError, match="num_answers: several answers to a prompt are sampled"):
        generate_responses(loaded, prompts[1], max_new_tokens=6, num_answers=2)


def test_the_stage_with_several_answers(tmp_path: Path, model_path: Path, prompts: Any) -> None:
    """Killed in between it gives the same file; no attention is recorded; greedy ones are refused."""
    source = tmp_path / "prompts.jsonl"
    lines = [json.dumps(record) + "\n" for record in [*prompts[1], text_record()]]
    source.write_text("".join(lines))
    options: dict[str, Any] = {"num_answers": 3, "do_sample": True, "temperature": 1.5}
    context = context_of(tmp_path / "run", model_path, source, **options)
    summary = generate.run(context)
    path = context.folder / "responses.jsonl"
    whole, records = path.read_bytes(), list(read_jsonl(path))
    texts = [set(record["responses"]) for record in records]
    assert summary["answers"] == 3 * len(records) == 18 and summary["responses"]["text"] == 1
    assert summary["distinct"] == pytest.approx(sum(map(len, texts)) / 6) and summary["all_alike"] == sum(
        len(t) == 1 for t in texts
    )
    for record in records:
        assert not {"response", "response_ids", "recorded"} & record.keys()
        assert {len(record[name]) for name in ("responses", "num_tokens", "ended", "perplexity")} == {3}
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:3]))
    assert generate.run(context) == summary and path.read_bytes() == whole
    with pytest.raises(ConfigError, match="generate.num_answers: 3 greedy answers .* set generate.do_sample"):
        generate.run(context_of(tmp_path / "other", model_path, source, num_answers=3))


def test_a_prompt_without_pictures_among_others(tmp_path: Path, model_path: Path, prompts: Any) -> None:
    """Answered, recorded and scored; it has no ratio."""
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in [*prompts[1], text_record()]))
    context = context_of(tmp_path / "run", model_path, source)
    assert generate.run(context)["responses"]["text"] == 1
    [answer] = [each for each in read_jsonl(context.folder / "responses.jsonl") if each["format"] == "text"]
    assert answer["response_ids"] and answer["images"] == []
    context.stage = "score"
    assert score.run(context)["without_ratio"] == 1
