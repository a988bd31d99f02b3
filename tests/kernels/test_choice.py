"""What "auto" takes, and that the table says no more than its result files do."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.kernels import choose_backends
from mmdpo_kernels import tree_attention
from mmdpo_kernels.backends import cpu_kinds, measured, registry
from mmdpo_kernels.backends.choice import Rule
from mmdpo_kernels.backends.native import tree_attention as native
from mmdpo_kernels.backends.ops_table import OPS

ROOT = Path(__file__).resolve().parents[2]
RULES = [(op, device, rule) for op, row in OPS.items() for device, rules in row.rules.items() for rule in rules]
CUDA = torch.device("cuda", 0)
PLAIN = {"tree": False, "mass": False, "softcap": False, "window": False, "length": 3000, "gradient": True}


def order(monkeypatch: pytest.MonkeyPatch, op: str, dtype: torch.dtype, **features: object) -> tuple[str, ...]:
    """The order on a GPU, asked for where there may be none."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    rule = registry.rule_for(op, CUDA, dtype, features)
    assert rule is not None and rule.measured is None
    return rule.order


@pytest.mark.parametrize(("op", "device", "rule"), RULES, ids=lambda value: value if isinstance(value, str) else "")
def test_rules_name_backends_that_exist_and_end_with_one_that_serves_everything(op: str, device: str, rule: Rule) -> None:
    assert set(rule.order) <= set(OPS[op].backends)
    assert rule.order[-1] == "reference"
    # Uncompiled, it builds all scores.
    assert device != "cpu" or "flex" not in rule.order


@pytest.mark.parametrize(("op", "device"), [(op, device) for op, row in OPS.items() for device in row.rules])
def test_every_call_has_a_rule(op: str, device: str) -> None:
    rules = OPS[op].rules[device]
    for kind in {rule.cpu for rule in rules}:
        last = [rule for rule in rules if rule.cpu == kind][-1]
        assert last.fits(torch.float64, (0, 0), {}) and not last.traits


