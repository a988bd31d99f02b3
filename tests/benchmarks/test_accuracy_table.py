"""The accuracy table: right backends keep the rule, a wrong one is named and fails the command."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from devices import DEVICE

from benchmarks.kernels import accuracy

SMALL = [
    accuracy.Case(op=case.op, name=case.name, heads=(4, 2), dim=16, tree=case.tree, prompt=(96, 96), options=case.options, rows=case.rows)
    for case in accuracy.CASES
]  # fmt: skip


def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(accuracy, "CASES", SMALL)
    monkeypatch.setattr(accuracy.head, "CASES", accuracy.head.SMALL_CASES)
    monkeypatch.setattr(accuracy, "here", lambda op, device: ["reference"])
    monkeypatch.setattr(sys, "argv", ["accuracy", "--device", DEVICE, "--output", str(folder)])
    with pytest.raises(SystemExit) as ended:
        accuracy.main()
    return ended.value.code


def test_the_reference_keeps_the_rule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(tmp_path, monkeypatch) == 0
    records = json.loads((tmp_path / f"accuracy_{DEVICE}.json").read_text())["records"]
    tensors = {"tree_attention": 6, "attention_mass": 3}
    heads = 5 + 7
    assert len(records) == 3 * (3 * sum(tensors.values()) + heads)  # dtypes, cases
    assert all(record["margin"] <= 1 and record["torch_error"] > 0 for record in records)


def test_a_wrong_backend_fails_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = accuracy.ours

    def wrong(*args: object, **how: object) -> accuracy.Named:
        found = right(*args, **how)  # type: ignore[arg-type]
        return {**found, "mass": found["mass"] * (1 + 2e-5)}

    monkeypatch.setattr(accuracy, "ours", wrong)
    assert run(tmp_path, monkeypatch) == 1
    printed = capsys.readouterr()
    assert "**broken**" in printed.out
    assert "broken: attention_mass reference float32 mass in 'answer rows', margin" in printed.err


def test_a_refusal_is_kept_with_its_reason() -> None:
    [record] = accuracy.measure(SMALL[2], "sdpa", torch.float32, "cpu")
    assert "softcap" in record["refusal"]


def test_a_backend_that_fails_is_kept_and_fails_the_command_at_its_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = accuracy.ours

    def failing(given: accuracy.Problem, *args: object, **how: object) -> accuracy.Named:
        if given.case.name == "pair":
            raise RuntimeError("out of resources")
        return right(given, *args, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(accuracy, "ours", failing)
    assert run(tmp_path, monkeypatch) == 1
    assert "failed: tree_attention reference bfloat16 in 'pair': RuntimeError: out of resources" in capsys.readouterr().err
    records = json.loads((tmp_path / f"accuracy_{DEVICE}.json").read_text())["records"]
    assert sum("failure" in record for record in records) == 3 and sum("error" in record for record in records) > 60
