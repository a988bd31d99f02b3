"""The losses of `preference_loss`, each a row of LOSSES: what it is made of, as a function of the options.

A loss is a list of terms, each `weight * link(scale * sum_j coefficient_j value_j + offset)` of a record; links and values are those of
`mmdpo_kernels.loss_terms`. A new loss is a function here and its name in LOSSES: every backend evaluates terms, and what a
loss needs is read off its terms.

In the equations w, l and c are `log p - log p_ref` of the chosen response, of the rejected one, and of the chosen one under the
corrupted picture, summed over tokens (`length_normalised`: their means over tokens); logp are the policy's own log-probabilities.
"At the reference" is where policy and reference are the same model, so that w = l = c = 0.

"sigmoid", "hinge" and "ipo" may have two rejected responses (arXiv 2407.02477): with `extra_negative` the name of a branch, such
a loss L is (1 - e) L(chosen, rejected) + e L(chosen, that branch), e = extra_negative_weight (the paper's gamma is 1 - e, 1/2). Its value at
the reference is L's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Set
from typing import NamedTuple

from .loss_terms import BRANCHES, REFERENCE_VALUES, TOKEN_VALUES, Term, Value

ANCHORS = BRANCHES
"""What "ancpo" can hold above ("chosen") or below (the others) its anchor."""


class LossParameters(NamedTuple):
    """The options that terms are made from, as `preference_loss` documents them."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    anchor: float = 0.0
    anchors: tuple[str, ...] = ("chosen",)
    simpo_gamma: float = 0.5
    bco_shift: float = 0.0
    extra_negative: str | None = None
    """Branch that is a second rejected response; None: there is none."""
    extra_negative_weight: float = 0.5
    corrupted: tuple[str, ...] = ("corrupted",)
    """Branches that are the chosen response under corrupted pictures."""
    similar_beta: float | None = None
    """None: `beta`."""


def difference(up: str, down: str, kind: str = "ratio") -> tuple[Value, ...]:
    """That value of one branch minus that of another."""
    return Value(kind, up), Value(kind, down, -1.0)


def sigmoid(x: LossParameters) -> tuple[Term, ...]:
    """DPO (arXiv 2305.18290, eq. 7): -log sigmoid(beta (w - l)). log 2 at the reference."""
    return _against(x, lambda name: Term("minus_log_sigmoid", difference("chosen", name), scale=x.beta))


def hinge(x: LossParameters) -> tuple[Term, ...]:
    """SLiC (arXiv 2305.10425; on log-ratios as in arXiv 2309.06657): max(0, 1 - beta (w - l)). 1 at the reference."""
    return _against(x, lambda name: Term("hinge", difference("chosen", name), scale=x.beta))


def ipo(x: LossParameters) -> tuple[Term, ...]:
    """IPO (arXiv 2310.12036, eq. 17) on per-token means of w and l: (w - l - 1 / (2 beta))^2. 1 / (4 beta^2) at the reference."""
    return _against(x, lambda name: Term("square", difference("chosen", name, "mean_ratio"), offset=-1 / (2 * x.beta)))


def cdpo(x: LossParameters) -> tuple[Term, ...]:
    """Conservative DPO (Mitchell 2023, ericmitchell.ai/cdpo.pdf), e = label_smoothing the share of labels that are wrong:
    -(1 - e) log sigmoid(beta (w - l)) - e log sigmoid(-beta (w - l)). log 2 at the reference for every e.
    """
    return _either_way(x.beta, 1 - x.label_smoothing, x.label_smoothing)


def robust(x: LossParameters) -> tuple[Term, ...]:
    """Robust DPO (arXiv 2403.00409), unbiased where a share e = label_smoothing of the labels is wrong:
    (-(1 - e) log sigmoid(beta (w - l)) + e log sigmoid(-beta (w - l))) / (1 - 2 e). log 2 at the reference for every e.
    """
    share = 1 - 2 * x.label_smoothing
    return _either_way(x.beta, (1 - x.label_smoothing) / share, -x.label_smoothing / share)


def simpo(x: LossParameters) -> tuple[Term, ...]:
    """SimPO (arXiv 2405.14734, eq. 6), without a reference: -log sigmoid(beta (logp_w / |w| - logp_l / |l|) - gamma), gamma =
    simpo_gamma in units of reward. Its value depends on the policy alone: log(1 + exp(gamma)) where both responses have one mean.
    """
    means = difference("chosen", "rejected", "mean_logp")
    return (Term("minus_log_sigmoid", means, scale=x.beta, offset=-x.simpo_gamma),)


