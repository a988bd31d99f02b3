"""What watches a running model: `AttentionRecorder` in `recording`, rows and keys in `masks`, one forward in `plan`, decoding in `steps`."""

from .masks import tree_calls
from .plan import LayerCall
from .recording import AttentionRecorder, ForwardStopped

__all__ = ["AttentionRecorder", "ForwardStopped", "LayerCall", "tree_calls"]
