"""Thin trainers on top of mmdpo_kernels: the run folder, its stages and the `mmdpo` command.

May import mmdpo_kernels; nothing in mmdpo_kernels imports this package. Importing it loads neither torch nor transformers.
"""
