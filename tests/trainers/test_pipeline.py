"""The pipeline with stages that only count: what is skipped, continued, removed, refused and summed up."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from prompt_records import make_prompts
from rich.console import Console
from tiny_models import make_tiny_mllama, make_tiny_qwen

from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.config.shipped import SHIPPED
from mmdpo_trainers.errors import ConfigError, MmdpoError, RunFolderError
from mmdpo_trainers.files.atomic import read_json, write_atomic
from mmdpo_trainers.processes import progress as progress_module
from mmdpo_trainers.processes.progress import Progress
from mmdpo_trainers.run import pipeline
from mmdpo_trainers.stages.context import StageContext

FILES = {
    "augment": "prompts.jsonl",
    "generate": "responses.jsonl",
    "score": "scores.jsonl",
    "select": "pairs.jsonl",
    "train": "final/adapter.bin",
    "evaluate": "answers.jsonl",
    "report": "page",
}
READS = {"generate": "prompts", "score": "responses", "select": "scores", "train": "pairs"}
MAIN = ["augment", "generate", "score", "select", "train", "evaluate/before", "evaluate/after", "report"]


class CountingStages:
    """Stand-ins for the stage modules; `calls` is what ran, `broken` the name of a stage that fails."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.broken: str | None = None

    def module(self, stage: str) -> Any:
        owner = self

        class Module:
            @staticmethod
            def inputs(context: StageContext) -> list[Path]:
                if stage == "evaluate" and context.moment == "after":
                    return [context.trained]
                return [getattr(context, READS[stage])] if stage in READS else []

            @staticmethod
            def run(context: StageContext) -> dict[str, Any]:
                owner.calls.append(context.name)
                write_atomic(context.folder / FILES[stage], f"{context.name} {context.config.select.rule}")
                if owner.broken == context.name:
                    raise RuntimeError("power cut")
                if stage == "select":
                    return {"pairs": {"sequence": 3, "grid": 2}, "dropped": {"answer": 4, "ratio": 5}}
                if stage == "evaluate":
                    right = 0.5 if context.moment == "before" else 0.75
                    return {"accuracy": {"sequence": right, "grid": right + 0.1, "pip": right, "single": 0.9}}
                return {}

        return Module


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch) -> CountingStages:
    counting = CountingStages()
    monkeypatch.setattr(pipeline, "stage_module", counting.module)
    return counting


def config_of(folder: Path, **values: Any) -> RunConfig:
    model = folder / "model"
    if not model.exists():
        shutil.copytree(SHIPPED["shapes"], model)
    return RunConfig.from_dict({"name": "t", "run_dir": str(folder / "run"), "model": str(model), "seed": 4, **values})


def go(config: RunConfig, **options: Any) -> tuple[dict[str, Any], str]:
    output = io.StringIO()
    console = Console(file=output, width=120)
    summary = pipeline.run_pipeline(config, progress=Progress(console), console=console, **options)
    return summary, output.getvalue()


def test_stages_run_in_order_once_and_are_summed_up(tmp_path: Path, counting: CountingStages) -> None:
    summary, text = go(config_of(tmp_path))
    assert counting.calls == MAIN
    assert summary["accuracy"]["before"] == {"sequence": 0.5, "grid": 0.6, "pip": 0.5, "single": 0.9}
    assert summary["accuracy"]["after"]["sequence"] == 0.75
    assert summary["pairs"] == {"sequence": 3, "grid": 2} and summary["dropped"] == {"answer": 4, "ratio": 5}
    assert summary["seed"] == 4 and set(summary["seconds"]) == {*MAIN, "total"}
    assert read_json(tmp_path / "run" / "summary.json") == summary
    for words in (
        "before",
        "0.500",
        "0.750",
        "0.533",
        "0.783",
        "single image",
        "selected, grid",
        "dropped by ratio",
        "run folder",
    ):
        assert words in text
    again, text = go(config_of(tmp_path))
    assert counting.calls == MAIN and again == summary
    assert text.count("done before") == len(MAIN)


def test_a_run_that_uploads_asks_first_and_uploads_last(
    tmp_path: Path, counting: CountingStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline.upload, "check", lambda contexts, config: counting.calls.append("asked"))
    monkeypatch.setattr(pipeline.upload, "push", lambda run, config, progress: counting.calls.append("sent") or "an address")
    _, text = go(config_of(tmp_path), until="train")
    assert counting.calls == ["asked", *MAIN[:5]] and "uploaded" not in text
    _, text = go(config_of(tmp_path))
    assert counting.calls == ["asked", *MAIN[:5], "asked", *MAIN[5:], "sent"] and "uploaded to: an address" in text


