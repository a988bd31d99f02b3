"""Attention ratios against eager attention maps: a teacher-forced pass, and the official way during generation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from prompt_records import make_prompts
from tiny_models import make_tiny_llava

from mmdpo_kernels import patch_model
from mmdpo_trainers.answers.attention_ratios import attention_ratios, ratios_of
from mmdpo_trainers.answers.transformers_engine import generate_responses
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.data.compose import official_grid_region, official_pip_region
from mmdpo_trainers.errors import DataError, StageError
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.models.encode import encode_prompts
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.processes.progress import Progress
from mmdpo_trainers.stages import models, score
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.folder import RunFolder

# Every format, mixed numbers of pictures, a collage whose cells do not divide the 4x4 patches, and a whole-picture format.
KINDS = [("sequence", 2), ("grid", 3), ("sequence", 5), ("pip", 2), ("grid", 4), ("sequence", 3), ("single", 1)]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory, model_path: Path) -> list[dict[str, Any]]:
    """Prompts with the model's own answers of different lengths, some ended by the model and some cut off."""
    prompts = make_prompts(tmp_path_factory.mktemp("prompts"), KINDS)
    loaded = load_model(model_path)
    answered = []
    for index, record in enumerate(prompts):
        [answer] = generate_responses(loaded, [record], max_new_tokens=2 + index, do_sample=True, seed=index)
        answered.append({**record, **answer})
    return answered


@pytest.fixture(scope="module")
def patched(model_path: Path) -> LoadedModel:
    loaded = load_model(model_path)
    patch_model(loaded.model)
    return loaded


@pytest.fixture(scope="module")
def eager(model_path: Path) -> LoadedModel:
    loaded = load_model(model_path)
    loaded.model.set_attn_implementation("eager")
    return loaded


def picture_columns(ids: list[int], image_id: int, count: int) -> list[list[int]]:
    columns = [column for column, token in enumerate(ids) if token == image_id]
    size = len(columns) // count
    return [columns[k * size : (k + 1) * size] for k in range(count)]


def expected_ratios(keys: torch.Tensor, record: dict[str, Any], ids: list[int], image_id: int, region: list[int] | None) -> Any:
    """(mass share, per-image-mean share) from the attention on each key, (S,)."""
    pictures = picture_columns(ids, image_id, len(record["images"]))
    if region is not None:
        grid = keys[pictures[0]].reshape(4, 4)
        inside = grid[region[0] : region[2], region[1] : region[3]].sum()
        return (inside / grid.sum()).item(), (inside / grid.sum()).item()
    sums = torch.stack([keys[columns].sum() for columns in pictures])
    means = torch.stack([keys[columns].mean() for columns in pictures])
    target = record["target"]
    return (sums[target] / sums.sum()).item(), (means[target] / means.sum()).item()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_equals_teacher_forced_eager_maps(
    patched: LoadedModel, eager: LoadedModel, records: list[dict[str, Any]], layer: int
) -> None:
    found = attention_ratios(patched, records, layer=layer)
    for record, ratios in zip(records, found, strict=True):
        encoded = encode_prompts(eager, [record], padding_side="right", answers=[record["response_ids"]])
        with torch.no_grad():
            maps = eager.model(**encoded.inputs, output_attentions=True).attentions[layer][0].mean(0)
        start, stop = encoded.response_spans[0]
        keys = maps[start - 1 : stop if record["ended"] else stop - 1].mean(0)
        ids = encoded.inputs["input_ids"][0].tolist()
        mass, mean = expected_ratios(keys, record, ids, eager.image_token_id, record["region"])
        assert ratios["ratio_mass"] == pytest.approx(mass, abs=1e-5), record["id"]
        assert ratios["ratio_mean"] == pytest.approx(mean, abs=1e-5), record["id"]
        on_pictures = keys[encoded.inputs["input_ids"][0] == eager.image_token_id].sum().item()
        assert sum(ratios["attention"]) == pytest.approx(on_pictures, abs=1e-5), record["id"]


