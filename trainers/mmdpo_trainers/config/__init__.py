"""Settings of a run, read from YAML and from flags, each value checked. Methods, data and models are names here.

Imported by everything above; imports errors alone.
"""
