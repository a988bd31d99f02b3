"""What is asked while `torch.compile` traces, and imported then: the decorator brings the whole tracer, which takes seconds."""

from __future__ import annotations

import torch

from .fused import backend_of

constant_backend = torch.compiler.assume_constant_result(backend_of)
