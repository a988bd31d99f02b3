"""`mmdpo export`: what a run trained, as a folder that transformers and vLLM read, with its model card.

Imported by cli; imports stages and what is below them.
"""
