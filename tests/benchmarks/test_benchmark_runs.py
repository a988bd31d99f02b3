"""Every benchmark runs from its command line, each of its parts, on tiny inputs; what is committed stays as it is."""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from devices import DEVICE
from rich.console import Console

from benchmarks.gpu import environment
from benchmarks.kernels import accuracy, choose_backends, registry, sweep_tiles
from benchmarks.measure import ROOT
from benchmarks.runs import (
    arm_seeds,
    attention_ratio,
    both_ways,
    data_at_size,
    families,
    import_time,
    kill_demo,
    layer_cost,
    mdpo_seeds,
    mia_dpo_seeds,
    mia_dpo_worlds,
    online_step,
    pipeline,
    published_benchmarks,
    recurrent_tree,
    vllm_families,
)
from benchmarks.runs.training_step import __main__ as training_step_cli
from benchmarks.runs.training_step.setting import SMALL
from benchmarks.runs.training_step.sides import Side, loss_of, make
from benchmarks.runs.whole_shapes import __main__ as whole_shapes_cli
from benchmarks.runs.whole_shapes import cases as shape_cases
from benchmarks.runs.whole_shapes import flops, shapes, subject
from mmdpo_kernels.backends.cpu_kinds import cpu_kind
from mmdpo_kernels.backends.ops_table import OPS
from mmdpo_trainers.training import model_parts

BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(autouse=True)
def committed_files_stay() -> Iterator[None]:
    """Results and pages are those of whole runs."""

    def contents() -> dict[Path, str]:
        paths = [ROOT / "README.md", *(ROOT / "docs").iterdir(), *(BENCHMARKS / "results").iterdir()]
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}

    before = contents()
    yield
    assert contents() == before


def result(folder: Path, name: str) -> dict[str, Any]:
    return dict(json.loads((folder / f"{name}.json").read_text()))


@pytest.mark.nightly
def test_every_part_of_the_training_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("trl", reason="TRL is a peer, installed with the [peers] extra")
    training_step_cli.main(["--small", "--output", str(tmp_path)])
    found = result(tmp_path, "training_step_cpu")
    assert set(training_step_cli.PARTS) <= set(found)
    assert len(found["features"]["speed_up"]) == 8 and len(found["growth"]) == 3
    assert all(abs(sum(each.values()) - 1) < 1e-9 for sides in found["profile"].values() for each in sides.values())
    assert {len(times) for each in found["loading"]["seconds_per_record"].values() for times in each.values()} == {4}
    assert (tmp_path / "results_training_step.md").is_file()
    capsys.readouterr()
    wanted = {"side": {"kind": "ours", "batch": 2}, "setting": {**found["setting"], "records": 2}}
    training_step_cli.main(["--memory-of", json.dumps(wanted)])
    # This process has had more than that before: only a fresh one, as above, tells the peak.
    assert re.fullmatch(r"-?\d+", capsys.readouterr().out.splitlines()[-1])


def test_the_stages_of_the_pipeline(tmp_path: Path) -> None:
    """The plain ways give the answers and ratios of the stages, or it stops."""
    pipeline.main(["--small", "--output", str(tmp_path)])
    found = result(tmp_path, "pipeline_cpu")
    assert set(found["counts"]) == set(found["processor_seconds"]) > set(pipeline.STAGES)
    assert all(count > 0 for counts in found["counts"].values() for count in counts.values())
    assert "| score, plain | " in (tmp_path / "results_pipeline.md").read_text()


