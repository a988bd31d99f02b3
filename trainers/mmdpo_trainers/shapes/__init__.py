"""The embedded default: procedural picture worlds and the small LLaVAs that were trained on them.

``world`` and ``prior_world`` make pictures and questions, ``build_base`` and ``build_prior_base`` train the checkpoints; imported by the
pipeline and by tests.
"""
