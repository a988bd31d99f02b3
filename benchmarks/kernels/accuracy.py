"""How accurate every backend is that runs here, beside plain PyTorch in the same dtype.

    python -m benchmarks.kernels.accuracy                # table, results/accuracy_<device>.json and its section of docs/kernels.md
    python -m benchmarks.kernels.accuracy --small        # the sizes of interpreted kernels for all, into build/benchmarks

The accuracy rule: against float64 truth, the error is at most twice that of plain PyTorch in the same dtype, plus one rounding step of the
tensor's largest entry. Here it is applied to the largest error in a tensor, since PyTorch hits single entries exactly by luck; the share of
entries beyond it one by one is counted beside. A margin is the error over what the rule allows: 1 or below keeps the rule.
The command fails where a backend breaks it.

Plain PyTorch is matmul, softmax in float32, matmul, and its own autograd. The cases of `linear_logprobs` are in `accuracy_head.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.kernels import accuracy_head as head
from benchmarks.measure import RESULTS, add_place, machine, markdown, place_of

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported

from mmdpo_kernels import attention_mass, tree_attention  # noqa: E402
from mmdpo_kernels.backends.ops_table import OPS  # noqa: E402
from mmdpo_kernels.backends.registry import load  # noqa: E402
from mmdpo_kernels.tree_mask import visible  # noqa: E402

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Named = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One call and what of it flows back; each size for real, and for kernels that an interpreter runs."""

    op: str
    name: str
    heads: tuple[int, int]
    """Of queries, of keys and values."""
    dim: int
    tree: Callable[[int], list[int]]
    """Length of the prompt -> `tree_end`."""
    prompt: tuple[int, int]
    """In full, and small."""
    options: Mapping[str, Any]
    rows: int = 0
    """Counted rows of `attention_mass`, the last ones."""
    segments: int = 3


def pair(prompt: int) -> list[int]:
    """A prompt and two answers, of an eighth of its length and a little less."""
    chosen, rejected = prompt // 8, prompt // 8 - 2
    whole = prompt + chosen + rejected
    return [whole] * prompt + [prompt + chosen] * chosen + [whole] * rejected


