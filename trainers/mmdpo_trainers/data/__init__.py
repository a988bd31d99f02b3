"""Records and what becomes of them before a model sees them: readers, pictures, collages, corruptions, pairs, answers compared.

Imported by everything above; imports processes, files and config, and no model code.
"""