@pytest.mark.parametrize(("path", "kind"), sorted({(rule.measured, rule.cpu) for *_, rule in RULES if rule.measured}))
def test_measured_orders_are_what_was_measured(path: str, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the file a rule names, the first of its order that could serve was the fastest, or within noise of it."""
    content = json.loads((ROOT / path).read_text(encoding="utf-8"))
    settings = content["settings"]
    assert path.endswith(f"choice_cpu_{kind}.json") and content["machine"].get("cpu_kind", kind) == kind
    assert {setting["op"] for setting in settings} == {op for op, _, rule in RULES if rule.measured == path}
    monkeypatch.setattr(registry, "cpu_kind", lambda: kind)
    device = torch.device("cpu")
    for setting in settings:
        features = {name: setting[name] for name in ("length", "tree", "mass", "gradient")}
        rule = registry.rule_for(setting["op"], device, getattr(torch, setting["dtype"]), features)
        assert rule is not None and rule.measured == path
        taken = next(name for name in rule.order if name in setting["seconds"])
        # A short call is all overhead, and its time all noise.
        slack = 1.25 if setting["length"] >= 100 else 2.5
        assert setting["seconds"][taken] <= slack * min(setting["seconds"].values()), setting


def test_order_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    assert order(monkeypatch, "tree_attention", torch.bfloat16, **PLAIN)[0] == "sdpa"
    # PyTorch's flash attention has no float32 kernel on a GPU, and no tree.
    assert order(monkeypatch, "tree_attention", torch.float32, **PLAIN)[0] == "triton"
    assert order(monkeypatch, "tree_attention", torch.bfloat16, **{**PLAIN, "tree": True})[:3] == ("triton", "varlen", "flex")
    assert order(monkeypatch, "tree_attention", torch.bfloat16, **{**PLAIN, "softcap": True})[0] == "triton"
    assert order(monkeypatch, "tree_attention", torch.bfloat16, **{**PLAIN, "mass": True}) == ("triton", "reference")
    assert order(monkeypatch, "attention_mass", torch.bfloat16)[:2] == ("native", "triton")


def test_a_rule_fits_by_dtype_capability_length_and_traits() -> None:
    rule = Rule(
        calls="",
        order=("reference",),
        measured=None,
        dtypes=(torch.float16,),
        capability=(9, 0),
        lengths=(10, 20),
        traits={"tree": True, "mass": False},
    )
    assert rule.fits(torch.float16, (10, 0), {"length": 10, "tree": True})
    for dtype, capability, features in (
        (torch.float32, (9, 0), {"length": 10, "tree": True}),
        (torch.float16, (8, 9), {"length": 10, "tree": True}),
        (torch.float16, (9, 0), {"length": 21, "tree": True}),
        (torch.float16, (9, 0), {"length": 10}),
        (torch.float16, (9, 0), {"length": 10, "tree": True, "mass": True}),
    ):
        assert not rule.fits(dtype, capability, features)


def test_the_choice_is_logged_once_per_kind_of_call(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(registry, "_announced", set())
    monkeypatch.setattr(native, "load", lambda: "not built")
    monkeypatch.setattr(registry, "cpu_kind", lambda: "avx2")
    caplog.set_level(logging.INFO, logger="mmdpo_kernels")
    q = torch.randn(1, 2, 5, 8)
    for _ in range(2):
        tree_attention(q, q, q)
        tree_attention(q.double(), q.double(), q.double())
        tree_attention(q, q, q, softcap=3.0)
        tree_attention(q, q, q, backend="reference")
    common = (
        "tree_attention: backend 'auto' takes '{}' for calls of torch.{} on cpu "
        "(measured on avx2 CPUs in benchmarks/results/choice_cpu_avx2.json)"
    )
    assert [record.getMessage().partition("; ")[0] for record in caplog.records] == [
        common.format("sdpa", "float32"),
        common.format("sdpa", "float64"),
        common.format("reference", "float32"),
    ]
    assert caplog.records[0].getMessage().endswith("; passed over: native: not built")
    assert caplog.records[2].getMessage().endswith("native: not built; sdpa: PyTorch's attention has no softcap")


def test_a_kind_of_cpu_that_was_not_measured_goes_by_the_nearest(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(registry, "_announced", set())
    caplog.set_level(logging.INFO, logger="mmdpo_kernels")
    rules = tuple(
        Rule(calls=kind, order=(name, "reference"), cpu=kind, measured=kind)
        for kind, name in (("avx2", "sdpa"), ("amx", "native"))
    )
    monkeypatch.setitem(registry.OPS, "tree_attention", replace(OPS["tree_attention"], rules={"cpu": rules}))
    found = {}
    for kind in cpu_kinds.KINDS:
        monkeypatch.setattr(registry, "cpu_kind", lambda kind=kind: kind)
        registry.resolve("tree_attention", "auto", torch.device("cpu"), torch.float64)
        rule = registry.rule_for("tree_attention", torch.device("cpu"), torch.float64, {})
        found[kind] = rule and rule.cpu
    assert found == {"generic": "avx2", "avx2": "avx2", "avx512": "avx2", "avx512_bf16": "amx", "amx": "amx"}
    why = [record.getMessage().partition("(")[2].partition(")")[0] for record in caplog.records]
    assert why == [
        "not measured on this kind of CPU, generic; as measured on avx2 CPUs in avx2",
        "measured on avx2 CPUs in avx2",
        "not measured on this kind of CPU, avx512; as measured on avx2 CPUs in avx2",
        "not measured on this kind of CPU, avx512_bf16; as measured on amx CPUs in amx",
        "measured on amx CPUs in amx",
    ]


@pytest.mark.parametrize(
    ("level", "multiplies", "kind"),
    [
        ("generic", False, "generic"),
        ("avx2", False, "avx2"),
        ("avx512", False, "avx512"),
        ("avx512", True, "avx512_bf16"),
        ("amx", True, "amx"),
        ("amx_emulated", False, "generic"),
    ],
)
def test_the_kind_is_what_the_kernels_run_as(level: str, multiplies: bool, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = SimpleNamespace(cpu_level=lambda: level, multiplies_bfloat16=lambda: multiplies)
    monkeypatch.setattr(cpu_kinds, "compiled_module", lambda: module)
    assert cpu_kinds.cpu_kind() == kind


def test_without_the_compiled_module_the_kind_is_what_pytorch_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_kinds, "compiled_module", lambda: None)
    for said, kind in (("AVX512", "avx512"), ("AVX2", "avx2"), ("DEFAULT", "generic")):
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda said=said: said)
        assert cpu_kinds.cpu_kind() == kind


def test_a_wrong_level_is_the_backend_s_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MMDPO_CPU_LEVEL", "sse9")
    assert cpu_kinds.cpu_kind() in cpu_kinds.KINDS
    rule = registry.rule_for("attention_mass", torch.device("cpu"), torch.float32, {})
    assert rule is not None and rule.order[0] == "native"


def test_without_a_rule_the_preference_decides(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(registry, "_announced", set())
    caplog.set_level(logging.INFO, logger="mmdpo_kernels")
    monkeypatch.setattr(registry, "rule_for", lambda *call: None)
    module = registry.resolve("linear_logprobs", "auto", torch.device("cpu"), torch.float64)
    assert module.__name__.endswith("chunked.linear_logprobs")
    assert "not measured on this device" in caplog.text


def test_a_call_that_no_backend_serves_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    rule = Rule(calls="calls", order=("varlen",), measured=None)
    monkeypatch.setattr(registry, "rule_for", lambda *call: rule)
    with pytest.raises(ValueError, match="no backend can serve torch.float32 on cpu: varlen: .* runs on cuda tensors, got cpu"):
        registry.resolve("tree_attention", "auto", torch.device("cpu"), torch.float32)


def test_the_op_reports_what_the_choice_depends_on(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, object]] = []
    rule = Rule(calls="calls", order=("reference",), measured=None)
    monkeypatch.setattr(registry, "rule_for", lambda op, device, dtype, features: seen.append(dict(features)) or rule)
    q = torch.randn(1, 2, 5, 8, requires_grad=True)
    tree_end = torch.full((1, 5), 5, dtype=torch.int32)
    tree_attention(q, q, q, tree_end, segments=tree_end * 0, num_segments=1)
    with torch.no_grad():
        tree_attention(q, q, q, window=2)
    first, second = seen
    assert (first["length"], first["tree"], first["mass"], first["gradient"], first["window"]) == (5, True, True, True, False)
    assert (second["tree"], second["mass"], second["gradient"], second["window"]) == (False, False, False, True)


def setting(seconds: dict[str, float], length: int = 3000, op: str = "tree_attention", **traits: object) -> dict[str, object]:
    """As `choose_backends` writes it."""
    kind = {"tree": True, "mass": False, "gradient": True, "dtype": "bfloat16"}
    return {"op": op, "length": length, **kind, **traits, "seconds": seconds, "cannot": {}}


@pytest.fixture
def gpu_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `make gpu` leaves, in the folder that the variable names; the GPU at hand is the one it was measured on."""
    settings = [
        setting({"triton": 3.0, "flex": 1.0, "reference": 9.0}),
        setting({"triton": 1.0, "flex": 2.0, "reference": 9.0}, length=200),
        setting({"varlen": 1.0}, tree=False),
        setting({}, dtype="float16"),
        setting({"triton": 1.0, "native": 2.0}, op="attention_mass", gradient=False),
    ]
    content = {"machine": {"gpu": "NVIDIA H100"}, "settings": settings}
    (tmp_path / "choice_nvidia_h100.json").write_text(json.dumps(content))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    monkeypatch.setenv(measured.VARIABLE, str(tmp_path))
    return tmp_path


def test_what_was_measured_on_this_gpu_comes_before_the_table(gpu_folder: Path) -> None:
    def rule(
        op: str = "tree_attention", dtype: torch.dtype = torch.bfloat16, device: torch.device = CUDA, **features: object
    ) -> Rule:
        found = registry.rule_for(op, device, dtype, {**PLAIN, "tree": True, **features})
        assert found is not None
        return found

    whole = rule()
    # What was not timed comes last, in the table's order.
    assert whole.order == ("flex", "triton", "reference", "varlen", "sdpa")
    assert whole.measured == str(gpu_folder / "choice_nvidia_h100.json")
    assert whole.calls == "calls of some 3,000 tokens, tree, no mass, gradient"
    assert rule(length=500).order[0] == "triton"  # nearer to 200 than to 3,000, by ratio
    assert rule(tree=False).order[0] == "varlen"
    assert rule("attention_mass").measured is None  # with a gradient it was not timed
    by_rows = registry.rule_for("attention_mass", CUDA, torch.bfloat16, {"head_dim": 128, "length": 900, "reach": False})
    assert by_rows is not None and by_rows.order == ("triton", "native", "reference")


@pytest.mark.parametrize(
    "features",
    [{"dtype": torch.float32}, {"dtype": torch.float16}, {"softcap": True}, {"reach": True}, {"mass": True}, {"gradient": False}],
    ids=str,
)
def test_calls_that_were_not_measured_keep_the_table_s_rule(gpu_folder: Path, features: dict[str, object]) -> None:
    given = {**PLAIN, "tree": True, **features}
    dtype = given.pop("dtype", torch.bfloat16)
    assert isinstance(dtype, torch.dtype)
    rule = registry.rule_for("tree_attention", CUDA, dtype, given)
    assert rule is not None and rule.measured is None and rule.order[0] == "triton"


def test_the_variable_says_nothing_of_the_cpu(gpu_folder: Path) -> None:
    rule = registry.rule_for("tree_attention", torch.device("cpu"), torch.bfloat16, {**PLAIN, "tree": True})
    assert rule in OPS["tree_attention"].rules["cpu"]


def test_files_of_another_gpu_or_none_are_refused(gpu_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(folder: Path, match: str) -> None:
        monkeypatch.setenv(measured.VARIABLE, str(folder))
        with pytest.raises(ValueError, match=match):
            registry.rule_for("tree_attention", CUDA, torch.bfloat16, PLAIN)

    refused(tmp_path / "nowhere", r"MMDPO_MEASURED=.*nowhere: expected tiles.json or choice_nvidia_h100.json, .* found neither")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    refused(gpu_folder, r"on this NVIDIA A100, found only choice_nvidia_h100.json; unset it, or run `make gpu` here")
    broken, other = tmp_path / "broken", tmp_path / "other"
    for folder, text in ((broken, "{}"), (other, '{"machine": {"gpu": "NVIDIA H100"}, "rows": []}')):
        folder.mkdir()
        (folder / "tiles.json").write_text(text)
    refused(broken, r"tiles.json: expected what `make gpu` writes \(KeyError: 'machine'\)")
    refused(other, r"tiles.json was measured on NVIDIA H100, this is NVIDIA A100")


def test_a_backend_that_fails_is_timed_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*call: object) -> None:
        raise RuntimeError("out of resources")

    monkeypatch.setattr(native, "forward", failing)
    setting = choose_backends.Setting(op="tree_attention", dtype=torch.float32, length=6, response=2, gradient=False)
    found = choose_backends.compare(setting, "cpu", 1)
    assert found["cannot"]["native"] == "failed: RuntimeError: out of resources"
    assert found["auto"] == "native" and found["auto_over_fastest"] is None and "reference" in found["seconds"]