def official_ratio(eager: LoadedModel, record: dict[str, Any], layer: int, steps: int) -> float:
    """MIA-DPO's way: attention maps of greedy generation, one layer, heads and decode steps averaged, mean over tokens."""
    encoded = encode_prompts(eager, [record], padding_side="left")
    output = eager.model.generate(
        **encoded.inputs, max_new_tokens=steps, do_sample=False, output_attentions=True, return_dict_in_generate=True,
        suppress_tokens=[eager.image_token_id],
    )  # fmt: skip
    ids = encoded.inputs["input_ids"][0].tolist()
    decode = [step[layer][0, :, -1, : len(ids)].mean(0) for step in output.attentions[1:]]
    keys = torch.stack(decode).mean(0)
    region = None
    if record["format"] == "grid":
        region = official_grid_region(record["target"], record["num_images"], (4, 4))
    elif record["format"] == "pip":
        region = official_pip_region((4, 4))
    return expected_ratios(keys, record, ids, eager.image_token_id, region)[1]


@pytest.mark.parametrize("layer", [1, 2])
def test_official_code_options_equal_the_official_algorithm(
    patched: LoadedModel, eager: LoadedModel, records: list[dict[str, Any]], layer: int
) -> None:
    answers = [generate_responses(eager, [record], max_new_tokens=6)[0] for record in records]
    answered = [{**record, **answer} for record, answer in zip(records, answers, strict=True)]
    found = attention_ratios(patched, answered, layer=layer, statistic="mean", regions="official_code", drop_first_row=True)
    for record, ratios in zip(answered, found, strict=True):
        assert ratios["ratio"] == pytest.approx(official_ratio(eager, record, layer, 6), abs=1e-5), record["id"]


