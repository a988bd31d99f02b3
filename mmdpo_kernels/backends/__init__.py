"""Implementations of the ops: plain forward and backward functions, no autograd inside.

One folder a backend, one file an op. Imported by `mmdpo_kernels.ops` and by patching; imports nothing from there.
"""