def two_examples(prompt: int) -> list[int]:
    """A pair, padding, and another pair."""
    one = pair(prompt)
    start = len(one) + 5
    return [*one, *range(len(one), start), *(end + start for end in pair(prompt // 2))]


CAPPED = {"softcap": 50.0, "window": 96}
CASES = (
    Case(op="tree_attention", name="pair", heads=(8, 2), dim=128, tree=pair, prompt=(512, 48), options={}),
    Case(op="tree_attention", name="packed and padded", heads=(4, 4), dim=80, tree=two_examples, prompt=(200, 24), options={}),
    Case(op="tree_attention", name="softcap and window", heads=(4, 1), dim=64, tree=pair, prompt=(320, 40), options=CAPPED),
    Case(op="attention_mass", name="answer rows", heads=(8, 2), dim=128, tree=pair, prompt=(2400, 64), options={}, rows=60),
    Case(
        op="attention_mass", name="packed and padded", heads=(4, 4), dim=80, tree=two_examples, prompt=(300, 32), options={},
        rows=40, segments=20,
    ),
    Case(op="attention_mass", name="softcap and window", heads=(4, 1), dim=64, tree=pair, prompt=(640, 64), options=CAPPED, rows=40),
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Problem:
    """The inputs of a case in one dtype; leaves in the op's order."""

    case: Case
    leaves: Named
    tree_end: Tensor
    segments: Tensor
    row_positions: Tensor


def problem(case: Case, *, small: bool, dtype: torch.dtype, device: str) -> Problem:
    """The same numbers every time; two batch rows, in memory as models have them (B, S, H, D)."""
    generator = torch.Generator().manual_seed(0)
    ends = case.tree(case.prompt[small])
    length, (heads, kv_heads) = len(ends), case.heads
    rows = min(case.rows, length // 4)

    def leaf(length: int, heads: int) -> Tensor:
        return torch.randn(2, length, heads, case.dim, generator=generator).transpose(1, 2).to(device, dtype)

    leaves = (
        {"query_rows": leaf(rows, heads), "key": leaf(length, kv_heads)}
        if case.rows
        else {"query": leaf(length, heads), "key": leaf(length, kv_heads), "value": leaf(length, kv_heads)}
    )
    segments = torch.randint(-1, case.segments, (2, length), generator=generator)
    positions = torch.arange(length - rows, length).expand(2, -1)
    tree_end = torch.tensor([ends], dtype=torch.int32).expand(2, -1)
    return Problem(
        case=case, leaves=leaves, tree_end=tree_end.to(device), segments=segments.to(device), row_positions=positions.to(device)
    )


def plain(given: Problem, leaves: Named) -> Named:
    """The outputs by dense PyTorch in the dtype of `leaves`."""
    case, query = given.case, next(iter(leaves.values()))
    groups = case.heads[0] // case.heads[1]
    scores = query @ leaves["key"].repeat_interleave(groups, 1).mT * case.dim**-0.5
    softcap = case.options.get("softcap")
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    seen = visible(given.tree_end, case.options.get("window"))
    if case.rows:
        seen = seen.gather(1, given.row_positions[:, :, None].expand(-1, -1, seen.shape[2]))
    some = seen.any(-1)[:, None]
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    scores = torch.where(some[..., None], scores.masked_fill(~seen[:, None], float("-inf")), 0.0)
    probabilities = scores.softmax(-1) * some[..., None]
    one_hot = given.segments[:, None, :, None] == torch.arange(case.segments, device=query.device)
    mass = probabilities @ one_hot.to(probabilities.dtype)
    if case.rows:
        return {"mass": mass}
    output = probabilities.to(query.dtype) @ leaves["value"].repeat_interleave(groups, 1)
    # What no row sees is left out of the comparison and of the gradient.
    return {"output": output, "lse": torch.where(some, scores.logsumexp(-1), 0.0), "mass": mass}


def ours(given: Problem, leaves: Named, backend: str, *, with_mass: bool) -> Named:
    """The outputs of a backend."""
    case = given.case
    if case.rows:
        found = attention_mass(
            **leaves, segments=given.segments, row_positions=given.row_positions, num_segments=case.segments,
            tree_end=given.tree_end, **case.options, backend=backend,
        )  # fmt: skip
        return {"mass": found}
    segments = {"segments": given.segments, "num_segments": case.segments} if with_mass else {}
    out = tree_attention(**leaves, tree_end=given.tree_end, **segments, **case.options, backend=backend)
    found = {"output": out.output, "lse": out.lse.masked_fill(out.lse == float("-inf"), 0.0)}
    return {**found, "mass": out.mass} if with_mass else found


def evaluated(leaves: Named, outputs_of: Callable[[Named], Named], through: tuple[str, ...]) -> Named:
    """Outputs, and the gradients of all leaves through the named outputs; none named, outputs alone."""
    if not through:
        return outputs_of(leaves)
    leaves = {name: t.detach().requires_grad_() for name, t in leaves.items()}
    outputs = outputs_of(leaves)
    ups = []
    for name in through:
        generator = torch.Generator().manual_seed(len(name))
        ups.append(torch.randn(outputs[name].shape, generator=generator).to(outputs[name].device, outputs[name].dtype))
    grads = torch.autograd.grad([outputs[name] for name in through], list(leaves.values()), ups)
    named = {f"gradient of {name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {**{name: t.detach() for name, t in outputs.items()}, **named}


def measure(
    case: Case | head.Case, backend: str, dtype: torch.dtype, device: str, *, small: bool = False
) -> list[dict[str, Any]]:
    """One record a tensor of the case, or one that says why the backend does not serve it, or how it failed.

    small: of an attention case the size of interpreted kernels, which those have anyway.
    """
    interpreted = backend in ("triton", "flex") and device == "cpu"
    if isinstance(case, head.Case):
        return _measure_head(case, backend, dtype, device, small=interpreted)
    small = small or interpreted
    given = problem(case, small=small, dtype=dtype, device=device)
    about = {"op": case.op, "case": case.name, "backend": backend, "dtype": str(dtype).removeprefix("torch."), "small": small}
    refusal = ""
    for through in _ways(case):
        try:
            mine = evaluated(given.leaves, lambda leaves, t=through: ours(given, leaves, backend, with_mass="mass" in t), through)
        except Exception as error:  # noqa: BLE001 - the other backends are still worth measuring
            if "cannot serve this call" not in str(error):
                return [{**about, "failure": f"{type(error).__name__}: {error}".splitlines()[0][:300]}]
            refusal = str(error)
            continue
        truth = evaluated({name: t.double() for name, t in given.leaves.items()}, lambda leaves: plain(given, leaves), through)
        usual = evaluated(given.leaves, lambda leaves: plain(given, leaves), through)
        return [
            {**about, "tensor": name, "through": list(through), **_compared(t, usual[name], truth[name])}
            for name, t in mine.items()
        ]
    return [{**about, "refusal": refusal.split(": ", 2)[-1]}]


def _measure_head(case: head.Case, backend: str, dtype: torch.dtype, device: str, *, small: bool) -> list[dict[str, Any]]:
    about = {
        "op": case.op,
        "case": case.name,
        "backend": backend,
        "dtype": str(dtype).removeprefix("torch."),
        "small": small,
        "through": ["logps"],
    }
    try:
        compared = head.compare(case, backend, dtype, device, small=small)
        return [{**about, "tensor": name, **_compared(mine, usual, truth, size)} for name, mine, usual, truth, size in compared]
    except Exception as error:  # noqa: BLE001 - the other backends are still worth measuring
        if "cannot serve this call" in str(error):
            return [{**about, "refusal": str(error).split(": ", 2)[-1]}]
        return [{**about, "failure": f"{type(error).__name__}: {error}".splitlines()[0][:300]}]


def _ways(case: Case) -> tuple[tuple[str, ...], ...]:
    """Outputs whose gradients to ask for: all, and as many as a backend has."""
    return (("mass",),) if case.rows else (("output", "lse", "mass"), ("output", "lse"), ())


def _compared(mine: Tensor, usual: Tensor, truth: Tensor, size: Tensor | None = None) -> dict[str, float]:
    step = torch.finfo(usual.dtype).eps * (truth.abs().max() if size is None else size)
    error, theirs = (truth - mine.double()).abs(), (truth - usual.double()).abs()
    allowed = (2 * theirs.max() + step).item()
    return {
        "error": error.max().item(),
        "torch_error": theirs.max().item(),
        "margin": error.max().item() / allowed if allowed else float(error.max() > 0),
        "entries_beyond": (error > 2 * theirs + step).double().mean().item(),
    }


def here(op: str, device: str) -> list[str]:
    """Backends of an op that serve some dtype here."""
    return [
        name for name in OPS[op].backends if any(load(op, name).unavailable_reason(device, dtype) is None for dtype in DTYPES)
    ]


COLUMNS = ["op", "tensor", "dtype", "PyTorch"]


def table(records: list[dict[str, Any]], backends: list[str]) -> tuple[list[str], list[list[str]]]:
    """A row a tensor and dtype, a column a backend: its largest error over the cases, and its largest margin."""
    measured = [record for record in records if "error" in record]
    rows = []
    for op, tensor, dtype in dict.fromkeys((record["op"], record["tensor"], record["dtype"]) for record in measured):
        same = [r for r in measured if (r["op"], r["tensor"], r["dtype"]) == (op, tensor, dtype)]
        cells = []
        for backend in backends:
            of_backend = [record for record in same if record["backend"] == backend]
            worst = max((record["margin"] for record in of_backend), default=0.0)
            largest = max((record["error"] for record in of_backend), default=0.0)
            mark = " **broken**" if worst > 1 else ""
            cells.append(f"{largest:.1e} ({worst:.2f}){mark}" if of_backend else "")
        rows.append([op, tensor, dtype, f"{max(record['torch_error'] for record in same):.1e}", *cells])
    return [*COLUMNS, *backends], rows


def section(result: Mapping[str, Any]) -> str:
    """The table of one device, and what it holds."""
    records = result["records"]
    backends = list(dict.fromkeys(record["backend"] for record in records))
    on, count = result["machine"], sum("error" in record for record in records)
    beyond = max((record["entries_beyond"] for record in records if "error" in record), default=0.0)
    small = sorted({record["backend"] for record in records if record["small"]})
    notes = [
        f"Largest error against float64 over the cases of `benchmarks/kernels/accuracy.py`, "
        "and in brackets the error over what the rule allows, "
        f"2 x PyTorch's + one rounding step: 1 or below keeps it. {count} comparisons; single entries beyond the rule taken entry by entry: "
        f"at most {100 * beyond:.2f} % of a tensor.",
        f"{on['gpu'] or on['cpu']}, torch {on['packages']['torch']}."
        + (f" Small shapes only: {', '.join(small)}." if small else ""),
    ]
    return f"{markdown(*table(records, backends))}\n\n" + "\n".join(notes)


def page() -> str:
    """The section of every device whose figures are committed."""
    found = {device: RESULTS / f"accuracy_{device}.json" for device in ("cpu", "cuda")}
    parts = [section(json.loads(path.read_text(encoding="utf-8"))) for path in found.values() if path.exists()]
    return "\n\n".join(parts)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--backends", nargs="*", help="only these; written to build/benchmarks")
    add_place(parser)
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing new after these")
    arguments = parser.parse_args(argv)
    place = place_of(arguments, part=bool(arguments.backends))
    end = time.monotonic() + arguments.seconds
    chosen: list[tuple[Case | head.Case, str]] = [
        (case, name)
        for case in (*CASES, *(head.SMALL_CASES if arguments.small else head.CASES))
        for name in here(case.op, arguments.device)
        if name in (arguments.backends or [name])
    ]
    # Last what is compiled for seconds at every kind of call: where time is short, nothing else is lost.
    chosen.sort(key=lambda pair: pair[1] == "flex")
    records: list[dict[str, Any]] = []
    result = {"machine": machine(), "records": records}
    for case, backend in chosen:
        for dtype in DTYPES:
            if time.monotonic() < end and load(case.op, backend).unavailable_reason(arguments.device, dtype) is None:
                records += measure(case, backend, dtype, arguments.device, small=arguments.small)
        print(f"{case.op}, {case.name}: {backend}", file=sys.stderr, flush=True)
        # Backend by backend, so that a kill loses no more than one.
        path = place.result(f"accuracy_{arguments.device}", result)
    print(section(result))
    print(f"written: {path}")
    place.section("docs/kernels.md", "accuracy", page() if place.committed else section(result))
    broken = [record for record in records if record.get("margin", 0.0) > 1]
    for record in broken:
        print("broken: {op} {backend} {dtype} {tensor} in '{case}', margin {margin:.2f}".format(**record), file=sys.stderr)
    failed = [record for record in records if "failure" in record]
    for record in failed:
        print("failed: {op} {backend} {dtype} in '{case}': {failure}".format(**record), file=sys.stderr)
    raise SystemExit(1 if broken or failed else 0)


if __name__ == "__main__":
    main()
