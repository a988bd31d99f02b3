"""Triton kernels for NVIDIA GPUs, which also run interpreted on the CPU and compile ahead of time without a GPU."""
