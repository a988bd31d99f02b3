"""`linear_logprobs`: the public function over registered operators with their gradient; rows that have several targets, scored once.

Others import what is named here.
"""

from .function import LogProbs, linear_logprobs
from .shared_rows import SharedRows

__all__ = ["LogProbs", "SharedRows", "linear_logprobs"]
