"""`preference_loss`: any weighted list of preference losses as a pure function of log-probabilities of tokens or of responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...backends.loss_options import TableRows, table_rows
from ...backends.reference import preference_loss as reference_backend
from ...losses import LossParameters
from .arrays import sequence_arrays, token_arrays
from .fused import compiled_loss, fused_loss, kept_backend
from .logps import SequenceLogps, TokenLogps
from .settings import OP, LossRequest, as_names, kept_settings, settings


@dataclass(frozen=True, kw_only=True)
class PreferenceLoss:
    """What `preference_loss` returns. All but the loss are views of one table, made when asked for."""

    loss: Tensor
    """Scalar: weighted sum of the batch means. The only part that carries a gradient."""
    table: Tensor = field(repr=False)
    """(rows, B), see `mmdpo_kernels.backends.loss_options.TableRows`."""
    names: tuple[str, ...]
    """The losses, each once."""
    branches: tuple[str, ...]
    """The responses of a record, in the order of the rows."""

    @property
    def losses(self) -> dict[str, Tensor]:
        """(B,) per loss, unweighted."""
        return self._rows(self.names, 0)

    @property
    def rewards(self) -> dict[str, Tensor]:
        """(B,) `beta (log p - log p_ref)` of each branch: "chosen", "rejected", maybe "corrupted" and others; per token with
        `length_normalised`."""
        return self._rows(self.branches, self._places.rewards)

    @property
    def logps(self) -> dict[str, Tensor]:
        """(B,) the policy's log-probability of each response: the sum over its tokens, or with weights their weighted mean."""
        return self._rows(self.branches, self._places.logps)

    @property
    def accuracies(self) -> Tensor:
        """(B,) 1.0 where the chosen reward is above the rejected one."""
        return self.table[self._places.accuracy]

    @property
    def margins(self) -> Tensor:
        """(B,) chosen minus rejected reward."""
        return self.table[self._places.margin]

    @property
    def _places(self) -> TableRows:
        return table_rows(len(self.names), len(self.branches))

    def _rows(self, names: tuple[str, ...], first: int) -> dict[str, Tensor]:
        return dict(zip(names, self.table[first : first + len(names)].unbind(0), strict=True))


def preference_loss(
    policy: SequenceLogps | TokenLogps,
    reference: SequenceLogps | TokenLogps | None = None,
    *,
    loss_type: Sequence[str] = ("sigmoid",),
    loss_weights: Sequence[float] | None = None,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    anchor: float = 0.0,
    anchors: Sequence[str] = ("chosen",),
    simpo_gamma: float = 0.5,
    bco_shift: float = 0.0,
    extra_negative: str | None = None,
    extra_negative_weight: float = 0.5,
    corrupted: Sequence[str] = ("corrupted",),
    similar_beta: float | None = None,
    length_normalised: bool = False,
    backend: str = "auto",
) -> PreferenceLoss:
    """Preference loss of a batch of pairs or triples.

    With w, l, c the policy's log-probabilities of chosen, rejected and chosen-under-the-corrupted-picture minus the reference's, the
    default is DPO, `-log sigmoid(beta (w - l))`; `("sigmoid", "copo", "ancpo")` is mDPO; `("sigmoid", "nll")` is MIA-DPO;
    `("nll", "orpo")` is ORPO. Equivalent PyTorch for the default: `-logsigmoid(beta * (w - l)).mean()`.

    Args:
        policy: log-probabilities that carry the gradient: `SequenceLogps`, (B,) sums a branch, or `TokenLogps`, which spares their sums.
        reference: the same under the reference model, with `TokenLogps` either of the two; None = reference-free, all zeros. Losses in
            `REFERENCE_FREE` never look at it.
        loss_type: names in `LOSSES`: "sigmoid", "hinge", "ipo", "cdpo", "robust", "simpo", "orpo", "bco_pair", "kto_pair", "nll",
            "mean_nll", "copo", "ancpo", "symmetric", "symmetric_margin", "similar_anchor"; equations, sources and values at the reference are
            in `mmdpo_kernels.losses`.
        loss_weights: one factor a loss, default 1.
        beta: strength of the pull towards the reference, above 0; of "orpo" the factor of its only term.
        label_smoothing: share of the labels taken to be wrong, in [0, 0.5); acts on "cdpo" and "robust" and is an error without them.
        anchor: delta of "ancpo", in units of reward.
        anchors: rewards that "ancpo" holds: "chosen" above `anchor`, "rejected" and "corrupted" below it.
        simpo_gamma: margin of "simpo", in units of reward, at least 0.
        bco_shift: reward shift of "bco_pair"; 0 leaves it out, as TRL does.
        extra_negative: branch of the policy that is a second rejected response for "sigmoid", "hinge" and "ipo"; None: there is none. An
            error without one of these losses.
        extra_negative_weight: its share of such a loss, in [0, 1]; the rejected response has the rest.
        corrupted: branches over which "copo" (and "ancpo" anchoring "corrupted") is a mean.
        similar_beta: beta of "similar_anchor"; None: `beta`.
        length_normalised: divide w, l and c by their token counts, in rewards and in every loss that is not per token already
            ("ipo", "simpo", "orpo", "nll").
        backend: "auto", or a name from `backends()["preference_loss"]`.

    Returns:
        `PreferenceLoss`. The loss can be differentiated once, with the backend "reference" again; a log-probability that is not finite,
        under either model and of any branch, makes it NaN or infinite.

    Raises:
        TypeError, ValueError: unknown loss, settings out of range, weights that do not match, a missing corrupted branch or missing
            lengths.
        RuntimeError: in backward, a second derivative (`create_graph=True`).
    """
    # Numbers, not tensors of them: what is looked up by a tensor does not follow its value.
    parameters = LossParameters(
        beta=float(beta),
        label_smoothing=float(label_smoothing),
        anchor=float(anchor),
        anchors=as_names(anchors),
        simpo_gamma=float(simpo_gamma),
        bco_shift=float(bco_shift),
        extra_negative=extra_negative,
        extra_negative_weight=float(extra_negative_weight),
        corrupted=as_names(corrupted),
        similar_beta=None if similar_beta is None else float(similar_beta),
    )
    weights = None if loss_weights is None else tuple(loss_weights)
    return _evaluated(policy, reference, LossRequest(as_names(loss_type), weights, parameters, length_normalised), backend)


def _evaluated(
    policy: SequenceLogps | TokenLogps, reference: SequenceLogps | TokenLogps | None, request: LossRequest, backend: str
) -> PreferenceLoss:
    compiling = torch.compiler.is_compiling()
    asked = (settings if compiling else kept_settings)(request)
    if isinstance(policy, TokenLogps):
        arrays = token_arrays(policy, reference, asked)
    elif isinstance(policy, SequenceLogps):
        arrays = sequence_arrays(policy, reference, asked)
    else:
        raise TypeError(f"{OP}: policy must be SequenceLogps or TokenLogps, got {type(policy).__name__}")
    call = backend, arrays.policy.device, arrays.policy.dtype
    if compiling:
        from .traced import constant_backend

        name = constant_backend(*call)
    else:
        name = kept_backend(*call)
    if name == "reference":
        loss, table = reference_backend.forward(arrays, asked.options)
    elif compiling:
        loss, table = compiled_loss(name, arrays, request)
    else:
        loss, table = fused_loss(name, arrays, asked.options)
    return PreferenceLoss(loss=loss, table=table, names=asked.options.names, branches=arrays.branches)
