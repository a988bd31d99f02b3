"""What the attention kernels are held to, read from a result of the harness."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.kernels.case import WITH_STATISTICS, WITHOUT_MASS
from benchmarks.measure import ratios

Entry = dict[str, Any]
# Attention that knows nothing of trees, whoever wrote it.
PLAIN_ATTENTION = ("SDPA", "torch varlen", "FlashAttention")


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A figure beside its goal."""

    figure: str
    met: bool


@dataclass(frozen=True, kw_only=True)
class Goal:
    """One line of the table of goals."""

    device: str
    what: str
    wanted: str
    find: Callable[[Result], Finding]
    """Raises `Missing`."""


class Missing(Exception):  # noqa: N818 - an answer, not an error
    """The result does not hold what the goal is about; the message says what."""


class Result:
    """A result file of the harness."""

    def __init__(self, content: dict[str, Any]) -> None:
        self.content = content

    def entry(self, op: str, case: str) -> Entry:
        for entry in self.content["cases"]:
            if (entry["op"], entry["case"]) == (op, case):
                return entry  # type: ignore[no-any-return]
        raise Missing(f"{op} {case} was not measured")


def seconds(entry: Entry, name: str) -> float:
    """Median seconds of a contestant."""
    found = entry["contestants"].get(name, {})
    if "median" not in found:
        why = next((found[kind] for kind in ("reason", "wrong", "failed") if kind in found), "not measured")
        raise Missing(f"{name}: {why}")
    return float(found["median"])


def fastest(entry: Entry, wanted: Callable[[str, Entry], bool], what: str) -> str:
    """The name of the fastest contestant of a kind."""
    medians = {name: found["median"] for name, found in entry["contestants"].items() if "median" in found and wanted(name, found)}
    if not medians:
        raise Missing(f"{what} was measured nowhere in {entry['op']} {entry['case']}")
    return min(medians, key=medians.__getitem__)


def speed_up(entry: Entry, slow: str, fast: str) -> dict[str, float]:
    """How many times faster, turn by turn; a contestant that left early is compared in the turns it took."""
    times = {name: entry["contestants"][name]["seconds"] for name in (slow, fast) if seconds(entry, name)}
    turns = min(map(len, times.values()))
    return ratios({name: taken[:turns] for name, taken in times.items()}, slow, fast)


def plain(name: str, found: Entry) -> bool:
    """Attention of others that knows nothing of trees."""
    return name.startswith(PLAIN_ATTENTION)


def _faster(entry: Entry, slow: str, fast: str, goal: float) -> Finding:
    found = speed_up(entry, slow, fast)
    figure = f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f}), {fast} against {slow}"
    return Finding(figure=figure, met=found["median"] >= goal)


def _mass_on_cpu(result: Result) -> Finding:
    return _faster(result.entry("attention_mass", "rows"), "torch, dense", "native", 2.0)


def _mass_memory_on_cpu(result: Result) -> Finding:
    entry = result.entry("attention_mass", "rows")
    peaks = [entry["contestants"].get(name, {}).get("peak_bytes") for name in ("native", "torch, dense")]
    if None in peaks:
        raise Missing("peak memory was not measured")
    share = peaks[0] / peaks[1]
    return Finding(figure=f"{share:.3f} ({peaks[0] / 1e6:.2f} of {peaks[1] / 1e6:.2f} MB)", met=share <= 0.1)


def _pair_on_cpu(result: Result) -> Finding:
    entry = result.entry("tree_attention", "pair")
    return _faster(entry, fastest(entry, plain, "plain attention"), "sdpa", 1.6)


def _mass_in_the_pass(result: Result) -> Finding:
    entry = result.entry("tree_attention", "causal_8k_mass")
    share = speed_up(entry, "triton", f"triton{WITHOUT_MASS}")["median"]
    return Finding(figure=f"{100 * (share - 1):+.1f} %", met=share <= 1.05)


def _mass_seconds(case: str) -> Callable[[Result], Finding]:
    def find(result: Result) -> Finding:
        entry = result.entry("attention_mass", case)
        name = fastest(entry, _ours, "a backend of ours")
        found = seconds(entry, name)
        return Finding(figure=f"{found * 1e6:.1f} µs, {name}", met=found <= 25e-6)

    return find


def _mass_share(result: Result) -> Finding:
    layers = result.entry("tree_attention", "recorded")
    layer = seconds(layers, fastest(layers, plain, "plain attention")) / layers["sizes"]["layers"]
    entry = result.entry("attention_mass", "rows_lse")
    share = seconds(entry, fastest(entry, _ours, "a backend of ours")) / layer
    return Finding(figure=f"{100 * share:.1f} % of {layer * 1e6:.0f} µs", met=share <= 0.08)


def _rate(case: str, goal: float) -> Callable[[Result], Finding]:
    def find(result: Result) -> Finding:
        entry = result.entry("tree_attention", case)
        rate = entry["flops"] / seconds(entry, "triton") / 1e12
        return Finding(figure=f"{rate:.0f} TFLOP/s", met=rate >= goal)

    return find


