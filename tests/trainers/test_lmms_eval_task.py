"""`mmdpo export --lmms-eval`: the task reads local files alone, needs nothing of this package, and scores as `mmdpo evaluate` does."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from prompt_records import make_prompts
from tiny_models import make_tiny_llava, make_tiny_qwen

from mmdpo_trainers.answers.config_only import config_only
from mmdpo_trainers.cli.main import main
from mmdpo_trainers.data.match import is_right
from mmdpo_trainers.errors import ConfigError
from mmdpo_trainers.models.encode import load_images
from mmdpo_trainers.run.export import lmms_eval
from mmdpo_trainers.run.export.source import Source


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_qwen(tmp_path_factory.mktemp("qwen"))


def written(folder: Path, model: Path) -> tuple[str, list[dict[str, Any]], Any]:
    """What the command says, the records, and the task's `utils.py` as lmms-eval imports it."""
    records = make_prompts(folder / "data", [("sequence", 3), ("single", 1), ("grid", 4)])
    source = Source(trained=model, base=model, name="tiny")
    said = lmms_eval.write_task(source, config_only(model), folder / "task", str(folder / "data" / "prompts.jsonl"))
    spec = importlib.util.spec_from_file_location("task_utils", folder / "task" / "utils.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return said, records, module


def test_the_task_reads_and_scores_as_evaluate_does(tmp_path: Path, qwen: Path) -> None:
    said, records, utils = written(tmp_path, qwen)
    assert "3 prompts as task mmdpo_prompts: lmms-eval eval --include_path" in said and "other prompts" not in said
    assert "mmdpo_trainers" not in (tmp_path / "task" / "utils.py").read_text()
    docs = [json.loads(line) for line in (tmp_path / "task" / "prompts.jsonl").read_text().splitlines()]
    model = config_only(qwen)
    for doc, record in zip(docs, records, strict=True):
        seen = utils.doc_to_visual(doc)
        assert [each.tobytes() for each in seen] == [each.tobytes() for each in load_images(record)]
        messages = utils.doc_to_messages(doc)
        assert model.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == model.texts.rendered(
            "r", lmms_eval.conversation_of(record)
        )
        for text in (record["answer"], f"It is {record['answer']}.", "nothing"):
            right = float(is_right(text, record["answer"], match="exact") is True)
            assert utils.process_results(doc, [text]) == {"accuracy": right, f"accuracy_{record['format']}": right}
    task = (tmp_path / "task" / "mmdpo_prompts.yaml").read_text()
    assert task.count("- metric: accuracy") == 4 and "process_results: !function utils.process_results" in task
    assert str(tmp_path / "task" / "prompts.jsonl") in task


def test_prompts_that_the_template_makes_others_of_are_counted(tmp_path: Path) -> None:
    """LLaVA's takes pictures out of their places; where they stand in front, the prompt is the same."""
    said, _, _ = written(tmp_path, make_tiny_llava(tmp_path / "llava"))
    assert "\n1 of them become other prompts with lmms-eval's chat models than in training" in said


def test_what_is_wrong_is_said_before_any_work(tmp_path: Path, qwen: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = Source(trained=qwen, base=qwen, name="tiny")
    with pytest.raises(ConfigError, match="--lmms-eval: there are no evaluation prompts of a run here; give prompts"):
        lmms_eval.check(source, str(tmp_path / "task"), None)
    with pytest.raises(ConfigError, match="--lmms-eval-input: expected --lmms-eval beside it"):
        lmms_eval.check(source, None, "prompts.jsonl")
    with pytest.raises(ConfigError, match="none.jsonl is not a file"):
        lmms_eval.check(source, str(tmp_path / "task"), "none.jsonl")
    assert main(["export", str(tmp_path / "none"), str(tmp_path / "out"), "--lmms-eval", str(tmp_path / "task")]) == 2
