"""A whole run: stages in order, checks before the first one, summary and tables after the last.

Imported by cli; imports stages and what is below them.
"""