def orpo(x: LossParameters) -> tuple[Term, ...]:
    """ORPO's odds-ratio term alone (arXiv 2403.07691, eq. 7), without a reference: -beta log sigmoid(log odds_w - log odds_l), with
    odds = p / (1 - p), log p = logp / length, and beta the paper's lambda. ORPO itself is `("nll", "orpo")`.
    beta log 2 where both responses have one mean log-probability.
    """
    return (Term("minus_log_sigmoid", difference("chosen", "rejected", "log_odds"), weight=x.beta),)


def bco_pair(x: LossParameters) -> tuple[Term, ...]:
    """BCO (arXiv 2404.04656) on pairs: -log sigmoid(beta w - s) - log sigmoid(-(beta l - s)), s = bco_shift the reward
    shift, in the paper a running mean of (beta w + beta l) / 2. log(1 + exp(s)) + log(1 + exp(-s)) at the reference; 2 log 2 for s = 0.

    MPO (arXiv 2411.10442) is 0.8 "sigmoid" + 0.2 "bco_pair" + 1 "mean_nll", its code has "nll" in place of the last.
    """
    return _above("chosen", x.beta, x.bco_shift), _below("rejected", x.beta, x.bco_shift)


def kto_pair(x: LossParameters) -> tuple[Term, ...]:
    """KTO (arXiv 2402.01306, both lambdas 1) on pairs, mean of the two responses' losses:
    (1 - sigmoid(beta (w - z_l)) + 1 - sigmoid(beta (z_w - l))) / 2. 1 / 2 at the reference.

    The paper estimates its point of reference z0, the KL divergence from the reference, on responses of other prompts, which costs
    another forward. Here, as in the form for pairs that its authors' report gives, the other half of the batch stands for them:
    z_l = max(0, mean l) and z_w = max(0, mean w) over the batch given, no gradient through either. The value thus depends on what
    shares a batch.
    """
    chosen = Value("batch_ratio", "rejected"), Value("ratio", "chosen", -1.0)
    rejected = Value("ratio", "rejected"), Value("batch_ratio", "chosen", -1.0)
    return tuple(Term("sigmoid", values, scale=x.beta, weight=0.5) for values in (chosen, rejected))


def nll(x: LossParameters) -> tuple[Term, ...]:
    """Negative log-likelihood of the chosen responses, mean over the batch's tokens (the gamma term of MIA-DPO), without a reference."""
    return (Term("identity", (Value("batch_logp", "chosen", -1.0),)),)


def mean_nll(x: LossParameters) -> tuple[Term, ...]:
    """Negative log-likelihood of the chosen response per token, mean over records (MPO's generation loss, arXiv 2411.10442), without a
    reference: -logp_w / |w|. A short response counts as much as a long one, where in "nll" each token does.
    """
    return (Term("identity", (Value("mean_logp", "chosen", -1.0),)),)


def copo(x: LossParameters) -> tuple[Term, ...]:
    """mDPO's conditional term (arXiv 2406.11839, eq. 3): -log sigmoid(beta (w - c)), mean over the branches in `corrupted` where there are
    several. log 2 at the reference.
    """
    share = 1 / len(x.corrupted)
    return tuple(Term("minus_log_sigmoid", difference("chosen", name), scale=x.beta, weight=share) for name in x.corrupted)


def ancpo(x: LossParameters) -> tuple[Term, ...]:
    """mDPO's anchor (arXiv 2406.11839, eq. 4), d = anchor in units of reward, summed over `anchors`: -log sigmoid(beta w - d) pulls the
    chosen reward above d, -log sigmoid(d - beta l) and -log sigmoid(d - beta c) the others below it, the last as a mean over the branches in
    `corrupted`. At the reference log(1 + exp(d)) for "chosen" and log(1 + exp(-d)) for each other; log 2 an anchor for d = 0.
    """
    terms: list[Term] = []
    for anchor in x.anchors:
        if anchor == "corrupted":
            terms += [_below(name, x.beta, x.anchor)._replace(weight=1 / len(x.corrupted)) for name in x.corrupted]
        else:
            terms.append((_above if anchor == "chosen" else _below)(anchor, x.beta, x.anchor))
    return tuple(terms)


def symmetric(x: LossParameters) -> tuple[Term, ...]:
    """SymMPO's symmetric term (arXiv 2506.11712): a similar picture's answer is wrong here, and this one's is wrong there.

    With s of "similar_chosen" (the similar picture's answer under it), t of "similar_rejected" (the chosen response under the similar
    picture) and u of "exchanged" (the similar picture's answer under the record's own):
    -log sigmoid(beta (w - u)) - log sigmoid(beta (s - t)). 2 log 2 at the reference.

    SymMPO is "sigmoid" + lambda "symmetric" + "ancpo" + "similar_anchor" + 1e-4 "symmetric_margin".
    """
    return tuple(Term("minus_log_sigmoid", difference(*gap), scale=x.beta) for gap in _SYMMETRIC)


