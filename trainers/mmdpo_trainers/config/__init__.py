"""Settings of a run, read from YAML and from flags, each value checked. No method, data or model is known here.

Imported by everything above; imports errors alone.
"""
