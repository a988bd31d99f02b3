"""The reference model's log-probabilities: computed beside the policy's, or once, and kept in a file.

Imported by the trainer and by `mmdpo reference`; imports batches, sharded, and the parts of a model.
"""