def _pair_on_gpu(result: Result) -> Finding:
    entry = result.entry("tree_attention", "pair")
    return _faster(entry, fastest(entry, plain, "plain attention"), fastest(entry, _ours, "a backend of ours"), 1.7)


def _recorded(result: Result) -> Finding:
    entry = result.entry("tree_attention", "recorded")
    baseline = fastest(entry, lambda name, found: "mass" in found["omits"], "attention without ratios")
    share = speed_up(entry, "auto", baseline)["median"]
    return Finding(figure=f"{share:.3f} times {baseline}", met=share <= 1.01)


def _eager(result: Result) -> Finding:
    return _faster(result.entry("tree_attention", "recorded"), "eager maps", "auto", 20.0)


TRL = f"TRL head{WITH_STATISTICS}"
BARE = "two bare products"


def _over_trl(case: str, goal: float) -> Callable[[Result], Finding]:
    return lambda result: _faster(result.entry("linear_logprobs", case), TRL, "auto", goal)


def _over_trl_in_bfloat16(case: str) -> Callable[[Result], Finding]:
    """Where the CPU has no instructions for products of bfloat16 TRL's are emulated, and more can be gained."""

    def find(result: Result) -> Finding:
        emulated = BARE not in result.entry("linear_logprobs", case)["contestants"]
        return _over_trl(case, 5.0 if emulated else 3.0)(result)

    return find


def _in_bfloat16(op: str, case: str) -> Callable[[Result], Finding]:
    """A case in bfloat16 against the same case in float32."""

    def find(result: Result) -> Finding:
        half, full = (seconds(result.entry(op, name), "auto") for name in (f"{case}_bf16", case))
        return Finding(figure=f"{full / half:.2f} ({1e3 * half:.3g} and {1e3 * full:.3g} ms)", met=full / half >= 1.5)

    return find


def _over_products(case: str, goal: float) -> Callable[[Result], Finding]:
    def find(result: Result) -> Finding:
        entry = result.entry("linear_logprobs", case)
        bare = fastest(entry, lambda name, found: name.startswith(BARE), "bare products")
        found = speed_up(entry, "auto", bare)
        figure = f"{found['median']:.2f} ({found['min']:.2f} to {found['max']:.2f}) times {bare}"
        return Finding(figure=figure, met=found["median"] <= goal)

    return find


def _head_memory(case: str) -> Callable[[Result], Finding]:
    def find(result: Result) -> Finding:
        contestants = result.entry("linear_logprobs", case)["contestants"]
        peaks = [contestants.get(name, {}).get("peak_bytes") for name in ("auto", TRL)]
        if None in peaks:
            raise Missing("peak memory was not measured")
        return Finding(figure=f"{peaks[0] / 1e6:.0f} of {peaks[1] / 1e6:.0f} MB", met=peaks[0] <= peaks[1])

    return find


def _two_passes(result: Result) -> Finding:
    entry = result.entry("linear_logprobs", "with_reference")
    sizes, rate = entry["sizes"], result.content["ceilings"]["bytes_per_second"]
    passes = 2 * 2 * sizes["vocabulary"] * sizes["width"] / rate
    share = seconds(entry, "auto") / passes
    return Finding(figure=f"{share:.2f} times {passes * 1e3:.2f} ms", met=share <= 1.3)


def _of_copy(case: str) -> Callable[[Result], Finding]:
    def find(result: Result) -> Finding:
        entry = result.entry("logit_rows", case)
        share = 100 * entry["floor_seconds"] / seconds(entry, "native")
        return Finding(figure=f"{share:.0f} %", met=share >= 85)

    return find


def _head_rate(result: Result) -> Finding:
    entry = result.entry("linear_logprobs", "frozen_8192")
    rate = entry["flops"] / seconds(entry, "auto") / 1e12
    return Finding(figure=f"{rate:.0f} TFLOP/s", met=rate >= 650)


def _loss_goals(device: str) -> Sequence[Goal]:
    """Of `preference_loss` alone and behind the head."""
    of = partial(Goal, device=device)
    eager, liger = "torch, dense", "Liger fused DPO"

    def over(peer: str, case: str, goal: float) -> Callable[[Result], Finding]:
        return lambda result: _faster(result.entry("preference_loss", case), peer, "auto", goal)

    return [
        of(
            what="a pair with five pictures as the model leaves it, hidden states to loss, against Liger's DPO: times faster",
            wanted="at least 3",
            find=over(liger, "from_model", 3.0),
        ),
        of(
            what="`preference_loss`, mDPO of 64 triples from tokens, with what is logged, against the eager expression: times faster",
            wanted="at least 5",
            find=over(eager, "mdpo", 5.0),
        ),
        of(
            what="the same from sums of responses, the loss alone: times faster",
            wanted="at least 5",
            find=over(eager, "mdpo_sums", 5.0),
        ),
    ]


