"""The benchmarks' own arithmetic, and that the side-by-side ways agree on a small model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import attention_ratio, measure, mia_dpo_seeds


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
