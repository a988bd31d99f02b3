"""Records and what becomes of them before a model sees them: readers, pictures, collages, corruptions, pairs, answers compared.

Imported by everything above; imports files, config and errors, and no model code.
"""