def symmetric_margin(x: LossParameters) -> tuple[Term, ...]:
    """SymMPO's margin consistency: ((w - u) - (s - t))^2 with the letters of `symmetric`. 0 at the reference.

    Of log-ratios, as in the released code; of rewards, as in the paper, it is beta^2 times this.
    """
    (up, down), (other_up, other_down) = _SYMMETRIC
    return (Term("square", (*difference(up, down), *difference(other_down, other_up))),)


def similar_anchor(x: LossParameters) -> tuple[Term, ...]:
    """SymMPO's second anchor, "ancpo" being the first: -log sigmoid(b s) with s of "similar_chosen" and b = similar_beta, which the released
    code has as a setting beside beta (both 0.1). log 2 at the reference.
    """
    return (_above("similar_chosen", x.beta if x.similar_beta is None else x.similar_beta, 0.0),)


_SYMMETRIC = (("chosen", "exchanged"), ("similar_chosen", "similar_rejected"))
"""The right and the wrong answer, under the record's own pictures and under similar ones."""


def _against(x: LossParameters, term: Callable[[str], Term]) -> tuple[Term, ...]:
    """A loss of a pair: `term` of the rejected branch, or the weighted ones of both rejected responses."""
    if x.extra_negative is None:
        return (term("rejected"),)
    shares = {"rejected": 1 - x.extra_negative_weight, x.extra_negative: x.extra_negative_weight}
    return tuple(term(name)._replace(weight=share) for name, share in shares.items())


def _either_way(beta: float, right: float, wrong: float) -> tuple[Term, ...]:
    """DPO on the pair as it is labelled, and on the pair the other way round, with a weight each."""
    return (
        Term("minus_log_sigmoid", difference("chosen", "rejected"), scale=beta, weight=right),
        Term("minus_log_sigmoid", difference("rejected", "chosen"), scale=beta, weight=wrong),
    )


def _above(branch: str, beta: float, level: float) -> Term:
    """-log sigmoid(reward - level)."""
    return Term("minus_log_sigmoid", (Value("ratio", branch),), scale=beta, offset=-level)


def _below(branch: str, beta: float, level: float) -> Term:
    """-log sigmoid(level - reward)."""
    return Term("minus_log_sigmoid", (Value("ratio", branch, -1.0),), scale=beta, offset=level)


LOSSES: dict[str, Callable[[LossParameters], Iterable[Term]]] = {
    f.__name__: f
    for f in (
        *(sigmoid, hinge, ipo, cdpo, robust, simpo, orpo, bco_pair, kto_pair, nll, mean_nll, copo, ancpo),
        *(symmetric, symmetric_margin, similar_anchor),
    )
}


def values_of(name: str, parameters: LossParameters | None = None) -> list[Value]:
    """All that a loss looks at."""
    return [value for term in LOSSES[name](parameters or LossParameters()) for value in term.values]


class LossesThat(Set[str]):
    """The names in LOSSES that something holds for, a loss that is added later among them."""

    def __init__(self, holds: Callable[[str], bool]) -> None:
        self._holds = holds

    def __contains__(self, name: object) -> bool:
        return name in LOSSES and self._holds(str(name))

    def __iter__(self) -> Iterator[str]:
        return filter(self._holds, LOSSES)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    @classmethod
    def _from_iterable(cls, names: Iterable[str]) -> frozenset[str]:  # type: ignore[override]
        return frozenset(names)


REFERENCE_FREE = LossesThat(lambda name: all(value.kind not in REFERENCE_VALUES for value in values_of(name)))
"""Losses that do not look at the reference model."""
NEEDS_CORRUPTED = LossesThat(lambda name: any(value.branch == "corrupted" for value in values_of(name)))
"""Losses that always need the corrupted branch; "ancpo" does where its `anchors` name it."""
NEEDS_LENGTHS = LossesThat(lambda name: any(value.kind in TOKEN_VALUES for value in values_of(name)))
"""Losses that need the token counts of both responses; "nll" and "mean_nll" those of the chosen one only."""
SMOOTHED = LossesThat(
    lambda name: tuple(LOSSES[name](LossParameters(label_smoothing=0.25))) != tuple(LOSSES[name](LossParameters()))
)
"""Losses that `label_smoothing` acts on."""
EXTENDED = LossesThat(
    lambda name: any(value.branch == "extra" for value in values_of(name, LossParameters(extra_negative="extra")))
)
"""Losses that `extra_negative` acts on."""
