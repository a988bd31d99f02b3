"""Readers of single-image data, safe pictures, collages and the record schema.

Imported by the stages and by ``shapes``; imports no stage and no model code.
"""