def test_what_was_lost_is_in_the_closing_tables(
    tmp_path: Path, counting: CountingStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss = {"records": 275, "of": 300, "reasons": {"missing": 270, "truncated": 5}}
    summaries = {
        "augment": {"prompts": {"sequence": 5, "pip": 0}, "problems": {}, "lost": loss},
        "evaluate": {"accuracy": {"sequence": 0.5}, "counts": {"sequence": 4, "pip": 0}, "match": "contains"},
    }
    original = counting.module

    def module(stage: str) -> Any:
        made = original(stage)
        if stage in summaries:
            run = made.run
            monkeypatch.setattr(made, "run", staticmethod(lambda context: {**run(context), **summaries[stage]}))
        return made

    monkeypatch.setattr(pipeline, "stage_module", module)
    summary, text = go(config_of(tmp_path))
    assert summary["lost"] == {"augment": loss}
    assert "augment: 275 of 300 records left out (missing: 270, truncated: 5); none of format pip" in text
    for words in ("records left out", "275 / 300", "truncated", "pip (n = 0)", "selected, pip", "answers compared by contains"):
        assert words in " ".join(text.split()), words


def test_an_interrupted_stage_is_continued_and_its_seconds_add_up(tmp_path: Path, counting: CountingStages) -> None:
    counting.broken = "score"
    with pytest.raises(RuntimeError, match="power cut"):
        go(config_of(tmp_path))
    state = tmp_path / "run" / "score" / "state.json"
    write_atomic(state, {**read_json(state), "seconds": 50.0})
    counting.broken = None
    summary, text = go(config_of(tmp_path))
    assert counting.calls == ["augment", "generate", "score", *MAIN[2:]]
    assert "score: continuing" in text and 50.0 <= summary["seconds"]["score"] < 55.0


def test_until_and_then_the_rest(tmp_path: Path, counting: CountingStages) -> None:
    summary, _ = go(config_of(tmp_path), until="select")
    assert counting.calls == MAIN[:4]
    assert summary["accuracy"] == {"before": None, "after": None} and summary["pairs"] is not None
    go(config_of(tmp_path))
    assert counting.calls == MAIN


def test_other_settings_are_refused_and_restart_removes_what_depends_on_them(tmp_path: Path, counting: CountingStages) -> None:
    go(config_of(tmp_path))
    changed = config_of(tmp_path, select={"max_pairs": 5})
    with pytest.raises(RunFolderError, match=r"select\.max_pairs: was null, is 5.*--restart select"):
        go(changed)
    assert counting.calls == MAIN and RunConfig.from_yaml(tmp_path / "run/config.yaml").select.max_pairs is None
    go(changed, restart="select")
    assert counting.calls[len(MAIN) :] == ["select", "train", "evaluate/after", "report"]
    assert RunConfig.from_yaml(tmp_path / "run/config.yaml").select.max_pairs == 5
    counting.calls.clear()
    go(changed, restart="augment")
    assert counting.calls == MAIN


def test_another_model_or_seed_is_refused(tmp_path: Path, counting: CountingStages) -> None:
    config = config_of(tmp_path)
    go(config)
    with pytest.raises(RunFolderError, match="seed: was 4, is 5"):
        go(config_of(tmp_path, seed=5))
    with (tmp_path / "model" / "config.json").open("a") as file:
        file.write("\n")
    with pytest.raises(RunFolderError, match="generate was made with other settings .*model: was"):
        go(config)


def test_arms_share_the_stages_before_and_have_their_own_after(tmp_path: Path, counting: CountingStages) -> None:
    arms = {"random": {"select": {"rule": "random_wrong"}}, "sft": {"train": {"args": {"loss_type": ["nll"]}}}}
    summary, text = go(config_of(tmp_path, arms=arms))
    own = [f"arms/{arm}/{stage}" for arm in arms for stage in ("select", "train", "evaluate/after")]
    assert counting.calls == [*MAIN[:-1], *own, "report"]
    assert (tmp_path / "run/arms/random/select/pairs.jsonl").read_text().endswith("random_wrong")
    assert summary["arms"]["sft"]["accuracy"]["after"]["grid"] == 0.85 and summary["arms"]["random"]["pairs"]["grid"] == 2
    assert set(own) < set(summary["seconds"]) and "arm random" in text
    counting.calls.clear()
    go(config_of(tmp_path, arms=arms), restart="arms/sft/train")
    assert counting.calls == ["arms/sft/train", "arms/sft/evaluate/after", "report"]
    counting.calls.clear()
    go(config_of(tmp_path, arms={**arms, "more": {}}))
    assert counting.calls == ["arms/more/select", "arms/more/train", "arms/more/evaluate/after"]


def test_stages_before_ones_own_file_are_left_out(tmp_path: Path, counting: CountingStages) -> None:
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("{}\n")
    go(config_of(tmp_path, train={"input": str(pairs)}, arms={"a": {}}))
    assert counting.calls == ["train", "evaluate/before", "evaluate/after", "arms/a/train", "arms/a/evaluate/after", "report"]
    pairs.write_text('{"a": 1}\n')
    with pytest.raises(RunFolderError, match=r"train was made with another content of your own pairs\.jsonl.*--restart train"):
        go(config_of(tmp_path, train={"input": str(pairs)}, arms={"a": {}}))


def test_names_are_checked_first(tmp_path: Path, counting: CountingStages) -> None:
    for options, message in (
        ({"until": "trian"}, "--until: there is no stage 'trian'"),
        ({"restart": "arms/x"}, "--restart: there is no stage 'x'"),
        ({"restart": "other/x/train"}, "--restart: 'other/x/train' is not a stage"),
    ):
        with pytest.raises(ConfigError, match=message):
            go(config_of(tmp_path), **options)
    with pytest.raises(ConfigError, match=r"arms\.a\.train\.args: PreferenceConfig has no field 'bta'; did you mean 'beta'"):
        go(config_of(tmp_path, arms={"a": {"train": {"args": {"bta": 1}}}}))
    assert counting.calls == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train": {"args": {"learning_rate": "fast"}}}, r"train\.args: learning_rate must be a number, got the text 'fast'"),
        ({"train": {"args": {"save_strategy": "never"}}}, r"train\.args: .*never"),
        ({"arms": {"a": {"train": {"args": {"beta": -1.0}}}}}, "beta: expected a value above 0"),
        ({"arms": {"a": {"train": {"input": "/none.jsonl"}}}}, r"train\.input: /none\.jsonl does not exist"),
        ({"evaluate": {"per_format": {"grit": 3}}}, r"evaluate\.per_format: unknown format 'grit'"),
        ({"evaluate": {"source": "/none.json"}}, r"/none\.json does not exist"),
        ({"evaluate": {"input": "/none.jsonl"}}, r"evaluate\.input: /none\.jsonl does not exist"),
        ({"device": "foo"}, "device 'foo': expected cpu, cuda or cuda:N"),
    ],
)
def test_what_would_fail_hours_later_fails_first(
    tmp_path: Path, counting: CountingStages, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(MmdpoError, match=message):
        go(config_of(tmp_path, **values))
    assert counting.calls == [] and not (tmp_path / "run").exists()


def changed(folder: Path, **values: Any) -> None:
    path = folder / "model" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("values", "model", "message"),
    [
        ({"score": {"layer": 4}}, {}, "score.layer: expected 0 to 3 for this model, got 4"),
        ({"train": {"args": {"attention_layer": 4}}}, {}, r"train\.args: attention_layer: expected one of .*, got 4"),
        ({"train": {"args": {"lora_target": "nowhere"}}}, {}, r"train\.args: .*nowhere"),
        ({"arms": {"a": {"train": {"args": {"lora_target": "nowhere"}}}}}, {}, r"arms\.a\.train\.args: .*nowhere"),
        ({}, {"model_type": "clip"}, "family 'clip' has no declaration"),
        (
            {},
            {"quantization_config": {"quant_method": "gptq", "bits": 4}},
            r"its weights are quantised .*gptq.*; expected float32",
        ),
        (
            {},
            {"text_config": {"model_type": "llama", "final_logit_softcapping": 0}},
            "final_logit_softcapping: expected a number above 0",
        ),
    ],
)
def test_what_the_models_files_say_is_said_first(
    tmp_path: Path, counting: CountingStages, values: dict[str, Any], model: dict[str, Any], message: str
) -> None:
    config = config_of(tmp_path, **values)
    changed(tmp_path, **model)
    with pytest.raises(MmdpoError, match=message):
        go(config)
    assert counting.calls == [] and not (tmp_path / "run").exists()


