"""Reward models: a policy's architecture with a scalar head, trained on preference pairs, and rating answers.

Imported by stages, run and the door of training; imports the rest of training, answers' protocol of raters and what is below.
"""
