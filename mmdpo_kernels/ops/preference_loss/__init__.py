"""`preference_loss`: the public function, and from log-probabilities to what a backend writes.

`logps` -> `settings`, `arrays` -> `fused`, or the reference -> `function`, the only one that others import, by this package.
"""

from ...losses import ANCHORS, EXTENDED, LOSSES, NEEDS_CORRUPTED, NEEDS_LENGTHS, REFERENCE_FREE, SMOOTHED
from .function import PreferenceLoss, preference_loss
from .logps import SequenceLogps, TokenLogps, sequence_logps

__all__ = [
    "ANCHORS",
    "EXTENDED",
    "LOSSES",
    "NEEDS_CORRUPTED",
    "NEEDS_LENGTHS",
    "REFERENCE_FREE",
    "SMOOTHED",
    "PreferenceLoss",
    "SequenceLogps",
    "TokenLogps",
    "preference_loss",
    "sequence_logps",
]
