"""The benchmarks' own arithmetic, and that the side-by-side ways agree on a small model."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import __main__ as benchmarks_cli
from benchmarks import measure
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import peers, sanitize_cases
from benchmarks.kernels import goals, harness, registry, sweep_tiles
from benchmarks.kernels import page as kernels_page
from benchmarks.kernels.case import Ceilings, Contestant, Run, Work
from benchmarks.kernels.ops import attention_mass as mass_cases
from benchmarks.kernels.ops import tree_attention as tree_cases
from benchmarks.runs import arm_seeds, attention_ratio, mdpo_seeds, mia_dpo_seeds, mia_dpo_worlds
from benchmarks.runs.training_step import page, parts
from benchmarks.runs.training_step.setting import SMALL as TINY_STEP
from benchmarks.runs.training_step.setting import Setting
from benchmarks.runs.training_step.sides import MDPO, Side, make, ours
from benchmarks.runs.training_step.stepping import Loop
from mmdpo_kernels.backends import measured


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


def test_four_ways_give_one_ratio() -> None:
    loaded = attention_ratio.build(attention_ratio.SMALL)
    record = attention_ratio.with_answer(loaded, attention_ratio.prompt_record(loaded, attention_ratio.SMALL))
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


def test_arms_over_seeds_have_mean_and_range() -> None:
    def found(value: float) -> dict[str, Any]:
        after = {"accuracy": {"after": dict.fromkeys(("sequence", "grid", "pip", "single"), value)}}
        accuracy = {"before": dict.fromkeys(("sequence", "grid", "pip"), 0.5), **after["accuracy"]}
        return {"method": "rated", "accuracy": accuracy, "arms": {"best": after}, "seconds": {"total": 61.4}}

    text = arm_seeds.table({0: found(0.6), 2: found(0.8)})
    assert "| arm | sequence | grid | pip | multi-image mean | single |" in text
    assert f"| no training | {' | '.join(['0.500 (0.500 to 0.500)'] * 4)} | - |" in text
    assert f"| SFT on the best answer | {' | '.join(['0.700 (0.600 to 0.800)'] * 5)} |" in text
    assert "Seeds 0, 2: mean, smallest to largest in brackets. Seconds of the runs: 61, 61." in text


def test_arms_of_held_out_pairs_and_of_reward_models() -> None:
    held_out = {"accuracy": {"answer/disagree": 0.5}, "held_out": {"all": {"gap": {"crop": 1.0, "blank": 2.0}}}}
    pairs = {"method": "mpo", "before": held_out, "arms": {"mpo": held_out, "dpo": held_out}, "seconds": {"total": 1.0}}
    text = arm_seeds.table({0: pairs})
    assert "| arm | answer, disagree | gap, all, crop |" in text and "| MPO | 0.500 | 1.000 |" in text
    rewards = {"rewards": {"all": {"accuracy": 0.9}}}
    ranked = {"method": "reward", "before": rewards, "arms": {"reward": rewards}, "seconds": {"total": 1.0}}
    assert "| Reward model | 0.900 |" in arm_seeds.table({0: ranked})


def test_cells_of_worlds_have_mean_range_and_differences() -> None:
    figures = {
        str(seed): {**summary(0.6 + 0.1 * seed, 0.95), "auc": dict.fromkeys(("sequence", "grid", "pip"), 0.9)} for seed in (0, 1)
    }
    for arm in figures["1"]["arms"].values():
        arm["accuracy"] = {**arm["accuracy"], "after": dict.fromkeys(("sequence", "grid", "pip", "single"), 0.8)}
    figures["1"]["auc"]["pip"] = None
    text = mia_dpo_worlds.table({"shapes/0.3/best": figures})
    assert (
        "| shapes | 0.3 | best | attention-selected (MIA-DPO) | 0.650 | 0.650 | 0.650 | 0.650 (0.600 to 0.700) | 0.950 |" in text
    )
    assert "sequence 0.90, grid 0.90, pip 0.90; 10, 10 pairs" in text
    assert "attention-selected +0.0, -10.0 points from random wrong, +10.0, +20.0 from no training" in text


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
    speed, seconds = {"median": 2.25, "min": 2.0, "max": 2.5}, {"TRL": [2.25], "ours": [1.0]}

    def compared(kind: str, limit: float) -> dict[str, Any]:
        flop = {"TRL": limit * 1e9, "ours": 1e9}
        return {"speed_up": {kind: speed}, "seconds_per_pair": seconds, "flop_per_pair": flop, "limit": {kind: limit}}

    text = page.text_of(
        {
            "dpo": compared("plain", 2.5),
            "mdpo": compared("plain", 2.6),
            "questions": compared("questions", 2.25),
            "memory": {"share": {"dpo": {"plain": 0.6}}, "peak_bytes_above_model": {"dpo": {"TRL": 1e9}}},
            "growth": [{"what": "pictures", "value": 8, **compared("growth", 2.0)}],
            "loading": {"seconds_per_record": {"dpo": {"read": [0.001], "collate": [0.002, 0.004, 0.003]}}},
            "profile": {"dpo": {"ours": {"products": 0.75, "other": 0.25}}},
        }
    )
    assert "| 2.25 (2.00 to 2.50) | 2.50 | 90% | at least 2.2, 90% of the limit | met |" in text
    assert "| 2.25 (2.00 to 2.50) | 2.60 | 87% | at least 1.8, 90% of the limit | missed |" in text
    assert "| 2.25 (2.00 to 2.50) | 2.25 | 100% | at least 4.5, 90% of the limit | missed |" in text
    assert "| 0.60 |  |  | at most 0.6 | met |" in text
    assert "| pictures | 8 | 2.25 | 1.00 | 2.25 (2.00 to 2.50) | 2.00 | 112% |" in text
    assert "| DPO | ours | 1.00 | 1 | 1 |" in text and "| DPO | 1.0 | 3.0 |" in text and "| DPO | ours | 75% | 25% |" in text


def small_run(tmp_path: Path, *arguments: str, device: str = "cpu") -> tuple[int, dict[str, Any]]:
    """Exit status and result file of the command line on tiny inputs."""
    status = benchmarks_cli.main(["--small", "--device", device, "--repeats", "1", "--output", str(tmp_path), *arguments])
    return status, json.loads((tmp_path / f"ops_{device}.json").read_text())


def test_every_op_runs_through_the_command_line(tmp_path: Path) -> None:
    """Also that runs of single ops add up in one file, and that a page comes out of it."""
    small_run(tmp_path, "preference_loss", "--no-memory")
    options = ("--no-memory", "--case", "pair", "--case", "recorded", "--case", "rows", "--case", "frozen_32k_200")
    status, found = small_run(tmp_path, *options)
    assert status == 0
    cases = {(entry["op"], entry["case"]): entry for entry in found["cases"]}
    assert list(cases) == [
        ("tree_attention", "pair"),
        ("tree_attention", "recorded"),
        ("attention_mass", "rows"),
        ("linear_logprobs", "frozen_32k_200"),
        ("preference_loss", "mdpo"),
        ("preference_loss", "mdpo_sums"),
        ("preference_loss", "from_hidden"),
        ("preference_loss", "from_model"),
    ]
    for entry in cases.values():
        assert entry["floor_seconds"] > 0
        timed = {name: one for name, one in entry["contestants"].items() if "seconds" in one}
        assert {"auto", "reference"} <= set(timed)
        assert any(not one["ours"] for one in timed.values())
        for one in timed.values():
            assert len(one["seconds"]) == 1 and one["median"] > 0 and max(one["errors"].values()) < 1e-4
    pair, recorded = (cases["tree_attention", name]["contestants"] for name in ("pair", "recorded"))
    assert pair["SDPA, grouped heads"]["version"] == version("torch")
    assert pair["FlashAttention 2"]["reason"] == "it runs on cuda only"
    assert pair["triton"]["reason"] == "its kernels are only interpreted on the CPU, which says nothing about speed"
    assert pair["SDPA, grouped heads"]["omits"] == ["lse"], "outputs and gradients of copies add up to those of the tree"
    assert "eager maps" not in pair and "auto, no mass" not in pair
    assert recorded["auto"]["omits"] == [] and recorded["auto, no mass"]["omits"] == ["mass"]
    assert found["machine"]["packages"]["torch"] == version("torch")


def test_memory_is_measured_in_a_fresh_process(tmp_path: Path) -> None:
    status, found = small_run(tmp_path, "attention_mass", "--case", "rows", "--contestant", "torch, dense")
    assert status == 0
    assert found["cases"][0]["contestants"]["torch, dense"]["peak_bytes"] >= 0


def contestant(
    name: str, factor: float = 1.0, *, ours: bool = False, reason: str | None = None, seen: list[str] | None = None
) -> Contestant:
    """Somebody whose sums of segments are `factor` times the right ones."""

    def prepare(problem: Any) -> Run:
        def call() -> dict[str, torch.Tensor]:
            if seen is not None:
                seen.append(name)
            return {"mass": factor * mass_cases.truth(problem)["mass"]}

        return Run(call=call, results=lambda found: found)

    return Contestant(name=name, ours=ours, prepare=prepare, unavailable_reason=lambda device, dtype: reason)


def small_race(*contestants: Contestant) -> dict[str, Any]:
    setting = harness.Setting(device=torch.device("cpu"), dtype=torch.float32, size="small", repeats=2, memory=False)
    [case] = registry.cases(["attention_mass"], ["rows"])
    ceilings = Ceilings(flops_per_second=1e12, bytes_per_second=1e11)
    return harness.race(case, contestants, setting, ceilings, lambda line: None)


def test_a_wrong_contestant_is_not_timed() -> None:
    seen: list[str] = []
    entries = small_race(
        contestant("right", seen=seen),
        contestant("wrong", 1.001, seen=seen),
        contestant("nothing", float("nan")),
        contestant("absent", reason="absent is not installed"),
    )["contestants"]
    assert "seconds" in entries["right"]
    assert entries["wrong"]["wrong"].startswith("mass is off by 1.0e-03 of its norm")
    assert seen.count("wrong") == 1, "it ran once, to be checked"
    assert "nan" in entries["nothing"]["wrong"]
    assert entries["absent"]["reason"] == "absent is not installed"
    assert not any("seconds" in entries[name] for name in ("wrong", "nothing", "absent"))


def test_one_stray_entry_is_wrong() -> None:
    truth = torch.ones(100_000)
    found = truth.clone()
    found[3] += 2e-3  # 6e-6 of the norm
    with pytest.raises(harness.WrongResult, match="at worst by 2.0e-03"):
        harness.error_of("mass", found, truth, torch.float32)
    minus_infinity = torch.tensor([1.0, float("-inf")])
    assert harness.error_of("lse", minus_infinity, minus_infinity.double(), torch.float32) == 0
    with pytest.raises(harness.WrongResult, match="shape"):
        harness.error_of("lse", minus_infinity[:1], minus_infinity, torch.float32)


def test_own_backends_that_are_wrong_fail_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "contestants", lambda op: [contestant("ours", 2.0, ours=True), contestant("theirs", 2.0)])
    assert small_run(tmp_path, "attention_mass", "--case", "rows")[0] == 1
    monkeypatch.setattr(registry, "contestants", lambda op: [contestant("ours", ours=True), contestant("theirs", 2.0)])
    assert small_run(tmp_path, "attention_mass", "--case", "rows", "--no-memory")[0] == 0


def test_a_case_that_is_no_more_leaves_the_result_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "contestants", lambda op: [contestant("ours", ours=True)])
    options = ("attention_mass", "--no-memory", "--case")
    _, found = small_run(tmp_path, *options, "rows")
    found["cases"][0]["case"] = "renamed since"
    (tmp_path / "ops_cpu.json").write_text(json.dumps(found))
    status, found = small_run(tmp_path, *options, "mean")
    assert status == 0 and [entry["case"] for entry in found["cases"]] == ["mean"]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (["--contestant", "nobody"], "no contestant is called nobody; there are "),
        (["--case", "nothing"], "no case is called nothing; there are "),
        (["nothing"], "no op is called nothing; there are "),
        (["--repeats", "0"], "--repeats must be at least 1, got 0"),
        (["--device", "cuda"], "--device cuda: torch finds no GPU"),
        (["--output", __file__], "File exists"),
    ],
)
def test_wrong_arguments_end_with_a_line(
    wrong: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        benchmarks_cli.main(["--small", *wrong])
    assert ended.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("part", [["--contestant", "auto"], ["--dtype", "float16"], ["--check"], ["--small"]])
def test_a_part_of_a_result_does_not_take_the_place_of_the_whole(part: list[str]) -> None:
    parser = benchmarks_cli._parser()
    assert benchmarks_cli._folder(parser.parse_args(["--case", "rows"])) == measure.RESULTS
    assert benchmarks_cli._folder(parser.parse_args(part)) == measure.ROOT / "build" / "benchmarks"
    assert benchmarks_cli._folder(parser.parse_args([*part, "--output", "here"])) == Path("here")


def test_floors() -> None:
    ceilings = Ceilings(flops_per_second=1e9, bytes_per_second=1e6)
    assert Work(flops=2e9, bytes=1e6).floor(ceilings) == 2.0
    assert Work(flops=2e9, bytes=5e6).floor(ceilings) == 5.0
    assert (Work(flops=2e9, bytes=1e6).bound(ceilings), Work(flops=2e9, bytes=5e6).bound(ceilings)) == ("arithmetic", "memory")


def test_attention_work_counts_what_is_seen() -> None:
    """A prompt of 3 with two responses of 2: pairs 1 + 2 + 3, and for each response 4 + 5."""
    sizes = {"heads": 2, "kv_heads": 1, "dim": 8, "pictures": 1, "prompt": 3, "response": 2}
    forest = [(3, [(2, []), (2, [])])]
    problem = tree_cases.make(lambda sizes: forest, timed="forward + backward")(sizes, torch.device("cpu"), torch.float32)
    assert problem.tree_end is not None and problem.tree_end.tolist() == [[7, 7, 7, 5, 5, 7, 7]]
    assert problem.paths.tolist() == [[0, 1, 2, 3, 4], [0, 1, 2, 5, 6]]
    # Two products forward, five backward, 2 D FLOPs each, two heads.
    assert tree_cases.work(problem).flops == 24 * 7 * 2 * 8 * 2
    # Forward: query, output of two heads, key, value of one; backward twice as much.
    assert tree_cases.work(problem).bytes == (6 + 12) * 7 * 8 * 4


def result_file(tmp_path: Path, native: float, dense: float) -> None:
    """A result of the CPU in which only the mass was measured."""

    def one(ours: bool, seconds: float, peak: float) -> dict[str, Any]:
        facts = {"ours": ours, "version": None, "errors": {"mass": 1e-7}, "omits": [], "peak_bytes": peak}
        return {**facts, "seconds": [seconds] * 3, "median": seconds, "percent_of_floor": 50.0}

    entry = {
        "op": "attention_mass",
        "case": "rows",
        "why": "mass of each row",
        "timed": "forward",
        "sizes": {"rows": 60},
        "flops": 1e9,
        "bytes": 1e6,
        "floor_seconds": 1e-3,
        "bound": "arithmetic",
        "contestants": {
            "native": one(True, native, 1e5),
            "torch, dense": one(False, dense, 2e6),
            "flash-colreduce": {"ours": False, "version": None, "reason": "it runs on cuda only"},
            "sloppy": {"ours": False, "version": "1.0", "wrong": "mass is off"},
        },
    }
    ceilings = {"flops_per_second": 1e12, "bytes_per_second": 1e11}
    content = {
        "machine": measure.machine(),
        "device": "cpu",
        "dtype": "float32",
        "size": "cpu",
        "ceilings": ceilings,
        "cases": [entry],
    }
    measure.write_result("ops_cpu", content, tmp_path / "results")


@pytest.mark.parametrize(("native", "verdict"), [(1e-3, "met"), (1.6e-3, "missed")])
def test_the_page_comes_from_the_json_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, native: float, verdict: str) -> None:
    monkeypatch.setattr(measure, "ROOT", tmp_path)
    monkeypatch.setattr(measure, "RESULTS", tmp_path / "results")
    (tmp_path / "docs").mkdir()
    path = tmp_path / "docs" / "kernels.md"
    path.write_text("".join(f"<!-- ops_{device}: {end} -->\n" for device in ("cpu", "cuda") for end in ("begin", "end")))
    (tmp_path / "docs" / "results.md").write_text("<!-- heads: begin -->\n<!-- heads: end -->\n")
    (tmp_path / "README.md").write_text("<!-- results: begin -->\n<!-- results: end -->\n")
    result_file(tmp_path, native, dense=3e-3)
    kernels_page.write_all()
    text, drawing = path.read_text(), tmp_path / "docs" / "kernels_cpu.svg"
    assert f"| at least 2 | {verdict} |" in text
    assert "| 0.050 (0.10 of 2.00 MB) | at most 0.1 | met |" in text
    assert "| tree_attention pair was not measured | at least 1.6 | not measured |" in text
    assert f"| **native** | {native * 1e3:.3g} " in text
    assert "| sloppy 1.0 |  |  |  |  | wrong: mass is off |" in text
    assert "Not here: flash-colreduce: it runs on cuda only." in text
    assert "Not measured yet; `make gpu`" in text
    before = text, drawing.read_bytes()
    kernels_page.write_all()
    assert (path.read_text(), drawing.read_bytes()) == before


def test_gpu_phases_go_on_after_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def python(*lines: str) -> Any:
        return lambda plan, seconds: [[sys.executable, "-c", "\n".join(lines)]]

    started: list[Path] = []

    def slow(plan: gpu.Plan, seconds: float) -> Any:
        started.append(tmp_path / "started")
        program = f"import pathlib, time; print('slow', flush=True); pathlib.Path({str(started[0])!r}).touch(); time.sleep(3600)"
        return python(program)(plan, seconds)

    def stopped_clock() -> float:
        """Stands still, and is read while the slow command is at work only once that has begun."""
        while started and not started[0].exists():
            time.sleep(0.01)
        return 0.0

    def nothing(plan: gpu.Plan, seconds: float) -> Any:
        raise gpu.LeftOut("there is nothing to do")

    phases = (
        gpu.Phase(name="tests", seconds=6000, commands=python("raise ValueError('broken')")),
        gpu.Phase(name="build", seconds=0, commands=nothing),
        # What the first left is not its own to use up.
        gpu.Phase(name="tiles", seconds=-5999, commands=slow),
        gpu.Phase(name="environment", seconds=600, commands=python("print('here')")),
    )
    monkeypatch.setattr(gpu, "PHASES", phases)
    monkeypatch.setattr(gpu, "time", SimpleNamespace(monotonic=stopped_clock))
    assert gpu.main(["--device", "cpu", "--small", "--output", str(tmp_path)]) == 1
    summary = (tmp_path / "summary.md").read_text()
    assert "| tests | failed | 0 | ValueError: broken |" in summary
    assert "| build | left out | 0 | there is nothing to do |" in summary
    assert "| tiles | out of time | 0 | ended after 1 s |" in summary
    assert "| environment | passed | 0 |  |" in summary
    log = (tmp_path / "log.txt").read_text()
    assert "broken" in log and "slow" in log and "here" in log


def test_gpu_phases_run_on_the_cpu_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The build and the tests have their own tests; the benchmarks run here in one process above."""
    # Whatever else this machine is doing.
    monkeypatch.setattr(gpu, "PHASES", tuple(replace(phase, seconds=100 * phase.seconds) for phase in gpu.PHASES))
    phases = ("environment", "sanitizer", "tiles", "kernels run")
    status = gpu.main(["--device", "cpu", "--small", "--output", str(tmp_path), *(f"--phase={name}" for name in phases)])
    summary = (tmp_path / "summary.md").read_text()
    assert status == 0, summary
    assert "| sanitizer | left out | 0 | compute-sanitizer watches CUDA kernels, there are none on the CPU |" in summary
    assert {path.name for path in tmp_path.iterdir()} == {"log.txt", "summary.md", "phases.json"}
    log = (tmp_path / "log.txt").read_text()
    assert "mass, mean, softcap, window, native: ran" in log and "tree, mass, native: left out, it " in log


