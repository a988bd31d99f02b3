"""The public ops: argument checks and one autograd function each, over interchangeable backends.

Imports `mmdpo_kernels.backends` and the losses; is imported by patching, recording and the trainers.
"""
