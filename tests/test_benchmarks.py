"""The benchmarks' own arithmetic, and that the side-by-side ways agree on a small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import attention_ratio, mdpo_seeds, measure, mia_dpo_seeds
from benchmarks.training_step import page, parts
from benchmarks.training_step.setting import Setting
from benchmarks.training_step.sides import MDPO, Side, make, ours
from benchmarks.training_step.stepping import Loop

TINY_STEP = Setting(
    layers=1,
    width=32,
    heads=2,
    mlp=64,
    vision_layers=2,
    vision_width=64,
    vision_mlp=64,
    side=28,
    pictures=2,
    response_tokens=3,
    records=4,
)


def test_ratio_is_taken_within_turns() -> None:
    seconds = {"slow": [10.0, 30.0, 8.0], "fast": [5.0, 10.0, 2.0]}
    assert measure.ratios(seconds, "slow", "fast") == {"median": 3.0, "min": 2.0, "max": 4.0}


def test_alternation_runs_in_turn_and_drops_the_warm_up() -> None:
    calls: list[str] = []
    found = measure.alternate({name: lambda name=name: calls.append(name) for name in "ab"}, 2, lambda _: None)
    assert calls == ["a", "b"] * 3
    assert {name: len(times) for name, times in found.items()} == {"a": 2, "b": 2}


def test_peak_memory_counts_what_is_freed_again() -> None:
    def work() -> None:
        block = bytearray(64 << 20)
        block[::4096] = b"x" * len(block[::4096])

    assert 60 << 20 < measure.peak_memory(work) < 96 << 20


def test_four_ways_give_one_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SIDE": 56, "PROMPT_TOKENS": 140, "ANSWER_TOKENS": 5, "HIDDEN": 64, "HEADS": 4, "LAYERS": 4}.items():
        monkeypatch.setattr(attention_ratio, name, value)
    loaded = attention_ratio.build()
    record = attention_ratio.with_answer(loaded, attention_ratio.prompt_record(loaded))
    found = {name: way(loaded, record) for name, way in attention_ratio.WAYS.items()}
    assert found["score"] == pytest.approx(found["eager pass"], abs=1e-5)
    assert found["generate + score"] == pytest.approx(found["official way"], abs=1e-5)
    assert 0 < found["score"] < 1


def summary(after: float, single: float) -> dict[str, object]:
    before = {"sequence": 0.5, "grid": 0.5, "pip": 0.5, "single": 0.95}
    accuracy = {"before": before, "after": {"sequence": after, "grid": after, "pip": after, "single": single}}
    arms = {name: {"accuracy": accuracy} for name in mia_dpo_seeds.ARMS}
    return {"accuracy": accuracy, "arms": arms, "pairs": {"sequence": 7, "grid": 2, "pip": 1}}


@pytest.mark.parametrize(("after", "single", "verdict"), [(0.6, 0.95, "met"), (0.59, 0.95, "missed"), (0.9, 0.92, "missed")])
def test_verdict_of_a_seed(after: float, single: float, verdict: str) -> None:
    text = mia_dpo_seeds.table({3: summary(after, single)})
    assert f"goal {verdict}" in text
    assert f"| 3 | attention-selected (MIA-DPO) | {after:.3f} |" in text
    assert text.count("\n| 3 |") == 2 + len(mia_dpo_seeds.ARMS)


def test_section_of_a_page_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- x: begin -->\nold\n<!-- x: end -->\nb\n")
    for _ in range(2):
        measure.write_section("page.md", "x", measure.markdown(["p", "q"], [["1", "2"]]))
    assert page.read_text() == "a\n<!-- x: begin -->\n| p | q |\n| --- | --- |\n| 1 | 2 |\n<!-- x: end -->\nb\n"
    with pytest.raises(ValueError, match="y: begin"):
        measure.write_section("page.md", "y", "text")


def test_goals_are_checked_seed_by_seed() -> None:
    def arm(gap: float, reward: float) -> dict[str, Any]:
        figures = {"gap": {"crop": gap, "blank": 2 * gap}, "rewards": {"chosen": reward, "rejected": -1.0}}
        return {"accuracy": {"answer/disagree": 0.5}, "held_out": {"caption": figures}}

    def summary(gap: float, reward: float) -> dict[str, Any]:
        arms = {"mdpo": arm(gap, reward), "dpo": arm(2.0, -0.5)}
        return {"before": {"accuracy": {"answer/disagree": 0.25}}, "arms": arms}

    met = mdpo_seeds.text_of({0: summary(3.0, 0.1), 1: summary(4.0, 0.0)})
    assert "| mDPO | - | - | 3.50 (3.00 to 4.00) | 7.00 (6.00 to 8.00) |" in met
    assert "caption, crop: gap of mDPO over DPO's: 1.50, 2.00 (>= 1.5 in every seed: met)" in met
    assert "captions, mDPO: 0.10, 0.00 (0 or above in every seed: met)" in met
    missed = mdpo_seeds.text_of({0: summary(2.9, -0.1)})
    assert missed.count("missed") == 3
    assert "| no training | 0.25 (0.25 to 0.25) |" in missed, "the base has an accuracy"


def tiny_bench(setting: Setting, lines: list[str] | None = None) -> parts.Bench:
    return parts.Bench(setting=setting, repeats=1, progress=lambda line: None if lines is None else lines.append(line))


def test_training_steps_agree_with_the_official_mdpo_and_take_turns() -> None:
    """Also that a cached reference costs its share of a pass."""
    lines: list[str] = []
    sides = {
        "official": Side(kind="official"),
        "rows": Side(kind="official rows", batch=2),
        "ours": ours(loss_type=MDPO, checkpointing=True),
        "apart": Side(kind="ours", options={"loss_type": MDPO, "tree_packing": False, "own_vision": True}),
    }
    found = tiny_bench(TINY_STEP.but(corrupted=True), lines).race(sides, TINY_STEP.but(corrupted=True), terms=3)
    assert {name: len(times) for name, times in found.items()} == dict.fromkeys(sides, 1)
    assert [line.split(": ")[0] for line in lines[:5]] == [
        f"warm-up {name}" for name in ("official", "rows", "ours", "ours", "apart")
    ]
    assert lines[3].startswith("warm-up ours: reference pass")
    with pytest.raises(SystemExit, match="expected 1 log 2"):
        tiny_bench(TINY_STEP).race({"ours": ours(loss_type=MDPO)}, TINY_STEP.but(corrupted=True), terms=1)


def test_training_steps_agree_with_trl() -> None:
    pytest.importorskip("trl", reason="TRL is a peer, installed with the [peers] extra")
    setting = TINY_STEP.but(questions=2)
    sides = {"TRL": Side(kind="trl", batch=2), "ours": ours(batch=2, group_by_pictures=True)}
    assert set(tiny_bench(setting).race(sides, setting, terms=1)) == {"TRL", "ours"}


def test_a_training_loop_moves_one_step_at_a_time() -> None:
    trainer = make(ours(), TINY_STEP)
    with Loop(trainer) as loop:
        for count in (1, 2, 3):
            loop.step()
            assert trainer.state.global_step == count
    trainer = make(ours(), TINY_STEP)
    trainer.train_dataset = trainer.train_dataset.remove_columns("prompt")
    with pytest.raises(RuntimeError, match="the training loop failed"), Loop(trainer) as loop:
        loop.step()


def test_goals_of_the_training_step() -> None:
    speed = {"median": 2.25, "min": 2.0, "max": 2.5}
    seconds = {"TRL": [2.25], "ours": [1.0]}
    text = page.text_of(
        {
            "dpo": {"speed_up": {"plain": speed}, "seconds_per_pair": seconds},
            "questions": {"speed_up": speed},
            "memory": {"share": {"dpo": {"plain": 0.6}}, "peak_bytes_above_model": {"dpo": {"TRL": 1e9}}},
            "growth": [{"what": "pictures", "value": 8, "seconds_per_pair": seconds, "speed_up": speed}],
        }
    )
    assert "| 2.25 (2.00 to 2.50) | at least 2.2 | met |" in text
    assert "| 2.25 (2.00 to 2.50) | at least 4.5 | missed |" in text
    assert "| 0.60 | at most 0.6 | met |" in text
    assert "| pictures | 8 | 2.25 | 1.00 | 2.25 |" in text