def test_a_model_folder_without_its_weights_or_processor_is_said_first(tmp_path: Path, counting: CountingStages) -> None:
    config = config_of(tmp_path)
    for pattern, message in (("*processor*.json", "processor cannot be loaded"), ("*.safetensors", "no weights")):
        for file in (tmp_path / "model").glob(pattern):
            file.unlink()
        with pytest.raises(MmdpoError, match=message):
            go(config)
    assert counting.calls == []


@pytest.mark.parametrize(
    ("make", "values", "message"),
    [
        (
            make_tiny_qwen,
            {"score": {"regions": "official_code"}},
            "score.regions: official_code is how .* pictures of qwen2_5_vl have",
        ),
        (make_tiny_mllama, {}, r"augment\.formats: a grid asks about a part .* with mllama only whole pictures"),
        (make_tiny_mllama, {"augment": {"formats": {"sequence": 1}}}, r"evaluate\.per_format: a grid asks"),
    ],
)
def test_what_a_family_cannot_measure_is_said_first(
    tmp_path: Path, counting: CountingStages, make: Any, values: dict[str, Any], message: str
) -> None:
    with pytest.raises(MmdpoError, match=message):
        go(config_of(tmp_path, **values, model=str(make(tmp_path / "other"))))
    assert counting.calls == []


