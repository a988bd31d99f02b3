"""Benchmarks and the long experiments; nothing of them is installed.

`python -m benchmarks` holds every op against its peers (`kernels/`). Every other module with a `main` is a command of its own: of kernels,
of whole models and runs (`runs/`), and of all that wants a GPU (`gpu/`). Figures go to `results/`, tables into docs/.
"""
