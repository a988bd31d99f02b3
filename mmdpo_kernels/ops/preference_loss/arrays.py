"""The log-probabilities of a `preference_loss` call as the arrays that its backends take."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.loss_options import LossArrays
from ...loss_terms import BRANCHES
from ..checks import check_tensor
from .logps import SequenceLogps, TokenLogps, wide
from .settings import OP, LossSettings

_USUAL = frozenset((BRANCHES[:2], BRANCHES))


def token_arrays(policy: TokenLogps, reference: TokenLogps | SequenceLogps | None, settings: LossSettings) -> LossArrays:
    """Tokens as they lie."""
    logps, lengths, weights, branches = policy.logps, policy.lengths, policy.weights, tuple(policy.branches)
    _check_branches(settings, branches)
    _check_vector("policy.logps", logps, None)
    fits = isinstance(lengths, Tensor) and lengths.ndim == 2 and lengths.shape[1] == len(branches)
    if not fits or lengths.is_floating_point():
        check_tensor(OP, "policy.lengths", lengths, ("B", len(branches)), floating=False)
    if lengths.shape[0] == 0 and logps.shape[0]:
        raise ValueError(f"{OP}: policy.lengths has no records for the {logps.shape[0]} tokens of policy.logps")
    values = wide(logps)
    if weights is not None:
        check_tensor(OP, "policy.weights", weights, tuple(logps.shape))
        weights = _like(weights, values)
    return LossArrays(
        policy=values if values.is_contiguous() else values.contiguous(),
        reference=None if reference is None else _token_reference(policy, reference, values),
        reference_is_sums=isinstance(reference, SequenceLogps),
        lengths=_int64(lengths, values.device),
        weights=weights,
        counts=None,
        branches=branches,
        batch=lengths.shape[0],
    )


def sequence_arrays(policy: SequenceLogps, reference: TokenLogps | SequenceLogps | None, settings: LossSettings) -> LossArrays:
    """Sums, branch after branch."""
    _check_vector("policy.chosen", policy.chosen, None)
    branches = BRANCHES[:2] if policy.corrupted is None else BRANCHES
    _check_branches(settings, branches, sums=True)
    batch = policy.chosen.shape[0]
    values = _joined("policy", policy, branches, batch)
    return LossArrays(
        policy=values,
        reference=None if reference is None else _like(_joined("reference", reference, branches, batch), values),
        reference_is_sums=True,
        lengths=None,
        weights=None,
        counts=_counts(policy, settings, values, branches, batch),
        branches=branches,
        batch=batch,
    )


def _token_reference(policy: TokenLogps, reference: TokenLogps | SequenceLogps, values: Tensor) -> Tensor:
    if isinstance(reference, SequenceLogps):
        return _like(_joined("reference", reference, tuple(policy.branches), policy.lengths.shape[0]), values)
    if not isinstance(reference, TokenLogps):
        raise TypeError(f"{OP}: reference must be TokenLogps, SequenceLogps or None, got {type(reference).__name__}")
    _check_vector("reference.logps", reference.logps, values.shape[0])
    if tuple(reference.branches) != tuple(policy.branches):
        raise ValueError(f"{OP}: reference.branches must be the policy's {policy.branches}, got {reference.branches}")
    if reference.lengths is not policy.lengths:
        check_tensor(OP, "reference.lengths", reference.lengths, tuple(policy.lengths.shape))
        if values.is_cpu and not torch.compiler.is_compiling() and not torch.equal(reference.lengths, policy.lengths):
            raise ValueError(f"{OP}: reference.lengths must be policy.lengths")
    if reference.weights is not None and policy.weights is None:
        raise ValueError(f"{OP}: reference has weights but policy.weights is None; the policy's weights are used for both")
    return _like(reference.logps, values)


def _joined(model: str, logps: TokenLogps | SequenceLogps, branches: tuple[str, ...], batch: int) -> Tensor:
    """(K B,) float32 at least."""
    if not isinstance(logps, SequenceLogps):
        raise TypeError(
            f"{OP}: {model} must be SequenceLogps, as policy is or with TokenLogps as policy, got {type(logps).__name__}"
        )
    others = set(branches).difference(BRANCHES)
    if others:
        raise TypeError(
            f"{OP}: {model} must be TokenLogps, as SequenceLogps has no log-probabilities of {', '.join(sorted(others))}, which policy has"
        )
    found = []
    for name in branches:
        values = getattr(logps, name)
        if values is None and name == "corrupted":
            raise ValueError(f"{OP}: policy has 'corrupted' log-probabilities but {model}.corrupted is None")
        _check_vector(f"{model}.{name}", values, batch)
        found.append(values)
    return wide(torch.cat(found))


def _counts(
    policy: SequenceLogps, settings: LossSettings, values: Tensor, branches: tuple[str, ...], batch: int
) -> Tensor | None:
    """(K B,) tokens of the responses; None where nothing asks for them."""
    given = {"chosen": policy.chosen_lengths, "rejected": policy.rejected_lengths, "corrupted": policy.corrupted_lengths}
    for name, lengths in given.items():
        if lengths is not None and (not isinstance(lengths, Tensor) or lengths.shape != (batch,)):
            check_tensor(OP, f"policy.{name}_lengths", lengths, (batch,))
    if not settings.lengths:
        return None
    for name in branches:
        asking = settings.lengths.get(name) or settings.lengths.get("")
        # The corrupted branch's response is the chosen one.
        name = "chosen" if name == "corrupted" and given[name] is None else name
        if asking is not None and given[name] is None:
            raise ValueError(f"{OP}: {asking} needs policy.{name}_lengths, got None")
    # Those that nothing asks for are not read, so that ones do in their place.
    stand_in = values.new_ones(batch) if given["chosen"] is None else given["chosen"]
    return torch.cat([_like(stand_in if given[name] is None else given[name], values) for name in branches])  # type: ignore[arg-type]


def _check_vector(name: str, values: Tensor, size: int | None) -> None:
    """(size,) floating; as `check_tensor`, which makes the error, in a tenth of its time."""
    fits = isinstance(values, Tensor) and values.ndim == 1 and values.is_floating_point()
    if not fits or (size is not None and values.shape[0] != size):
        check_tensor(OP, name, values, ("B" if size is None else size,), floating=True)


def _check_branches(settings: LossSettings, branches: tuple[str, ...], *, sums: bool = False) -> None:
    if settings.branches.issubset(branches) and (branches in _USUAL or len(set(branches)) == len(branches)):
        return
    if len(set(branches)) != len(branches) or not {"chosen", "rejected"}.issubset(branches):
        raise ValueError(
            f"{OP}: policy.branches must be 'chosen', 'rejected' and maybe 'corrupted' or others that a loss looks at, each once, "
            f"got {branches}"
        )
    missing = min(settings.branches.difference(branches))
    losses = zip(settings.options.names, settings.options.terms, strict=True)
    loss = next(name for name, terms in losses if any(value.branch == missing for term in terms for value in term.values))
    wanted = "under the corrupted picture" if missing == "corrupted" else f"of the branch {missing!r}"
    found = f"policy.branches are {branches}"
    if sums:
        found = f"policy.{missing} is None" if missing in BRANCHES else "which SequenceLogps has no name for; pass TokenLogps"
    raise ValueError(f"{OP}: loss {loss!r} needs log-probabilities {wanted}, {found}")


def _like(values: Tensor, other: Tensor) -> Tensor:
    """In the dtype of `other` and where it is; kernels follow addresses."""
    if values.dtype != other.dtype or values.device != other.device:
        values = values.to(other)
    return values if values.is_contiguous() else values.contiguous()


def _int64(lengths: Tensor, device: torch.device) -> Tensor:
    if lengths.dtype != torch.int64 or lengths.device != device:
        lengths = lengths.to(device, torch.int64)
    return lengths if lengths.is_contiguous() else lengths.contiguous()
