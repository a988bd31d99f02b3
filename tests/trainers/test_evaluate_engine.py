"""`evaluate.engine: vllm`, by the double of vLLM's calls: answers and ratios of the transformers engine, of the base and of what was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import vllm_double
from prompt_records import make_prompts
from published_files import hub_picture, write_lines, write_parquet
from tiny_models import sample_pictures

from mmdpo_trainers.cli import main as cli
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.errors import ConfigError, StageError
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.run.pipeline import run_pipeline, run_stage
from mmdpo_trainers.stages import engine_answers, evaluate
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder

KINDS = [("sequence", 3), ("grid", 4), ("pip", 2), ("single", 1)]


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    make_prompts(folder, KINDS)
    return folder / "prompts.jsonl"


def context_of(folder: Path, model: Path, prompts: Path, trained: Path | None, engine: str, **settings: Any) -> StageContext:
    values = {"input": str(prompts), "max_new_tokens": 4, "batch_size": 2, "engine": engine}
    config = RunConfig.from_dict({"model": str(model), "evaluate": values, **settings})
    moment: Any = "before" if trained is None else "after"
    return StageContext(run=RunFolder(folder), config=config, stage="evaluate", moment=moment, adapter=trained)


def answers(context: StageContext) -> list[dict[str, Any]]:
    run_stage(context)
    return list(read_jsonl(context.folder / "answers.jsonl"))


@pytest.mark.parametrize("what", ["base", "adapter", "whole"])
def test_the_engine_changes_no_answer(
    tmp_path: Path, base: Path, adapter: Path, prompts: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = vllm_double.install(monkeypatch)
    trained = None if what == "base" else adapter
    if what == "whole":
        trained = tmp_path / "final"
        load_model(base, adapter=adapter).model.save_pretrained(trained)
    expected = answers(context_of(tmp_path / "a", base, prompts, trained, "transformers"))
    context = context_of(tmp_path / "b", base, prompts, trained, "vllm")
    found = answers(context)
    for answer, other in zip(found, expected, strict=True):
        assert answer["perplexity"] == pytest.approx(other["perplexity"], rel=1e-4)
        ratios = [each["ratio"] for each in (answer, other)]
        assert ratios == [None, None] if answer["format"] == "single" else ratios[0] == pytest.approx(ratios[1], rel=1e-4)
        assert answer.keys() == other.keys()
        assert [answer[name] for name in ("response_ids", "ended", "correct")] == [
            other[name] for name in ("response_ids", "ended", "correct")
        ]
    assert [made["images"] for made in llm.made] == [3]
    assert sorted(path.name for path in context.folder.iterdir() if path.suffix != ".json") == [
        "answers.jsonl",
        "responses.jsonl",
    ]


def test_the_trained_model_answers_otherwise_than_the_base(
    tmp_path: Path, base: Path, adapter: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_double.install(monkeypatch)
    folders = (("base", None), ("adapter", adapter))
    found = [answers(context_of(tmp_path / name, base, prompts, each, "vllm")) for name, each in folders]
    assert [answer["response_ids"] for answer in found[0]] != [answer["response_ids"] for answer in found[1]]


def test_a_killed_evaluation_asks_nothing_twice(
    tmp_path: Path, base: Path, adapter: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed while answering, then while measuring: the same files, and vLLM is not started for answers that are there."""
    llm = vllm_double.install(monkeypatch)
    whole = context_of(tmp_path / "whole", base, prompts, adapter, "vllm")
    expected = answers(whole)
    context = context_of(tmp_path / "killed", base, prompts, adapter, "vllm")
    original = llm.generate

    def second_fails(self: Any, prompts: Any, *args: Any, **options: Any) -> Any:
        if len(prompts[0]["multi_modal_data"]["image"]) == 3 or len(prompts[-1]["multi_modal_data"]["image"]) == 3:
            raise KeyboardInterrupt
        return original(self, prompts, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(llm, "generate", second_fails)
        with pytest.raises(KeyboardInterrupt):
            run_stage(context)
    assert len(list(read_jsonl(context.folder / "responses.jsonl"))) == 2 and (context.folder / "model").is_dir()
    with monkeypatch.context() as patch:
        patch.setattr(engine_answers, "recorded_answers", lambda *args, **options: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run_stage(context)
    assert not (context.folder / "model").exists()
    made = len(llm.made)
    monkeypatch.setattr(engine_answers, "save_merged", None)
    assert answers(context) == expected and len(llm.made) == made
    for name in ("responses.jsonl", "answers.jsonl"):
        assert (context.folder / name).read_bytes() == (whole.folder / name).read_bytes()


def test_benchmarks_by_the_engine(
    tmp_path: Path, base: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same answers, marks and attention; one vLLM for all of a moment; no model where there is no attention to measure."""
    llm = vllm_double.install(monkeypatch)
    monkeypatch.chdir(tmp_path)
    pictures = sample_pictures(3)
    for number, picture in enumerate(pictures):
        picture.save(f"{number}.png")
    lines = [{"question_id": n, "image": f"{n}.png", "text": "is it there ?", "label": "yes" if n else "no"} for n in range(3)]
    write_lines(Path("coco_pope_random.json"), lines)
    rows = [
        {"idx": f"val_{n}", "sub_task": "Jigsaw", "prompt": "which is red ?", "choices": ["one", "two"], "answer": "(A)"}
        | {f"image_{k + 1}": hub_picture(pictures[(n + k) % 3]) for k in range(2)}
        for n in range(2)
    ]
    write_parquet(Path("blink") / "val.parquet", rows)
    common = ["evaluate", "--model", str(base), "--adapter", str(adapter), "--benchmark-tokens", "4"]
    both = [*common, "--benchmarks", "{pope: coco_pope_random.json, blink: blink}"]
    assert cli.main([*both, "--run", "a"]) == 0
    assert cli.main([*both, "--run", "b", "--engine", "vllm"]) == 0
    assert [made["images"] for made in llm.made] == [2, 2]
    for moment in ("before", "after"):
        for key in ("pope", "blink"):
            file = f"evaluate/own/benchmarks-{moment}/benchmark-{key}.jsonl"
            for one, other in zip(read_jsonl(Path("a") / file), read_jsonl(Path("b") / file), strict=True):
                assert one.keys() == other.keys()
                assert [one[name] for name in ("id", "response_ids", "said", "marks")] == [
                    other[name] for name in ("id", "response_ids", "said", "marks")
                ]
                assert key == "pope" or one["attention"] == pytest.approx(other["attention"], rel=1e-4)
    monkeypatch.setattr(evaluate, "load_evaluated", None)
    assert cli.main([*common, "--benchmarks", "{pope: coco_pope_random.json}", "--run", "c", "--engine", "vllm"]) == 0


def test_what_cannot_be_is_said_before_work(
    tmp_path: Path, base: Path, adapter: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vllm_double.install(monkeypatch)
    four = context_of(tmp_path / "a", base, prompts, None, "vllm", quantization={"load_in_4bit": True})
    with pytest.raises(ConfigError, match="evaluate.engine: vllm would answer with whole weights"):
        run_stage(four)
    with pytest.raises(ConfigError, match="evaluate.engine: vllm would answer with whole weights"):
        run_pipeline(four.config)
    with pytest.raises(ConfigError, match="device: expected none, cuda or cuda:N with evaluate.engine: vllm"):
        run_stage(context_of(tmp_path / "b", base, prompts, None, "vllm", device="cpu"))
    with pytest.raises(ConfigError, match="evaluate.engine: a reward model rates answers and gives none"):
        own = context_of(tmp_path / "c", base, prompts, None, "vllm", method="reward")
        own.config.evaluate.input = None
        run_stage(own)
    monkeypatch.setattr(engine_answers, "free_mib", lambda path: 0)
    with pytest.raises(
        StageError, match="vLLM reads what was trained as a whole model, which takes about 0 MiB, and 0 MiB are free"
    ):
        run_stage(context_of(tmp_path / "d", base, prompts, adapter, "vllm"))
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="evaluate.engine: vllm is not installed here"):
        run_stage(context_of(tmp_path / "e", base, prompts, None, "vllm"))
