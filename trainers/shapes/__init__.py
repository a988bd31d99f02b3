"""The embedded default: a procedural picture world and the small LLaVA that was trained on it.

``world`` makes pictures and questions, ``build_base`` trains the checkpoint in ``base/``; imported by the pipeline and by tests.
"""
