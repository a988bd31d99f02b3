"""Records to branches of token ids, and these to batches: token trees, padded rows, token budgets.

Imported by the rest of training and by checks; imports models, answers and data.
"""
