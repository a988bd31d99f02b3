"""Generating by servers that run already, by doubles of vLLM's over the tiny model: the answers and perplexities of the transformers engine,
whatever dies, and nothing asked twice."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chat_templates import COLLECTING
from judge_server import Asked, JudgeServer, Plays, Said
from prompt_records import make_prompts
from server_double import ModelServer
from tiny_models import make_tiny_llava, make_tiny_qwen

from mmdpo_trainers.answers import server_engine
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.errors import ConfigError, StageError
from mmdpo_trainers.files import json_lines
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.models.encode import load_images
from mmdpo_trainers.run.pipeline import run_pipeline, run_stage
from mmdpo_trainers.stages import generate, score
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder

KINDS = [("single", 1), ("sequence", 3), ("grid", 4), ("pip", 2), ("sequence", 2), ("single", 1)]
Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def plays(qwen: Path) -> ModelServer:
    return ModelServer(qwen)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    make_prompts(folder, KINDS)
    return folder / "prompts.jsonl"


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, qwen: Path, prompts: Path) -> Lines:
    """What the transformers engine answers."""
    return answers(context_of(tmp_path_factory.mktemp("expected"), qwen, prompts, engine="transformers", record_attention=False))


def context_of(
    folder: Path, model: Path, prompts: Path, urls: list[str] | None = None, stage: str = "generate", **options: Any
) -> StageContext:
    server = {"retries": 2, "backoff": 0.0, "concurrency": 2, **options.pop("server", {}), **({"urls": urls} if urls else {})}
    values = {"input": str(prompts), "max_new_tokens": 6, "engine": "server", "server": server, **options}
    config = RunConfig.from_dict({"model": str(model), "device": "cpu", "generate": values})
    return StageContext(run=RunFolder(folder), config=config, stage=stage)


def answers(context: StageContext) -> Lines:
    generate.run(context)
    return lines_of(context)


def lines_of(context: StageContext) -> Lines:
    return list(read_jsonl(context.folder / "responses.jsonl"))


def same(found: Lines, expected: Lines, *, but: tuple[str, ...] = ()) -> None:
    for answer, other in zip(found, expected, strict=True):
        left_out = {"images": None, "perplexity": None, **dict.fromkeys(but)}
        assert {**answer, **left_out} == {**other, **left_out}
        if "perplexity" not in but:
            assert answer["perplexity"] == pytest.approx(other["perplexity"], rel=1e-5)


def serving(plays: Plays, port: int = 0) -> JudgeServer:
    return JudgeServer(plays, serves=["qwen"], port=port)


def test_answers_and_perplexity_are_those_of_transformers(
    tmp_path: Path, qwen: Path, prompts: Path, plays: ModelServer, expected: Lines
) -> None:
    """Two addresses share the work; the pictures that they see are the ones that transformers sees, pixel by pixel."""
    plays.pictures.clear()
    with serving(plays) as one, serving(plays) as two:
        context = context_of(tmp_path, qwen, prompts, [one.url, two.url])
        same(answers(context), expected)
        assert min(len(one.asked), len(two.asked)) > 0 and len(one.asked) + len(two.asked) == len(KINDS)
    seen = {np.asarray(picture).tobytes() for picture in plays.pictures}
    assert seen == {np.asarray(picture).tobytes() for record in read_jsonl(prompts) for picture in load_images(record)}
    assert sorted(path.name for path in context.folder.glob("*.jsonl")) == ["responses.jsonl"]


def test_sampled_answers_have_a_seed_a_record(tmp_path: Path, qwen: Path, prompts: Path, plays: ModelServer) -> None:
    with serving(plays) as server:
        sampled = {"do_sample": True, "temperature": 2.0, "num_answers": 3}
        found = answers(context_of(tmp_path / "a", qwen, prompts, [server.url], **sampled))
        assert found == answers(context_of(tmp_path / "b", qwen, prompts, [server.url], **sampled, server={"concurrency": 1}))
    assert all(len(each["responses"]) == len(each["perplexity"]) == 3 for each in found)
    assert any(len(set(each["responses"])) > 1 for each in found)


def test_an_address_that_dies_is_left_out(
    tmp_path: Path, qwen: Path, prompts: Path, plays: ModelServer, expected: Lines, caplog: pytest.LogCaptureFixture
) -> None:
    """Its requests go to the other one, which is not asked anything twice."""
    with serving(plays) as one, serving(lambda asked: Said(503)) as dead:
        context = context_of(tmp_path, qwen, prompts, [dead.url, one.url])
        same(answers(context), expected)
        assert len(one.asked) == len(KINDS)
    assert f"the server at {dead.url} is left out (status 503); 1 of 2 addresses go on with the work" in caplog.text
    with serving(plays) as one:
        gone = "http://127.0.0.1:9/v1"
        same(answers(context_of(tmp_path / "b", qwen, prompts, [gone, one.url])), expected)
    assert f"the server at {gone} is left out (ConnectError" in caplog.text


def test_all_dead_loses_nothing_and_nothing_is_asked_twice(
    tmp_path: Path, qwen: Path, prompts: Path, plays: ModelServer, expected: Lines
) -> None:
    """Killed in the middle of a batch: what came is kept, and the same command, with another number of requests at a time, asks for the rest."""
    came, lock = [0], threading.Lock()

    def dies(asked: Asked) -> Said:
        with lock:
            came[0] += 1
            if came[0] > 3:
                return Said(500)
        return plays(asked)

    with serving(dies) as server:
        with pytest.raises(
            StageError, match=r"record r\d/.*: the server at .* did not answer after 3 requests \(status 500\); all answers"
        ) as caught:
            run_stage(context_of(tmp_path, qwen, prompts, [server.url]))
        assert "with any of generate.server.urls" in str(caught.value)
    with pytest.raises(StageError, match="generate.server.urls: nobody answers there .*ConnectError.*the same command continues"):
        run_stage(context_of(tmp_path, qwen, prompts, ["http://127.0.0.1:9/v1"]))
    with serving(plays) as server:
        context = context_of(tmp_path, qwen, prompts, [server.url], server={"concurrency": 1})
        run_stage(context)
        assert len(server.asked) == len(KINDS) - 3
    same(lines_of(context), expected)
    assert not list(context.folder.glob("came-*"))


def test_an_address_that_comes_back_is_asked_again(
    tmp_path: Path, qwen: Path, prompts: Path, plays: ModelServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(generate, "_TO_SERVERS", 2)
    back: list[JudgeServer] = []
    one_at_a_time = threading.Lock()
    with serving(plays) as first:
        gone = first.url, first.port
    with contextlib.ExitStack() as started:

        def starts_the_other(asked: Asked) -> Said:
            with one_at_a_time:
                if not back:
                    back.append(started.enter_context(serving(plays, port=gone[1])))
            return plays(asked)

        with serving(starts_the_other) as server:
            context = context_of(tmp_path, qwen, prompts, [gone[0], server.url], batch_size=2)
            assert len(answers(context)) == len(KINDS)
        assert back[0].asked


def test_a_full_disk_loses_no_answer(
    tmp_path: Path, qwen: Path, prompts: Path, plays: ModelServer, expected: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, original = [0], json_lines.os.fsync

    def full(descriptor: int) -> None:
        written[0] += os.readlink(f"/proc/self/fd/{descriptor}").endswith("came-00000.jsonl")
        if written[0] == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(descriptor)

    with serving(plays) as server:
        context = context_of(tmp_path, qwen, prompts, [server.url], server={"concurrency": 1})
        with (
            monkeypatch.context() as patch,
            pytest.raises(StageError, match=r"came-00000.jsonl cannot be written: no space .*2 records so far"),
        ):
            patch.setattr(json_lines.os, "fsync", full)
            generate.run(context)
        asked, kept = len(server.asked), len(list(read_jsonl(context.folder / "came-00000.jsonl")))
        same(answers(context), expected)
        # Of what came, only the one that was not written is asked for again; another may have been under way.
        assert asked - 1 == kept >= 2 and len(server.asked) == asked + len(KINDS) - kept


@pytest.mark.parametrize("field", ["logprobs", "return_token_ids"])
def test_what_a_server_does_not_say_is_measured_by_score(
    tmp_path: Path, qwen: Path, prompts: Path, plays: ModelServer, expected: Lines, field: str, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(plays) as server:
        context = context_of(tmp_path, qwen, prompts, [server.url], server={"parameters": {field: None}})
        summary = generate.run(context)
    assert summary["mean_perplexity"] is None and summary["without_perplexity"] == len(KINDS)
    # The tokens of a text need not be those that were generated.
    same(
        lines_of(context), expected, but=("perplexity", *(("response_ids", "num_tokens") if field == "return_token_ids" else ()))
    )
    said = {
        "logprobs": "gives no log-probabilities",
        "return_token_ids": "does not say which tokens it makes of a prompt (it counts ",
    }[field]
    assert caplog.text.count(said) == 1 and caplog.text.count("`score` measures") == 1
    scoring = context_of(tmp_path, qwen, prompts, stage="score")
    score.run(scoring)
    scored = list(read_jsonl(scoring.folder / "scores.jsonl"))
    if field == "logprobs":
        same([{**each, **dict.fromkeys(("ratio", "ratio_mass", "ratio_mean", "attention"))} for each in scored],
             [{**each, **dict.fromkeys(("ratio", "ratio_mass", "ratio_mean", "attention"))} for each in expected])  # fmt: skip
    else:
        assert all(each["perplexity"] > 1 for each in scored)


def test_a_prompt_that_the_server_reads_otherwise(tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLaVA's template takes pictures out of their places: refused, and the same prompt with `rendered`."""
    llava = make_tiny_llava(tmp_path / "llava")
    (llava / "chat_template.jinja").write_text(COLLECTING)
    expected = answers(context_of(tmp_path / "a", llava, prompts, engine="transformers", record_attention=False))
    with serving(ModelServer(llava)) as server:
        context = context_of(tmp_path / "b", llava, prompts, [server.url], server={"concurrency": 1})
        message = r"record r\d/sequence: the server reads the prompt as \d+ tokens, transformers as \d+.*generate.server.prompts to rendered"
        with pytest.raises(StageError, match=message):
            generate.run(context)
    with serving(ModelServer(llava, as_it_is=True)) as server:
        same(answers(context_of(tmp_path / "c", llava, prompts, [server.url], server={"prompts": "rendered"})), expected)