def test_answers_ended_by_the_model_equal_the_official_algorithm(
    patched: LoadedModel, eager: LoadedModel, records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row of the last answer token predicts the end token; the official maps hold it, so the teacher-forced rows must."""
    record = records[0]
    [free] = generate_responses(eager, [record], max_new_tokens=4)
    for loaded in (eager, patched):
        # The third token of the free answer becomes an end token.
        monkeypatch.setattr(loaded.model.generation_config, "eos_token_id", free["response_ids"][2])
    [answer] = generate_responses(eager, [record], max_new_tokens=8)
    assert answer["ended"] and answer["response_ids"] == free["response_ids"][:2]
    [ratios] = attention_ratios(patched, [{**record, **answer}], layer=1, statistic="mean", drop_first_row=True)
    assert ratios["ratio"] == pytest.approx(official_ratio(eager, record, 1, 8), abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 2, 3])
def test_independent_of_the_batch(patched: LoadedModel, records: list[dict[str, Any]], batch_size: int) -> None:
    together = attention_ratios(patched, records)
    apart = [
        ratios
        for start in range(0, len(records), batch_size)
        for ratios in attention_ratios(patched, records[start : start + batch_size])
    ]
    for one, other in zip(together, apart, strict=True):
        assert one["ratio"] == pytest.approx(other["ratio"], abs=1e-6)
        assert one["attention"] == pytest.approx(other["attention"], abs=1e-6)


def test_the_forward_stops_after_the_layer(patched: LoadedModel, records: list[dict[str, Any]]) -> None:
    ran = []
    layers = patched.model.get_decoder().layers
    hooks = [layer.mlp.register_forward_hook(lambda *_, index=index: ran.append(index)) for index, layer in enumerate(layers)]
    try:
        attention_ratios(patched, records[:2], layer=1)
    finally:
        for hook in hooks:
            hook.remove()
    assert ran == [0]


def test_text_answers_are_taken_where_ids_are_missing(patched: LoadedModel, records: list[dict[str, Any]]) -> None:
    plain = {**records[0], "response": "red circle", "response_ids": None, "ended": True}
    ids = patched.tokenizer("red circle", add_special_tokens=False).input_ids
    assert attention_ratios(patched, [plain]) == attention_ratios(patched, [{**plain, "response_ids": ids}])


def test_an_answer_without_rows_has_no_ratio(patched: LoadedModel, records: list[dict[str, Any]]) -> None:
    empty = {**records[0], "response": "", "response_ids": [], "ended": True}
    counted, dropped = attention_ratios(patched, [empty])[0], attention_ratios(patched, [empty], drop_first_row=True)[0]
    assert 0 < counted["ratio"] < 1
    assert dropped["ratio"] is None and dropped["ratio_mean"] is None


def test_box_is_used_where_the_patch_grid_is_anothers(patched: LoadedModel, records: list[dict[str, Any]]) -> None:
    grid = records[1]
    moved = {**grid, "patch_grid": [24, 24], "region": [0, 0, 24, 8]}
    assert attention_ratios(patched, [moved]) == attention_ratios(patched, [grid])
    with pytest.raises(DataError, match=r"r1/grid.*needs `box`"):
        attention_ratios(patched, [{**moved, "box": None}])


def test_layer_outside_the_model_is_refused(patched: LoadedModel, records: list[dict[str, Any]]) -> None:
    with pytest.raises(StageError, match="score.layer: expected 0 to 2"):
        attention_ratios(patched, records[:1], layer=3)


def write_responses(folder: Path, records: list[dict[str, Any]]) -> Path:
    import json

    path = folder / "responses.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def context_of(folder: Path, stage: str, config: dict[str, Any]) -> StageContext:
    run = RunFolder(folder / "run")
    return StageContext(run=run, config=RunConfig.from_dict(config), stage=stage, progress=Progress())


def test_stage_continues_after_a_kill(tmp_path: Path, model_path: Path, records: list[dict[str, Any]]) -> None:
    path = write_responses(tmp_path, records)
    config = {"model": str(model_path), "score": {"input": str(path), "batch_size": 2}}
    context = context_of(tmp_path, "score", config)
    summary = score.run(context)
    assert summary["layer"] == 1 and summary["scores"] == {"sequence": 3, "grid": 2, "pip": 1, "single": 1}
    whole = (context.folder / "scores.jsonl").read_bytes()
    by_id = {record["id"]: record for record in read_jsonl(context.folder / "scores.jsonl")}
    assert by_id.keys() == {record["id"] for record in records} and by_id["r6/single"]["ratio"] == 1.0

    lines = whole.splitlines(keepends=True)
    (context.folder / "scores.jsonl").write_bytes(b"".join(lines[:3]) + lines[3][:40])
    assert score.run(context) == summary
    assert (context.folder / "scores.jsonl").read_bytes() == whole


@pytest.mark.smoke
@pytest.mark.parametrize("drop_first_row", [False, True])
def test_recorded_while_generating_equals_the_teacher_forced_pass(
    patched: LoadedModel, records: list[dict[str, Any]], drop_first_row: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"layer": 1, "regions": "official_code", "drop_first_row": drop_first_row}
    prompts = [{k: v for k, v in record.items() if k not in ("response", "response_ids")} for record in records]
    free = generate_responses(patched, prompts, max_new_tokens=6)
    # A token that some answers hold and some do not ends those early; their later rows must not count.
    end = next(t for answer in free for t in answer["response_ids"][1:] if any(t not in a["response_ids"] for a in free))
    monkeypatch.setattr(patched.model.generation_config, "eos_token_id", end)
    answers = generate_responses(patched, prompts, max_new_tokens=6, record=settings)
    assert {answer["ended"] for answer in answers} == {True, False}
    answered = [{**prompt, **answer} for prompt, answer in zip(prompts, answers, strict=True)]
    for record, forced in zip(answered, attention_ratios(patched, answered, **settings), strict=True):
        recorded = record["recorded"]
        assert {name: recorded[name] for name in settings} == settings
        assert recorded["attention"] == pytest.approx(forced["attention"], abs=1e-6), record["id"]
        assert ratios_of(record, recorded["attention"], recorded["tokens"], "mean")["ratio"] == pytest.approx(
            forced["ratio_mean"], abs=1e-6
        )


def test_stage_runs_no_model_where_attention_was_recorded(
    tmp_path: Path, model_path: Path, patched: LoadedModel, records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"layer": 1, "regions": "box", "drop_first_row": False}
    answers = generate_responses(patched, records, max_new_tokens=5, record=settings)
    path = write_responses(tmp_path, [{**record, **answer} for record, answer in zip(records, answers, strict=True)])
    config = {"model": str(model_path), "score": {"input": str(path)}}
    forced = score.run(context_of(tmp_path / "other", "score", {**config, "score": {**config["score"], "layer": 2}}))  # type: ignore[dict-item]
    assert forced["recorded"] == 0
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    context = context_of(tmp_path, "score", config)
    assert score.run(context)["recorded"] == len(records)
    assert all(record["ratio"] is not None for record in read_jsonl(context.folder / "scores.jsonl"))
