"""The report page: what a run folder says (`contents`), its plots and heat maps, and the HTML template.

Imported by stages; imports answers, methods, models and data.
"""
