"""Answers of the policy in training, rated, as preference pairs of the step that they are sampled for.

Imported by the trainer's users and stages; imports batches, the raters and engines of answers, and data.
"""
