"""`python -m benchmarks.gpu`: everything that a GPU machine is to show, phase by phase."""