def test_gpu_phases_that_have_passed_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in the second part, or with a phase that failed: the rest alone, all of it in the summary; other code begins anew."""
    marks = tmp_path / "marks"
    marks.mkdir()

    def leaves(name: str, fails_without: str = "") -> Any:
        lines = [
            "import pathlib, time",
            f"pathlib.Path({str(marks)!r}, {name!r} + str(time.time_ns())).touch()",
            f"assert not {fails_without!r} or pathlib.Path({str(tmp_path)!r}, {fails_without!r}).exists(), 'not yet'",
        ]
        return lambda plan, seconds: [[sys.executable, "-c", "\n".join(lines)]]

    phases = (
        gpu.Phase(name="build", seconds=600, commands=leaves("build")),
        gpu.Phase(name="tests", seconds=600, commands=leaves("tests"), parts=(1,)),
        gpu.Phase(name="tiles", seconds=600, commands=leaves("tiles", fails_without="mended"), parts=(2,)),
    )
    monkeypatch.setattr(gpu, "PHASES", phases)
    monkeypatch.setattr(gpu, "fingerprint", lambda root: "this code")

    def ran(*arguments: str) -> tuple[int, list[str]]:
        status = gpu.main(["--device", "cpu", "--output", str(tmp_path / "out"), *arguments])
        names = sorted(path.name.rstrip("0123456789") for path in marks.iterdir())
        for path in marks.iterdir():
            path.unlink()
        return status, names

    assert ran("--part", "1") == (0, ["build", "tests"])
    assert ran("--part", "2") == (1, ["build", "tiles"])
    (tmp_path / "mended").touch()
    assert ran() == (0, ["build", "tiles"])
    text = (tmp_path / "out" / "summary.md").read_text()
    assert [line.split(" | ")[:2] for line in text.splitlines() if "passed" in line] == [
        [f"| {name}", "passed"] for name in ("build", "tests", "tiles")
    ]
    assert ran("--again") == (0, ["build", "tests", "tiles"])
    monkeypatch.setattr(gpu, "fingerprint", lambda root: "other code")
    assert ran("--part", "1") == (0, ["build", "tests"])


def test_backends_are_timed_with_the_tiles_just_found_and_no_earlier_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert gpu.MEASURED == measured.VARIABLE
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    plan = gpu.Plan(device="cuda", small=False, folder=tmp_path)
    assert gpu._choices(plan, 60)[0][0] == sys.executable
    for name in ("tiles.json", "choice_nvidia_h100.json"):
        (tmp_path / name).write_text(name)
    [(program, setting, *command)] = gpu._choices(plan, 60)
    assert program == "env" and command[0] == sys.executable
    name, _, folder = setting.partition("=")
    assert name == gpu.MEASURED and [path.read_text() for path in Path(folder).iterdir()] == ["tiles.json"]


def test_a_phase_finds_peers_that_travel_and_nothing_measured_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder comes last: what a user has put on the path is taken before it."""
    for at, folder in enumerate(("own", "travels")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "some_peer.py").write_text(f"WHERE = {at}")
    (tmp_path / "travels" / "other_peer.py").touch()
    monkeypatch.setattr(peers, "FOLDER", tmp_path / "travels")
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "own"))
    monkeypatch.setenv(gpu.MEASURED, "build/gpu")
    program = "import os, other_peer, some_peer; print(some_peer.WHERE, os.environ.get('MMDPO_MEASURED'))"
    phase = gpu.Phase(name="tests", seconds=600, commands=lambda plan, seconds: [[sys.executable, "-c", program]])
    outcome = gpu.run_phase(phase, gpu.Plan(device="cpu", small=True, folder=tmp_path), 600)
    assert outcome.state == "passed" and "\n0 None\n" in outcome.output


