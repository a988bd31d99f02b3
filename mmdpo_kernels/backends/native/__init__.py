"""C++ kernels from `csrc/`, loaded from `mmdpo_kernels._native`. Imported by `mmdpo_kernels.ops` through the registry.

A package without the compiled extension still imports: each op's `unavailable_reason` says what to do.
"""