def test_whole_shapes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Some ways of one shape; what cannot be had here says why, and what is measured is not measured again."""
    names = (shape_cases.OURS, shape_cases.TRL, f"{shape_cases.TRL}, FA3", shape_cases.WITHOUT_ALL)
    monkeypatch.setitem(shape_cases.WAYS, "dpo", {name: shape_cases.WAYS["dpo"][name] for name in names})
    monkeypatch.setitem(shape_cases.WEIGHED, "dpo", (shape_cases.OURS,))
    chosen = ["--small", "--output", str(tmp_path), "--shape", "Qwen2.5-VL-7B", "--method", "dpo"]
    monkeypatch.setattr(shape_cases, "find_spec", lambda name: None)
    whole_shapes_cli.main(chosen)
    rows = result(tmp_path, "whole_shapes_cpu")["shapes"]["Qwen2.5-VL-7B"]["dpo"]
    assert rows[names[1]] == {"reason": "TRL is not installed"} and rows[names[2]] == {"reason": "TRL is not installed"}
    ours, apart = rows[names[0]], rows[names[3]]
    assert ours["tokens"] < apart["tokens"] and ours["flops"] < apart["flops"] and ours["utilisation"] > 0
    assert ours["peak_bytes"] and not {"reason", "failed"} & {*ours, *apart}
    text = (tmp_path / "results_whole_shapes.md").read_text()
    assert "times as fast as ours, without all three" in text and "- TRL, FA3: TRL is not installed (Qwen2.5-VL-7B DPO)" in text
    whole_shapes_cli.main([*chosen, "--resume", "--seconds", "0.001"])
    again = result(tmp_path, "whole_shapes_cpu")["shapes"]["Qwen2.5-VL-7B"]["dpo"]
    assert again[names[0]]["per_pair"] == ours["per_pair"] and again[names[1]] == {"reason": "no time was left for it"}
    monkeypatch.setattr(whole_shapes_cli, "find_spec", lambda name: None)
    whole_shapes_cli.main(chosen)
    assert "left out: training needs transformers, peft" in capsys.readouterr().out


@pytest.mark.nightly
def test_whole_shapes_of_every_family(tmp_path: Path) -> None:
    pytest.importorskip("trl", reason="TRL is a peer, installed with the [peers] extra")
    whole_shapes_cli.main(["--small", "--output", str(tmp_path)])
    found = result(tmp_path, "whole_shapes_cpu")["shapes"]
    missing = {answer for of in found.values() for rows in of.values() for row in rows.values() if (answer := row.get("reason"))}
    assert (
        len(found) == 3
        and len(missing) == 3
        and not [row for of in found.values() for rows in of.values() for row in rows if "failed" in row]
    )


def test_operations_of_a_step_are_those_of_a_count_by_hand() -> None:
    """LLaVA-1.5-7B from its configuration alone: 6.5 G weights in the language tower's linears."""
    shape = subject.Shape("LLaVA-1.5-7B", "cuda", torch.device("meta"), torch.bfloat16)
    weights = flops.Weights.of(shape.model, shape.family, shape.size, 64)
    linears = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    adapter = 32 * 64 * (4 * 2 * 4096 + 3 * (4096 + 11008))
    assert (weights.language, weights.adapter, weights.head, weights.state) == (linears, adapter, 32064 * 4096, 0)
    form = flops.Form(tokens=1000, pairs=500_500, rows=40, pictures=0, reference_pictures=0)
    attention, head = 4 * 500_500 * 32 * 4096, 2 * 40 * 32064 * 4096
    frozen = 2 * 1000 * linears + head
    assert flops.step_flops(weights, form, reference=0) == 2 * frozen + 3 * (attention + 2 * 1000 * adapter)
    assert flops.step_flops(weights, form, reference=1) == 3 * frozen + 4 * attention + 6 * 1000 * adapter


def test_every_shape_has_every_scale() -> None:
    for name, scales in shapes.SHAPES.items():
        assert list(scales) == ["cuda", "cpu", "small"] and name in subject.FAMILIES
    order = shape_cases.in_turn(together=False)
    assert (
        len(order)
        == len({(shape, method, name) for shape, method, [name] in order})
        == 3 * sum(map(len, shape_cases.WAYS.values()))
    )
    assert [method for _, method, _ in order] == sorted((method for _, method, _ in order), key=shapes.METHODS.index)


def test_the_online_step_and_its_parts(tmp_path: Path) -> None:
    online_step.main(["--small", "--output", str(tmp_path)])
    found = result(tmp_path, "online_step_cpu")
    assert {name: len(taken) for name, taken in found["seconds"].items()} == {"sampling": 1, "dpo step": 1, "online step": 1}
    assert (tmp_path / "results_online_step.md").is_file()


def test_the_tree_through_recurrent_layers(tmp_path: Path) -> None:
    recurrent_tree.main(["--small", "--output", str(tmp_path)])
    found = result(tmp_path, "recurrent_tree_cpu")
    assert found["tokens"] == {"padded rows": 158, "tree": 88} and found["difference"]["gradients"] < 1e-4
    assert (tmp_path / "results_recurrent_tree.md").is_file()


@pytest.mark.parametrize(
    ("tree", "own", "cache", "runs"),
    [
        (False, True, False, 4),
        (True, True, False, 2),
        (False, True, True, 2),
        (True, True, True, 1),
        (False, False, False, 1),
        (True, False, True, 1),
    ],
)
def test_a_feature_that_is_off_costs_its_runs_of_the_vision_tower(tree: bool, own: bool, cache: bool, runs: int) -> None:
    """Apart, each of two sequences has its own, and the reference, where it runs beside the policy, the same again."""
    trainer = make(
        Side(kind="ours", options={"tree_packing": tree, "own_vision": own, "precompute_ref_log_probs": cache}),
        SMALL.but(records=1),
    )
    trainer.precompute_reference()
    tower, count = model_parts.base_of(trainer.model).model.vision_tower, 0
    forward = tower.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return forward(*args, **kwargs)

    tower.forward = counted
    assert loss_of(trainer, [0]) == pytest.approx(0.6931, abs=1e-4)
    assert count == runs