def test_peers_that_travel_are_told_from_those_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "build" / "gpu_peers"
    assert peers.versions(folder) == []
    (folder / "a_peer-1.2.dist-info").mkdir(parents=True)
    (folder / "a_peer.py").write_text("12345")
    monkeypatch.setattr(peers, "FOLDER", folder)
    monkeypatch.setattr(peers, "ROOT", tmp_path)
    monkeypatch.setattr(peers, "LOOKED_FOR", ("a_peer", "torch", "no_such_peer"))
    monkeypatch.syspath_prepend(str(folder))
    assert peers.present() == {"a_peer": "from build/gpu_peers", "torch": "installed", "no_such_peer": "absent"}
    assert (peers.versions(folder), peers.size(folder)) == (["a_peer-1.2"], 5)


def test_peers_are_not_laid_over_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit):
        peers.main(["--folder", str(tmp_path)])
    assert "holds something else" in capsys.readouterr().err and (tmp_path / "mine.txt").exists()
    with pytest.raises(SystemExit):
        peers.main(["--python", "three"])
    assert "expected a version as 3.12, got three" in capsys.readouterr().err


@pytest.mark.nightly  # asks a package index
def test_peers_that_travel(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert peers.main(["--folder", str(tmp_path / "peers")]) == 0
    assert "trl-1.16" in capsys.readouterr().out and (tmp_path / "peers" / "trl" / "kernels").exists()
    # Laid out again in its own place.
    assert peers.main(["--folder", str(tmp_path / "peers")]) == 0


def test_each_of_the_two_gpu_commands_fits_into_five_minutes(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu.main(["--dry-run"]) == 0
    for part in (1, 2):
        assert 0 < sum(phase.seconds for phase in gpu.PHASES if part in phase.parts) <= 5 * 60
    assert {part for phase in gpu.PHASES for part in phase.parts} == {1, 2}
    assert "benchmarks.gpu.sanitize_cases --device cuda" in capsys.readouterr().out
    assert set(gpu.SANITIZED) == set(sanitize_cases.CASES)
    wanted = {(op, name) for op, groups in gpu.compiled_cases().items() for names in groups for name in names}
    assert wanted <= {(case.op, case.name) for case in registry.cases(size="cuda")}


def test_the_sweep_varies_one_pass_and_keeps_the_table_s_tiles_of_the_others() -> None:
    [case] = registry.cases(["tree_attention"], ["causal_8k"])
    problem = case.make(case.sizes["small"], torch.device("cpu"), torch.bfloat16)
    kept = sweep_tiles.table_tiles(problem)
    for which, (candidate, *_) in sweep_tiles.CANDIDATES.items():
        with sweep_tiles.varied(which, candidate, problem):
            assert sweep_tiles.table_tiles(problem) == replace(kept, **{which: sweep_tiles.Tiles(*candidate)})


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_goal_is_found_in_a_whole_result(device: str) -> None:
    """In a result where everybody took a second, ours half of it, no goal is without a figure."""
    measured = []
    for case in registry.cases(size=device):
        contestants = {
            contestant.name: {
                "ours": contestant.ours,
                "omits": [] if contestant.ours else ["mass"],
                "seconds": [0.5 if contestant.ours else 1.0] * 3,
                "median": 0.5 if contestant.ours else 1.0,
                "peak_bytes": 1e6,
            }
            for contestant in registry.contestants(case.op)
        }
        measured.append(
            {
                "op": case.op,
                "case": case.name,
                "sizes": dict(case.sizes[device]),
                "flops": 1e12,
                "floor_seconds": 0.1,
                "contestants": contestants,
            }
        )
    content = {"cases": measured, "ceilings": {"flops_per_second": 1e15, "bytes_per_second": 3e12}}
    of_device = [goal for goal in goals.GOALS if goal.device == device]
    assert len(of_device) > 3
    for goal in of_device:
        finding = goal.find(goals.Result(content))
        assert finding.figure, goal.what