def test_own_prompts_and_evaluation_data_without_pictures_are_said_first(tmp_path: Path, counting: CountingStages) -> None:
    prompts = make_prompts(tmp_path / "data", [("single", 1), ("single", 1)])
    Path(prompts[1]["images"][0]).unlink()
    path = str(tmp_path / "data" / "prompts.jsonl")
    with pytest.raises(
        MmdpoError, match=r"generate\.input: 1 of 2 records of .* lack a picture, such as record r1/single: .*--allow"
    ):
        go(config_of(tmp_path, generate={"input": path}))
    turns = [{"from": "human", "value": "<image>?"}, {"from": "gpt", "value": "x"}]
    (tmp_path / "own.json").write_text(json.dumps([{"id": n, "image": f"{n}.png", "conversations": turns} for n in range(3)]))
    with pytest.raises(MmdpoError, match=r"no usable record \(missing: 3\).*set evaluate\.image_folder to the folder"):
        go(config_of(tmp_path, evaluate={"source": str(tmp_path / "own.json")}))
    assert counting.calls == []
    go(config_of(tmp_path, generate={"input": path}, allow_missing=True))
    assert counting.calls[0] == "generate"


def test_pictures_trained_on_are_never_evaluated_on(tmp_path: Path, counting: CountingStages) -> None:
    for name in ("data.json", "own.json"):
        (tmp_path / name).write_text("[]")
    values: dict[str, Any] = {"data": {"source": str(tmp_path / "data.json")}}
    go(config_of(tmp_path, **values, evaluate={"source": str(tmp_path / "own.json")}), until="train")
    with pytest.raises(RunFolderError, match=r"augment was made with other settings \(holds_out: was false, is true\)"):
        go(config_of(tmp_path, **values))


def test_a_changed_training_argument_is_named(tmp_path: Path, counting: CountingStages) -> None:
    go(config_of(tmp_path, train={"args": {"learning_rate": 1e-4, "beta": 0.2}}))
    with pytest.raises(RunFolderError, match=r"\(train\.args\.learning_rate: was 0\.0001, is 0\.0002\)"):
        go(config_of(tmp_path, train={"args": {"learning_rate": 2e-4, "beta": 0.2}}))


def test_another_name_draws_the_page_again(tmp_path: Path, counting: CountingStages) -> None:
    go(config_of(tmp_path))
    go(config_of(tmp_path, name="other"))
    assert counting.calls == [*MAIN, "report"]


def test_restarting_an_unknown_arm_removes_nothing(tmp_path: Path, counting: CountingStages) -> None:
    config = config_of(tmp_path, arms={"a": {}})
    go(config)
    with pytest.raises(ConfigError, match="no arm 'zz'; this run has a"):
        go(config, restart="arms/zz/train")
    assert (tmp_path / "run/summary.json").exists() and (tmp_path / "run/report/summary.json").exists()


def test_progress_on_a_pipe_is_lines() -> None:
    output = io.StringIO()
    progress = Progress(Console(file=output, width=80), every=0.0)
    with progress.task("score", total=3, completed=1) as task:
        task.advance(note="[ratio 0.5]")
        task.advance()
    assert output.getvalue().splitlines() == ["score: 2/3 [ratio 0.5]", "score: 3/3 [ratio 0.5]"]


def test_a_long_stage_says_what_the_rest_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the rate and the sizes behind the first piece, once; a disk that is too small for it is warned of."""
    clock = iter(range(0, 100_000, 10))
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: float(next(clock)))
    (tmp_path / "file").write_bytes(bytes(2**20))
    for free, words in (
        (2**20, "983 more take about "),
        (10, "warning: the 983 that are missing need about 57.8 MiB at the size of the first 17"),
    ):
        monkeypatch.setattr(progress_module, "free_mib", lambda folder, free=free: free)
        output = io.StringIO()
        with Progress(Console(file=output, width=200), every=0.0).task("score", 1000, folder=tmp_path) as task:
            for _ in range(17):
                task.advance()
        lines = output.getvalue().splitlines()
        assert sum("more take" in line or "warning" in line for line in lines) == 1, "once"
        assert any(words in line for line in lines), lines
        assert "h" in lines[-1] and " left" in lines[-1]


def test_progress_on_a_terminal_is_a_bar() -> None:
    output = io.StringIO()
    progress = Progress(Console(file=output, width=100, force_terminal=True))
    with progress.task("outer", total=2) as outer, progress.task("inner", total=None) as inner:
        inner.advance(5)
        outer.advance(2, note="[half]")
    assert all(words in output.getvalue() for words in ("outer", "2/2", "[half]", "inner"))