def test_what_a_server_must_not_answer(tmp_path: Path, qwen: Path, prompts: Path) -> None:
    with serving(ModelServer(qwen, longest=30)) as server:
        with pytest.raises(
            StageError, match=r"record r.*: the server refused with status 400: .*longer than the maximum.*--max-model-len"
        ):
            generate.run(context_of(tmp_path / "a", qwen, prompts, [server.url]))
        with pytest.raises(StageError, match="expected 'other' at http.*, which serves qwen; give the name of"):
            generate.run(context_of(tmp_path / "b", qwen, prompts, [server.url], server={"model": "other"}))
    with JudgeServer(lambda asked: Said(404), serves=None) as server:
        with pytest.raises(StageError, match="generate.server.model: .* does not say what it serves"):
            generate.run(context_of(tmp_path / "c", qwen, prompts, [server.url]))
        with pytest.raises(StageError, match=r"answered with status 404 .*mend generate.server.urls or generate.server.model"):
            generate.run(context_of(tmp_path / "d", qwen, prompts, [server.url], server={"model": "m"}))
    with (
        serving(lambda asked: Said(401)) as server,
        pytest.raises(StageError, match="refused access .*OPENAI_API_KEY, which is not set"),
    ):
        generate.run(context_of(tmp_path / "e", qwen, prompts, [server.url]))


def test_settings_that_a_server_would_not_follow(
    qwen: Path, prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = context_of(tmp_path, qwen, prompts, do_sample=True, temperature=0.001)
    for work in (lambda: generate.run(context), lambda: run_pipeline(context.config, until="generate")):
        with pytest.raises(ConfigError, match="generate.temperature: vLLM samples at 0.01 or more"):
            work()
    for server, message in (
        ({"urls": []}, "generate.server.urls: expected one or more"),
        ({"urls": ["http://key@host/v1"]}, r"generate.server.urls: expected http\(s\)://HOST"),
        ({"key_env": "sk-1"}, "generate.server.key_env: expected the name"),
    ):
        with pytest.raises(ConfigError, match=message):
            RunConfig.from_dict({"generate": {"server": server}})
    context = context_of(tmp_path, qwen, prompts)
    context.config.quantization.load_in_4bit = True
    with pytest.raises(ConfigError, match="generate.engine: a server answers with the weights it was started with"):
        server_engine.check_server(context.config)
