"""README's table and docs/results.md say what the committed results hold."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import measure, readme
from benchmarks.kernels import page
from benchmarks.runs import arm_seeds, methods, mia_dpo_seeds, mia_dpo_worlds, vllm_families


def section(name: str, of: str) -> str:
    text = (measure.ROOT / of).read_text(encoding="utf-8")
    return text.split(f"<!-- {name}: begin -->\n")[1].split(f"\n<!-- {name}: end -->")[0]


def test_tables_are_those_of_the_committed_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    committed = {name: section(name, of) for name, of in (("results", "README.md"), ("heads", "docs/results.md"))}
    seeds = json.loads((measure.RESULTS / "mia_dpo_seeds.json").read_text())["summaries"]
    assert section("mia_dpo_seeds", "docs/results.md") == mia_dpo_seeds.table(seeds)
    for path in measure.RESULTS.glob("shapes_*_seeds.json"):
        seeds = json.loads(path.read_text())["summaries"]
        assert section(path.stem, "docs/results.md") == arm_seeds.table(seeds), path.stem
    assert section("methods", "docs/methods.md") == methods.text()
    families = json.loads((measure.RESULTS / "vllm_families.json").read_text())
    assert section("vllm_families", "docs/generation.md") == vllm_families.text_of(families)
    assert section("mia_dpo_worlds", "docs/results.md") == mia_dpo_worlds.table(mia_dpo_worlds.measured(measure.RESULTS))
    (tmp_path / "docs").mkdir()
    for of in ("README.md", "docs/results.md", "docs/kernels.md"):
        (tmp_path / of).write_bytes((measure.ROOT / of).read_bytes())
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    page.write_all()
    assert {name: section(name, of) for name, of in (("results", "README.md"), ("heads", "docs/results.md"))} == committed


def test_a_row_without_a_result_says_so() -> None:
    text = readme.text_of({name: {} for name in readme.FILES})
    assert text.count(f"| {readme.NOT_MEASURED} |") == 6 and text.endswith("Nothing is measured yet.")
