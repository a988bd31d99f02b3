"""Answers of a model, and the attention that they paid to its pictures: by transformers, or by vLLM.

Imported by training, report, checks, stages and run; imports models and what is below them.
"""
