"""A first configuration for a method and a model: what the model's family needs, the values, and the text with its comments.

Imported by cli alone.
"""
