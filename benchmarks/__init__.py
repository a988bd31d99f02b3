"""Benchmarks and the long experiments; nothing of them is installed. What each file is for: docs/architecture.md.

`python -m benchmarks` holds every op against its peers: cases in `ops/`, contestants in `ours.py` and `peers/`, docs/kernels.md by `page.py`.
Every other module with a `main` is a command of its own, `python -m benchmarks.<name>`. Figures go to `results/`, tables into docs/.
"""
