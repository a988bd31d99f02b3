"""Fused kernels and drop-in patches for multimodal preference training.

`patch_model` -> ops -> backends; losses, token tree and recorder beside them. Needs torch, triton and numpy; transformers only to patch.
"""

from .backends.registry import backends
from .head import through_head
from .load_balancing import load_balancing_loss
from .ops.attention_mass import attention_mass
from .ops.linear_logprobs import LogProbs, SharedRows, linear_logprobs
from .ops.preference_loss import PreferenceLoss, SequenceLogps, TokenLogps, preference_loss, sequence_logps
from .ops.tree_attention import TreeAttentionOutput, tree_attention
from .patch import patch_model, tree_refusal, unpatch_model
from .path_maps import PathMaps, SequencePaths
from .record import AttentionRecorder, record_attention, record_path_maps
from .segments import image_segments
from .tree import TokenTree

__version__ = "0.1.0"

__all__ = [
    "AttentionRecorder",
    "LogProbs",
    "PathMaps",
    "PreferenceLoss",
    "SequenceLogps",
    "SequencePaths",
    "SharedRows",
    "TokenLogps",
    "TokenTree",
    "TreeAttentionOutput",
    "attention_mass",
    "backends",
    "image_segments",
    "linear_logprobs",
    "load_balancing_loss",
    "patch_model",
    "preference_loss",
    "record_attention",
    "record_path_maps",
    "sequence_logps",
    "through_head",
    "tree_attention",
    "tree_refusal",
    "unpatch_model",
]
