"""At which layer the ratio tells right from wrong: the area, the choice of a layer, thresholds from scores, the stage with all layers."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prompt_records import make_prompts
from tiny_models import make_tiny_llava

from mmdpo_kernels import patch_model
from mmdpo_trainers.answers.attention_ratios import attention_ratios, recorded_answers, response_rows, target_segments
from mmdpo_trainers.answers.layer_choice import ALL, LEAST, Answers, layer_curves, verdicts
from mmdpo_trainers.answers.packed import packed, unpacked
from mmdpo_trainers.answers.transformers_engine import generate_responses
from mmdpo_trainers.config.run_config import RunConfig
from mmdpo_trainers.data.roc import area, youden
from mmdpo_trainers.errors import ConfigError
from mmdpo_trainers.files.json_lines import read_jsonl
from mmdpo_trainers.methods.selected import Facts
from mmdpo_trainers.methods.selection import SelectionRules
from mmdpo_trainers.models.encode import encode_prompts
from mmdpo_trainers.models.loaded import LoadedModel
from mmdpo_trainers.models.loading import load_model
from mmdpo_trainers.processes.progress import Progress
from mmdpo_trainers.stages import models, score, select
from mmdpo_trainers.stages.context import StageContext
from mmdpo_trainers.stages.evaluate import answer_batch
from mmdpo_trainers.stages.folder import RunFolder
from mmdpo_trainers.stages.train import preference_config

KINDS = [("sequence", 2), ("grid", 3), ("sequence", 5), ("pip", 2), ("single", 1)]
SETTINGS: dict[str, Any] = {"regions": "box", "drop_first_row": False}


def pairs_won(right: np.ndarray, wrong: np.ndarray) -> float:
    """The definition: every right answer against every wrong one."""
    return float(np.mean([1.0 if r > w else 0.5 if r == w else 0.0 for r in right for w in wrong]))


@pytest.mark.parametrize("seed", range(20))
def test_the_area_is_the_share_of_pairs_won(seed: int) -> None:
    draw = np.random.default_rng(seed)
    # Few different values, so that there are ties.
    right, wrong = (draw.integers(0, 6, size=draw.integers(2, 30)) / 5 for _ in range(2))
    found = area([right], [wrong])
    assert found is not None
    assert found.value == pytest.approx(pairs_won(right, wrong), abs=1e-12)
    assert (found.right, found.wrong) == (len(right), len(wrong))
    # DeLong's variance by its definition: of each answer's share of pairs won.
    over = np.array([pairs_won(right[i : i + 1], wrong) for i in range(len(right))])
    other = np.array([pairs_won(right, wrong[i : i + 1]) for i in range(len(wrong))])
    half = 1.959964 * np.sqrt(over.var(ddof=1) / len(over) + other.var(ddof=1) / len(other))
    assert (found.low, found.high) == pytest.approx((max(0, found.value - half), min(1, found.value + half)), abs=1e-6)


def test_the_interval_covers_the_true_area() -> None:
    draw = np.random.default_rng(0)
    # Normal scores one standard deviation apart: the area is Phi(1 / sqrt 2) = .7602.
    found = [area([draw.normal(1, 1, 60)], [draw.normal(0, 1, 50)]) for _ in range(400)]
    covered = np.mean([each.low <= 0.760250 <= each.high for each in found if each])
    assert 0.92 <= covered <= 0.98


def test_strata_are_not_compared_with_each_other() -> None:
    right, wrong = [np.array([0.1, 0.3]), np.array([0.8, 0.9, 1.0])], [np.array([0.2, 0.25]), np.array([0.7, 0.95])]
    expected = (4 * pairs_won(right[0], wrong[0]) + 6 * pairs_won(right[1], wrong[1])) / 10
    found = area(right, wrong)
    assert found is not None and found.value == pytest.approx(expected)
    nan = area([np.array([np.nan, 0.1, 0.3]), np.array([0.5])], [wrong[0], wrong[1]])
    assert nan is not None and nan.value == pytest.approx(pairs_won(right[0], wrong[0])) and (nan.right, nan.wrong) == (2, 2)
    assert area([np.array([0.5])], [np.array([0.1, 0.2])]) is None


@pytest.mark.parametrize("seed", range(10))
def test_youden_is_the_best_of_all_thresholds(seed: int) -> None:
    draw = np.random.default_rng(seed)
    right, wrong = draw.normal(0.6, 0.2, 30).round(2), draw.normal(0.4, 0.2, 40).round(2)
    gain = lambda t: np.mean(wrong < t) - np.mean(right < t)  # noqa: E731
    assert gain(youden(right, wrong)) == pytest.approx(max(gain(t) for t in np.linspace(-0.5, 1.5, 2001)))
    assert youden(np.array([0.8, 0.9]), np.array([0.2, 0.3])) == pytest.approx(0.55)


def test_packed_shares_come_back() -> None:
    shares = np.random.default_rng(0).random((3, 4))
    shares[1, 2] = np.nan
    assert unpacked(packed(shares), 3) == pytest.approx(shares, abs=5e-4, nan_ok=True)


def answered(format: str, index: int, right: bool, ratios: list[float], **changes: Any) -> dict[str, Any]:
    heads = packed(np.array(ratios)[:, None])
    record = {
        "id": f"{format}{index}", "source_id": f"{format}{index}", "format": format, "num_images": 2 + index % 2, "answer": "red",
        "response": "red" if right else "blue", "options": None, "ratios": ratios, "recorded": {"attention": [[1.0]], "heads": heads},
    }  # fmt: skip
    return {**record, **changes}


def constructed(count: int, **telling: int) -> list[dict[str, Any]]:
    """Answers whose ratio at one layer of three tells right from wrong, by format; at the others it says nothing."""
    draw = random.Random(0)
    records = []
    for format, layer in telling.items():
        for index in range(count):
            right = draw.random() < 0.5
            ratios = [draw.random() for _ in range(3)]
            ratios[layer] = 0.3 + 0.4 * right + 0.35 * draw.random()
            records.append(answered(format, index, right, ratios))
    return records


def curves_of(records: list[dict[str, Any]], **options: Any) -> dict[str, Any]:
    return layer_curves(Answers.of(records, [4, 5, 6], "exact", 0), **{"best_by": "all", "go_by": None, **options})


def test_the_layer_that_tells_is_chosen_and_measured_on_other_answers() -> None:
    records = constructed(120, sequence=2, grid=2)
    found = curves_of(records)
    best = found["best"][ALL]
    assert best["layer"] == 6 and found["chosen"] == {ALL: 6, "sequence": 6, "grid": 6}
    assert best["auc"]["value"] > 0.9 and found["auc"][ALL][0]["value"] < 0.65
    halves = best["auc_chosen"], best["auc"]
    for side in ("right", "wrong"):
        assert sum(half[side] for half in halves) == found["answers"][ALL][side]
        assert all(half[side] > 30 for half in halves)
    # By hand: both halves of the same split, within the strata.
    again = Answers.of(records, [4, 5, 6], "exact", 0)
    rest = [not first for first in again.first_half]
    won = total = 0.0
    for stratum in set(again.strata):
        values = {
            kind: np.array(
                [
                    r[2]
                    for r, s, k, h in zip(again.ratios, again.strata, again.right, rest, strict=True)
                    if (s, k, h) == (stratum, kind, True)
                ]
            )
            for kind in (True, False)
        }
        number = len(values[True]) * len(values[False])
        won, total = won + number * pairs_won(values[True], values[False]), total + number
    assert best["auc"]["value"] == pytest.approx(won / total, abs=1e-4)
    assert "tells right answers from wrong ones well: layer 6" in " ".join(verdicts(found))


def test_each_format_may_have_its_own_layer() -> None:
    records = constructed(120, sequence=0, grid=2)
    assert curves_of(records, best_by="format")["chosen"].items() >= {"sequence": 4, "grid": 6}.items()
    one = curves_of(records)["chosen"]
    assert one["sequence"] == one["grid"] == one[ALL]
    kept = curves_of(records, go_by=5)
    assert kept["chosen"] == {ALL: 5, "sequence": 5, "grid": 5}
    assert any("does not tell right from wrong at layer 5" in sentence for sentence in verdicts(kept))


def test_a_head_that_does_better_than_their_mean_is_named() -> None:
    draw = random.Random(1)
    records = constructed(120, sequence=1)
    for record in records:
        heads = np.array([[draw.random(), draw.random()] for _ in range(3)])
        heads[2, 1] = 0.5 * (record["response"] == "red") + 0.4 * draw.random()
        record["ratios"] = [draw.random() for _ in range(3)]
        record["recorded"] = {"attention": [[1.0]], "heads": packed(heads)}
    found = curves_of(records)
    assert (found["best_head"]["layer"], found["best_head"]["head"]) == (6, 1) and found["best_head"]["auc"]["value"] > 0.99
    assert found["heads"][ALL][2][1] > 0.99 and "head 1 of layer 6" in " ".join(verdicts(found))
    assert "One head" not in " ".join(verdicts(curves_of(constructed(120, sequence=1))))


def test_nothing_is_chosen_by_a_handful_of_answers() -> None:
    found = curves_of(constructed(LEAST, sequence=2))
    assert found["best"][ALL] is None and found["chosen"][ALL] == 5 and "too few" in " ".join(verdicts(found))
    assert "Nothing to compare" in verdicts(curves_of([]))[0]


def test_what_has_no_area_is_explained() -> None:
    """Of a format with wrong answers alone, and of a layer that sees no picture."""
    wrong = [answered("grid", index, False, [0.1, 0.2, 0.3]) for index in range(31)]
    unseen = [{**record, "ratios": [None, *record["ratios"][1:]]} for record in constructed(120, sequence=2)]
    said = verdicts(curves_of([*wrong, *unseen]))
    assert [each for each in said if each.startswith("Format")] == [
        "Format grid has no AUC: it takes two right and two wrong answers about the same number of pictures, and there are 0 right and 31 "
        "wrong ones."
    ]
    assert said.count("No AUC at layer 4: too few answers see the pictures from there.") == 1
    assert not [each for each in verdicts(curves_of(constructed(120, sequence=2))) if "no AUC" in each.lower()]


def test_all_prompts_of_a_source_record_are_in_one_half_and_the_unclear_are_counted() -> None:
    records = constructed(60, sequence=1)
    twins = [{**record, "id": f"{record['id']}/grid", "format": "grid"} for record in records]
    found = Answers.of([*records, *twins], [4, 5, 6], "exact", 0)
    assert found.first_half[:60] == found.first_half[60:] and 15 < sum(found.first_half[:60]) < 45
    odd = [
        {**records[0], "num_images": 1}, {**records[1], "answer": None}, {**records[2], "answer": "yes", "response": "it is red"},
        {**records[3], "recorded": {"attention": None, "heads": None}}, {**records[4], "response": ""},
    ]  # fmt: skip
    left = Answers.of(odd, [4, 5, 6], "contains", 0)
    assert left.left_out == {"single": 1, "no_truth": 1, "unclear": 2, "no_ratio": 1} and not left.right


def test_a_layer_that_seldom_sees_the_pictures_is_not_chosen() -> None:
    records = constructed(120, sequence=2, grid=1)
    for index, record in enumerate(records):
        if index % 3:
            record["ratios"] = [*record["ratios"][:2], None]
    assert curves_of(records)["chosen"][ALL] == 5


def scored(index: int, ratio: float | None, right: bool, images: int = 2, format: str = "sequence") -> dict[str, Any]:
    response = "red" if right else "blue"
    return {
        "id": str(index),
        "format": format,
        "num_images": images,
        "ratio": ratio,
        "answer": "red",
        "response": response,
        "options": None,
    }


def rules(records: list[dict[str, Any]], **options: Any) -> SelectionRules:
    chosen = RunConfig.from_dict({"select": options}).select
    others = SelectionRules.from_options(dataclasses.replace(chosen, quantile=None, min_perplexity=None), attention=False)
    return SelectionRules.from_options(chosen, Facts.of(records, {"others": others.failing}).ratios("others"))


def test_thresholds_by_quantile() -> None:
    records = [scored(i, i / 10, False) for i in range(11)] + [scored(20 + i, 0.5, False, 3) for i in range(4)]
    records += [scored(30, None, False), scored(31, 1.0, False, 1, "single")]
    assert rules(records, quantile=0.3).thresholds == {"sequence": {2: pytest.approx(0.3), 3: 0.5}}
    every = rules(records, quantile=1.0).thresholds["sequence"]
    assert every[2] > 1.0 and every[3] > 0.5, "all answers stay under it"
    parted = [scored(i, 0.6 + i / 100, True) for i in range(10)] + [scored(20 + i, 0.2 + i / 100, False) for i in range(10)]
    assert rules(parted, quantile="youden").thresholds == {"sequence": {2: pytest.approx((0.29 + 0.6) / 2)}}
    assert rules([scored(0, 0.5, True)], quantile="youden").thresholds == {}
    with pytest.raises(ConfigError, match="leave one of the two out"):
        RunConfig.from_dict({"select": {"quantile": 0.5, "thresholds": {"pip": {2: 0.5}}}})
    with pytest.raises(ConfigError, match="above 0 and at most 1, or youden, got 1.5"):
        RunConfig.from_dict({"select": {"quantile": 1.5}})
    with pytest.raises(ConfigError, match="score.layer must be"):
        RunConfig.from_dict({"score": {"layer": "beste"}})


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llava(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def patched(model_path: Path) -> LoadedModel:
    loaded = load_model(model_path, dtype="float64")
    patch_model(loaded.model)
    return loaded


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory, patched: LoadedModel) -> list[dict[str, Any]]:
    prompts = make_prompts(tmp_path_factory.mktemp("prompts"), KINDS)
    wanted = {**SETTINGS, "layer": ALL}
    answers = [generate_responses(patched, [prompt], max_new_tokens=2 + n, record=wanted)[0] for n, prompt in enumerate(prompts)]
    return [{**prompt, **answer} for prompt, answer in zip(prompts, answers, strict=True)]


def eager_shares(eager: LoadedModel, record: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """(L, N) attention on the segments and (L, G) shares of the target, from eager maps in float64."""
    encoded = encode_prompts(eager, [record], padding_side="right", answers=[record["response_ids"]])
    segments = target_segments(eager, [record], encoded)[0]
    rows = response_rows([record], encoded, drop_first_row=False)[0]
    with torch.no_grad():
        maps = eager.model(**encoded.inputs, output_attentions=True).attentions
    keys = torch.stack([layer[0][:, rows].mean(1) for layer in maps])  # (L, Hq, S)
    number = 2 if record["format"] in ("grid", "pip") else len(record["images"])
    mass = torch.stack([keys[..., segments == n].sum(-1) for n in range(number)], -1)  # (L, Hq, N)
    groups = mass.unflatten(1, (eager.model.config.get_text_config().num_key_value_heads, -1)).mean(2)
    target = 0 if record["format"] in ("grid", "pip") else record["target"]
    return mass.mean(1).numpy(), (groups[..., target] / groups.sum(-1)).numpy()


def test_every_layer_equals_eager_maps_and_its_own_recording(
    model_path: Path, patched: LoadedModel, records: list[dict[str, Any]]
) -> None:
    eager = load_model(model_path, dtype="float64")
    eager.model.set_attn_implementation("eager")
    forced = recorded_answers(patched, records, layer="best", **SETTINGS)
    alone = [recorded_answers(patched, records, layer=layer, **SETTINGS) for layer in range(3)]
    for place, record in enumerate(records):
        attention, heads = eager_shares(eager, record)
        for each in (forced[place], record["recorded"]):
            assert each["layers"] == [0, 1, 2]
            # Written with six digits, and heads in float16.
            assert np.array(each["attention"]) == pytest.approx(attention, rel=5e-6, abs=1e-6), record["id"]
            assert unpacked(each["heads"], 3) == pytest.approx(heads, abs=5e-4), record["id"]
        for layer in range(3):
            # Eager attention takes its softmax in float32, whatever the model's numbers are.
            assert alone[layer][place]["attention"] == pytest.approx(attention[layer].tolist(), abs=1e-6), record["id"]
            assert forced[place]["attention"][layer] == pytest.approx(alone[layer][place]["attention"], rel=5e-6)


def context_of(folder: Path, stage: str, config: dict[str, Any]) -> StageContext:
    return StageContext(run=RunFolder(folder), config=RunConfig.from_dict(config), stage=stage, progress=Progress())


def write_lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def test_the_stage_goes_by_the_best_layer_and_the_same_after_a_kill(
    tmp_path: Path, model_path: Path, patched: LoadedModel, records: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Truths are made so that layer 0 tells right from wrong; the stage has to find that, from recordings and without a model."""
    draw = random.Random(0)
    responses = []
    for index in range(160):
        base = records[index % 4]
        attention = [[draw.random() + 0.1 for _ in row] for row in base["recorded"]["attention"]]
        place = 0 if base["format"] in ("grid", "pip") else base["target"]
        right = attention[0][place] / sum(attention[0]) > 1 / len(attention[0])
        answer = base["response"] if right else "no such thing"
        recorded = {**base["recorded"], "attention": attention}
        responses.append({**base, "id": f"r{index}", "source_id": f"r{index}", "answer": answer, "recorded": recorded})
    path = write_lines(tmp_path / "responses.jsonl", responses)
    options = {"model": str(model_path), "select": {"match": "exact"}}
    config = {**options, "score": {"input": str(path), "layer": "best"}}
    monkeypatch.setattr(models, "load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    context = context_of(tmp_path / "run", "score", config)
    summary = score.run(context)
    assert summary["recorded"] == 160 and summary["layer"][ALL] == 0
    file = context.folder / "scores.jsonl"
    whole = file.read_bytes()
    for record in read_jsonl(file):
        assert record["ratio"] == pytest.approx(record["ratios"][0], abs=1e-6)
    layers = json.loads((context.folder / "layers.json").read_text())
    assert layers["chosen"][ALL] == 0 and layers["best"][ALL]["auc"]["value"] > 0.95

    # Killed before the layer was chosen: the lines of the first pass are there, some of them.
    middle = [{**record, "ratio": record["ratios"][1]} for record in read_jsonl(file)]
    write_lines(file, middle[:100])
    assert score.run(context) == summary and file.read_bytes() == whole

    chosen = context_of(
        tmp_path / "run", "select", {**config, "select": {"quantile": "youden", "match": "exact", "min_perplexity": None}}
    )
    kept = select.run(chosen)
    assert kept["thresholds"]["sequence"].keys() == {2, 5} and sum(kept["pairs"].values()) > 40


def test_evaluation_and_the_training_log_go_by_the_chosen_layers(
    tmp_path: Path, model_path: Path, patched: LoadedModel, records: list[dict[str, Any]]
) -> None:
    config = RunConfig.from_dict({"model": str(model_path), "score": {"layer": "best", "best_by": "format"}})
    chosen = {ALL: 2, "sequence": 0}
    found = answer_batch(patched, records[:2], options=config.evaluate, score=config.score, chosen=chosen)
    for record, answer, layer in zip(records, found, (0, 2), strict=False):
        [alone] = attention_ratios(patched, [{**record, **answer}], layer=layer)
        assert answer["ratio"] == pytest.approx(alone["ratio"], rel=1e-5) and "recorded" not in answer
    context = context_of(tmp_path, "train", config.to_dict())
    assert preference_config(context, range(3), evaluate=False).attention_layer == 1, "nothing chosen yet"
    (tmp_path / "score").mkdir()
    (tmp_path / "score" / "layers.json").write_text(json.dumps({"chosen": chosen}))
    assert preference_config(context, range(3), evaluate=False).attention_layer == 2