def _head_goals_on_gpu() -> Sequence[Goal]:
    of = partial(Goal, device="cuda")
    frozen = "frozen head, {:,} rows, forward + backward: times faster than TRL's as its trainer calls it"
    return [
        *(of(what=frozen.format(rows), wanted="at least 1.4", find=_over_trl(f"frozen_{rows}", 1.4)) for rows in (1000, 8192)),
        of(what="frozen head, 8,192 rows, forward + backward", wanted="at least 650 TFLOP/s", find=_head_rate),
        of(
            what="native row kernel with gradient, 1,024 rows: share of copy bandwidth",
            wanted="at least 85 %",
            find=_of_copy("rows_1024"),
        ),
        of(
            what="200 rows of the policy and 200 of the reference: time over two passes over the weight",
            wanted="at most 1.3",
            find=_two_passes,
        ),
    ]


def _head_goals() -> Sequence[Goal]:
    """Of a frozen head on the CPU, forward and backward."""
    goals = []
    for suffix, dtype, over_products in (("", "float32", 1.15), ("_bf16", "bfloat16", 1.6)):
        for vocabulary in (32, 152):
            for rows in (200, 1000):
                case = f"frozen_{vocabulary}k_{rows}{suffix}"
                what = f"frozen head, {rows:,} rows, {vocabulary}k tokens, {dtype}"
                of = partial(Goal, device="cpu")
                goals += [
                    of(
                        what=f"{what}: times faster than TRL's as its trainer calls it",
                        wanted="at least 3; 5 where a CPU emulates bfloat16" if suffix else "at least 2.3",
                        find=_over_trl_in_bfloat16(case) if suffix else _over_trl(case, 2.3),
                    ),
                    of(
                        what=f"{what}: time over that of its two bare products",
                        wanted=f"at most {over_products:g}",
                        find=_over_products(case, over_products),
                    ),
                    of(what=f"{what}: peak memory, ours and TRL's", wanted="no more", find=_head_memory(case)),
                ]
    return goals


def _ours(name: str, found: Entry) -> bool:
    return bool(found["ours"]) and not name.endswith(WITHOUT_MASS)


GOALS: Sequence[Goal] = (
    Goal(
        device="cpu",
        what="`attention_mass`, 60 rows x 3,000 keys x 32 heads (8 of keys), native against torch: times faster",
        wanted="at least 2",
        find=_mass_on_cpu,
    ),
    Goal(device="cpu", what="the same: share of peak memory", wanted="at most 0.1", find=_mass_memory_on_cpu),
    Goal(
        device="cpu",
        what="`tree_attention` sdpa, pair tree P=1,500, R=60, against causal SDPA on both sequences, forward + backward: times faster",
        wanted="at least 1.6",
        find=_pair_on_cpu,
    ),
    *(
        Goal(
            device="cpu",
            what=f"`{op}` {case} in bfloat16, on a CPU that multiplies it, against float32: times faster",
            wanted="at least 1.5",
            find=_in_bfloat16(op, case),
        )
        for op, case in (("attention_mass", "rows"), ("tree_attention", "pair"))
    ),
    Goal(device="cuda", what="mass in the same pass, causal 8k: cost", wanted="at most 5 %", find=_mass_in_the_pass),
    Goal(
        device="cuda",
        what="`attention_mass`, 100 rows x 3,100 keys x 32 heads (8 of keys), log-sum-exp given",
        wanted="at most 25 µs",
        find=_mass_seconds("rows_lse"),
    ),
    Goal(device="cuda", what="the same, log-sum-exp computed", wanted="at most 25 µs", find=_mass_seconds("rows")),
    Goal(device="cuda", what="the first, as a share of that layer's fastest attention", wanted="at most 8 %", find=_mass_share),
    Goal(
        device="cuda",
        what="triton forward, causal 8k, head dim 128",
        wanted="at least 450 TFLOP/s",
        find=_rate("causal_8k", 450),
    ),
    Goal(
        device="cuda",
        what="triton backward, causal 8k, head dim 128",
        wanted="at least 350 TFLOP/s",
        find=_rate("causal_8k_backward", 350),
    ),
    Goal(
        device="cuda",
        what="pair tree P=3,000, R=100, forward + backward, against the fastest attention on both sequences: times faster",
        wanted="at least 1.7",
        find=_pair_on_gpu,
    ),
    Goal(
        device="cuda",
        what='`"auto"` with ratios recorded at one of 32 layers, against the fastest attention without',
        wanted="at most 1.01",
        find=_recorded,
    ),
    Goal(
        device="cuda",
        what="the same against eager attention with `output_attentions`: times faster",
        wanted="at least 20",
        find=_eager,
    ),
    *_head_goals(),
    *_loss_goals("cpu"),
    *_head_goals_on_gpu(),
    *_loss_goals("cuda"),
)
