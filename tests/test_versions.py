"""What `make versions` promises: every row is tested or says why not, floors are those of pyproject.toml, the page is the result's."""

from __future__ import annotations

import json
import re

from benchmarks.delivery import page, versions
from benchmarks.delivery.rows import OLDEST, ROWS, SUITES
from benchmarks.measure import RESULTS, ROOT


def test_every_row_is_run_or_says_why_not() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)
    for row in ROWS:
        assert bool(row.suites) != bool(row.reason) and set(row.suites) <= set(SUITES), row.name
        assert all((ROOT / name).is_file() for name in row.constraints)
    words = [word for suite in SUITES.values() for word in suite if word.endswith(".py")]
    assert words and all((ROOT / word).is_file() for word in words)


def test_floors_are_the_tested_ones() -> None:
    train = versions.PROJECT["project"]["optional-dependencies"]["train"]
    lowest = {line.partition(">=")[0]: line.partition(">=")[2] for line in [*train, *versions.PROJECT["project"]["dependencies"]]}
    (oldest,) = (row for row in ROWS if row.name == "all oldest")
    assert OLDEST.items() <= oldest.pins.items()
    for name, version in oldest.pins.items():
        assert version.startswith(f"{lowest[name]}."), name


def test_a_row_s_versions_take_the_place_of_the_constraints() -> None:
    (oldest,) = (row for row in ROWS if row.name == "all oldest")
    lines = versions.constraints_of(oldest).splitlines()
    assert len({line.partition("==")[0].lower().replace("_", "-") for line in lines}) == len(lines)
    assert {f"{name}=={version}" for name, version in oldest.pins.items()} <= set(lines)
    assert [line for line in lines if line.startswith("torch==")] and all(
        re.fullmatch(r"[\w.-]+==[\w.]+", line) for line in lines
    )


def test_the_committed_rows_are_green_or_have_their_reason() -> None:
    result = json.loads((RESULTS / "versions.json").read_text())
    assert [row["name"] for row in result["rows"]] == [row.name for row in ROWS]
    for row in result["rows"]:
        assert row["state"] in ("passed", "not run") and bool(row["note"]) == (row["state"] == "not run"), row["name"]
        assert row["state"] == "not run" or (row["tests"]["passed"] and not row["tests"]["failed"]), row["name"]
    text = (ROOT / "docs" / "installing.md").read_text(encoding="utf-8")
    assert f"<!-- versions: begin -->\n{page.versions_table(result)}\n<!-- versions: end -->" in text
