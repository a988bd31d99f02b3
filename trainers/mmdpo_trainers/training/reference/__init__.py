"""The reference model's log-probabilities: computed beside the policy's, or once, and kept in a file.

Imported by the trainer and by `mmdpo reference`; imports batches.
"""
