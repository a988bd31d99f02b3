"""The report page: what a run folder says (`contents`), its plots and heat maps, and the HTML template.

Imported by `stages/report.py` only; imports the run folder, the loader and, for heat maps, `mmdpo_kernels`.
"""