def test_vllm_families(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """By a program in the place of vLLM's Python: a refusal and a crash end a process and not the others, and what is found is kept."""
    monkeypatch.setattr(vllm_families, "PYTHON", ROOT / "build" / "not-there")
    with pytest.raises(SystemExit):
        vllm_families.main(["llava"])
    assert "build/not-there is not there: make test-vllm makes it" in capsys.readouterr().err
    assert vllm_families.main(["--write", str(tmp_path), "llava"]) == 0 and (tmp_path / "llava" / "config.json").is_file()
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\nimport json, sys\n"
        "for task in sys.argv[sys.argv.index('--measure') + 2 :]:\n"
        "    if task == 'llava_next/several': sys.exit(3)\n"
        "    found = {'refused': 'vLLM cannot answer them'} if task == 'llava/several' else {'prompts': 4, 'same': 4, 'perplexity': 1e-6}\n"
        "    print(json.dumps({'task': task, **found}), flush=True)\n"
        "    if 'refused' in found: sys.exit(0)\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(vllm_families, "PYTHON", program)
    names = ["llava", "llava_next", "idefics3"]
    found = vllm_families.measure(names, tmp_path, Console(quiet=True))
    assert [vllm_families.vllm_models.alike(found[name]["one picture"]) for name in names] == [True, True, True]
    assert [found[name]["several"].get("refused") for name in names] == [
        "vLLM cannot answer them",
        "vLLM's process ended with 3",
        None,
    ]
    kept = [json.loads(line)["task"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert kept == ["llava/one picture", "llava/several", "llava_next/one picture", "idefics3/one picture", "idefics3/several"]
    text = vllm_families.text_of(
        {"families": found, "versions": dict.fromkeys(("vllm", "torch", "transformers", "written_by"), "1")}
    )
    assert "| llava | 4 of 4, 1e-06 | refused |" in text and "- llava_next, several: vLLM's process ended with 3" in text


def test_attention_ratio(tmp_path: Path) -> None:
    attention_ratio.main(["--small", "--output", str(tmp_path)])
    found = result(tmp_path, "attention_ratio_cpu")
    assert set(found["seconds"]) == set(found["peak_bytes_above_model"]) == set(attention_ratio.WAYS)


def test_import_time(tmp_path: Path) -> None:
    import_time.main(["--small", "--output", str(tmp_path)])
    found = result(tmp_path, "import_time")
    assert len(found["seconds"]) == len(found["processor_seconds"]) == 1 and found["modules"] > 20
    assert (tmp_path / "results_import_time.md").is_file()


def test_layer_cost(tmp_path: Path) -> None:
    layer_cost.main(["--small", "--output", str(tmp_path)])
    found = result(tmp_path, "layer_cost_cpu")
    assert set(found["times"]) == set(layer_cost.COMPARISONS) and len(found["processor_seconds"]) == 6


def test_pictures_that_see_themselves_both_ways(tmp_path: Path) -> None:
    both_ways.main(["--small", "--output", str(tmp_path)])
    found = result(tmp_path, "both_ways_cpu")["methods"]
    assert set(found) == set(both_ways.LOSSES)
    for method in found.values():
        assert method["tokens"]["packed"] < method["tokens"]["padded"] and set(method["times_faster"]) == {"median", "min", "max"}


def test_seeds_of_mia_dpo(tmp_path: Path) -> None:
    mia_dpo_seeds.main(["--small", "--seeds", "1", "--output", str(tmp_path)])
    [summary] = result(tmp_path, "mia_dpo_seeds")["summaries"].values()
    assert set(summary["arms"]) == set(mia_dpo_seeds.ARMS) and sum(summary["pairs"].values()) > 0
    assert "| 1 | attention-selected (MIA-DPO) |" in (tmp_path / "results_mia_dpo_seeds.md").read_text()


@pytest.mark.nightly
def test_worlds_of_mia_dpo(tmp_path: Path) -> None:
    part = ["--small", "--output", str(tmp_path), "--world", "shapes_looking", "--seeds", "1"]
    mia_dpo_worlds.main([*part, "--wrong-answers", "0.3", "--layer", "1"])
    first = result(tmp_path, "mia_dpo_worlds")["cells"]
    mia_dpo_worlds.main([*part, "--wrong-answers", "0", "--layer", "1"])
    cells = result(tmp_path, "mia_dpo_worlds")["cells"]
    assert list(cells) == ["shapes_looking/0.3/1", "shapes_looking/0/1"] and first.items() <= cells.items()
    for of_cell in cells.values():
        assert set(of_cell["1"]["arms"]) == set(mia_dpo_seeds.ARMS) and of_cell["1"]["auc"]["sequence"] > 0.5
    text = (tmp_path / "results_mia_dpo_worlds.md").read_text()
    assert (
        text.count("| shapes_looking | 0.3 | 1 | ") == 2 + len(mia_dpo_seeds.ARMS)
        and "| shapes_looking | 0 | 1 | no training |" in text
    )


@pytest.mark.nightly
def test_seeds_of_a_configuration_with_arms(tmp_path: Path) -> None:
    arm_seeds.main(["shapes_rated", "--small", "--seeds", "1", "--output", str(tmp_path)])
    [summary] = result(tmp_path, "shapes_rated_seeds")["summaries"].values()
    assert set(summary["arms"]) == {"best", "steerlm", "random_pairs"} and sum(summary["pairs"].values()) > 0
    assert "| SteerLM | " in (tmp_path / "results_shapes_rated_seeds.md").read_text()


@pytest.mark.nightly
def test_seeds_of_mdpo(tmp_path: Path) -> None:
    mdpo_seeds.main(["--small", "--seeds", "0", "--output", str(tmp_path)])
    [summary] = result(tmp_path, "mdpo_seeds")["summaries"].values()
    assert set(summary["arms"]) == {"mdpo", "dpo", "dpo_no_image", "mdpo_without_copo", "mdpo_without_ancpo"}
    assert "gap of mDPO over DPO's" in (tmp_path / "results_mdpo_seeds.md").read_text()


@pytest.mark.nightly
def test_a_killed_demo(tmp_path: Path) -> None:
    """Nightly: three runs one after the other, one of them in a process of its own, which the kill needs."""
    kill_demo.main(["--small", "--output", str(tmp_path)])
    found = result(tmp_path, "kill_demo")
    assert found["same"] and [kill["stage"] for kill in found["kills"]] == ["train"]


@pytest.mark.nightly
def test_published_benchmarks(tmp_path: Path) -> None:
    """Nightly: a whole run."""
    published_benchmarks.main(["--small", "--output", str(tmp_path)])
    found = result(tmp_path, "published_benchmarks")
    assert found["same"] and found["models"]["after"]["pope"]["questions"] == 72
    assert "| BLINK, accuracy |" in (tmp_path / "evaluation_published_benchmarks.md").read_text()


@pytest.mark.nightly
def test_data_at_size(tmp_path: Path) -> None:
    """Nightly: a dozen commands, each in a process of its own."""
    data_at_size.main(["--small", "--million", "--output", str(tmp_path)])
    found = result(tmp_path, "data_at_size_cpu")
    assert found["million"]["augment"]["prompts"] == 1000 and found["million"]["select"]["pairs"] > 50
    assert all(kills["same"] and len(kills["kills_at"]) == 1 for kills in found["kills"].values())
    assert set(found["loading"]["workers"]) == {"0", "1", "2"}


def test_families(tmp_path: Path) -> None:
    assert families.main(["--small", "--output", str(tmp_path)]) == 0
    [family] = result(tmp_path, "families")["families"].values()
    assert {check["name"] for check in family["checks"]} >= {"parity", "tree", "generate"}
    assert "| family |" in (tmp_path / "families_families.md").read_text()


def test_accuracy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accuracy, "DTYPES", accuracy.DTYPES[:1])
    with pytest.raises(SystemExit) as ended:
        accuracy.main(["--small", "--device", DEVICE, "--backends", "reference", "--output", str(tmp_path)])
    assert ended.value.code == 0
    records = result(tmp_path, f"accuracy_{DEVICE}")["records"]
    assert {record["op"] for record in records} == {"tree_attention", "attention_mass", "linear_logprobs"}


@pytest.mark.nightly  # compiles FlexAttention for each setting; `benchmarks/gpu --small`, in test_benchmarks.py, begins it too
def test_choices(tmp_path: Path) -> None:
    choose_backends.main(["--small", "--device", "cpu", "--repeats", "1", "--output", str(tmp_path)])
    rows = result(tmp_path, f"choice_cpu_{cpu_kind()}")["settings"]
    assert {row["op"] for row in rows} == set(OPS)
    assert all("reference" in row["seconds"] for row in rows)


def test_tiles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep_tiles.main(["--small", "--device", DEVICE, "--output", str(tmp_path)])
    rows = result(tmp_path, "tiles")["rows"]
    assert {row["pass"] for row in rows} == set(sweep_tiles.candidates())
    assert not [row for row in rows if "reason" in row]
    with pytest.raises(SystemExit):
        sweep_tiles.main(["--device", "cpu"])
    assert "add --small" in capsys.readouterr().err


def test_ops_by_pytest_benchmark(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.kernels import test_ops

    class Benchmark:
        """What pytest-benchmark's fixture is to a test."""

        def __init__(self) -> None:
            self.group, self.extra_info, self.calls = "", dict[str, Any](), 0

        def __call__(self, call: Any) -> None:
            call()
            self.calls += 1

    setting = replace(test_ops.SETTING, device=torch.device("cpu"), dtype=torch.float32, size="small")
    monkeypatch.setattr(test_ops, "SETTING", setting)
    [case] = registry.cases(["attention_mass"], ["rows"])
    [reference] = [each for each in registry.contestants(case.op) if each.name == "reference"]
    measured = Benchmark()
    test_ops.test_op(measured, case, reference)
    assert measured.calls == 1 and measured.group == "attention_mass rows" and measured.extra_info["errors"]


def test_environment() -> None:
    assert "| tree_attention | reference | can run |" in environment.report()


# What of our packages is theirs alone.


def private_names() -> set[str]:
    """Names with one underscore in front that our packages define: functions, classes, variables, attributes."""
    found: set[str] = set()
    for path in [*(ROOT / "mmdpo_kernels").rglob("*.py"), *(ROOT / "trainers").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
    return {name for name in found if is_private(name)}


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name != "_"


def reached_into(source: str, theirs: set[str]) -> list[str]:
    """Where a benchmark imports, reads, sets or overrides one of these names. What a class of its own keeps for itself is its own."""
    tree, found = ast.parse(source), []
    foreign = {
        alias.asname or alias.name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom | ast.Import)
        for alias in node.names
        if (getattr(node, "module", None) or alias.name).split(".")[0] in ("mmdpo_kernels", "mmdpo_trainers")
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in ("mmdpo_kernels", "mmdpo_trainers"):
            found += [f"line {node.lineno}: {alias.name}" for alias in node.names if is_private(alias.name)]
        elif isinstance(node, ast.Attribute) and node.attr in theirs:
            if not (isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")):
                found.append(f"line {node.lineno}: .{node.attr}")
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "setattr", "hasattr"):
            found += [f"line {node.lineno}: {a.value}" for a in node.args if isinstance(a, ast.Constant) and a.value in theirs]
        elif isinstance(node, ast.ClassDef) and any(
            isinstance(part, ast.Name) and part.id in foreign for base in node.bases for part in ast.walk(base)
        ):
            # Of a class of ours everything private is inherited: it may be neither replaced nor used.
            for part in ast.walk(node):
                name = getattr(part, "name", None) if isinstance(part, ast.FunctionDef) else getattr(part, "attr", None)
                if isinstance(name, str) and name in theirs:
                    found.append(f"line {part.lineno}: {node.name}.{name}")  # type: ignore[attr-defined]
    return found


@pytest.mark.parametrize("path", sorted(BENCHMARKS.rglob("*.py")), ids=lambda path: path.relative_to(BENCHMARKS).as_posix())
def test_no_benchmark_reaches_into_private_parts(path: Path, theirs: set[str]) -> None:
    """What is private may change without a word, and a benchmark then measures something else."""
    assert not reached_into(path.read_text(encoding="utf-8"), theirs)


@pytest.fixture(scope="module")
def theirs() -> set[str]:
    return private_names()


@pytest.mark.parametrize(
    "source",
    [
        "from mmdpo_trainers.training.trainer import PreferenceTrainer\n"
        "class Mine(PreferenceTrainer):\n    def _features(self, batch):\n        return []\n",
        "from mmdpo_trainers.training.trainer import PreferenceTrainer\n"
        "class Mine(PreferenceTrainer):\n    def look(self):\n        return self._policy\n",
        "def look(trainer):\n    return trainer._policy\n",
        "def look(trainer):\n    return getattr(trainer, '_policy')\n",
        "from mmdpo_trainers.training.trainer import _mean\n",
    ],
)
def test_reaching_is_seen(source: str, theirs: set[str]) -> None:
    assert reached_into(source, theirs)


def test_what_is_a_benchmark_s_own_is_not_reaching(theirs: set[str]) -> None:
    assert not reached_into("class Mine:\n    def _features(self):\n        return self._policy\n", theirs)
