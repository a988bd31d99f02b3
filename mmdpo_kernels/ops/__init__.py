"""The public ops: argument checks and one autograd function each, over interchangeable backends.

Imports `mmdpo_kernels.backends`; is imported by patching, recording and the trainers.
"""
