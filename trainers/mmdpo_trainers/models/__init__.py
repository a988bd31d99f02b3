"""Models from local folders: families, processors, chat formats, and records as model inputs.

Imported by everything that runs a model; imports data and what is below it.
"""
