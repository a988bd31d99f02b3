"""Where the kernel tests run: on the GPU where there is one, else on the CPU, Triton kernels interpreted."""

from __future__ import annotations

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
