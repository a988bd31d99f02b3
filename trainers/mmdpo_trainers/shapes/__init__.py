"""The embedded default: procedural picture worlds and the small LLaVAs that were trained on them.

`world` and `prior_world` make pictures and questions; `build/` holds what only made the shipped checkpoints, two commands. Imported by stages
and by tests; imports models and data.
"""
