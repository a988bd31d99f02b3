"""The training step: `PreferenceTrainer` against TRL's `DPOTrainer`, and against the official way to train mDPO.

    python -m benchmarks.runs.training_step                 # all parts, results/training_step_cpu.json, docs/results.md
    python -m benchmarks.runs.training_step --part dpo      # one part, into the same files
    python -m benchmarks.runs.training_step --small         # every part on tiny inputs, into build/benchmarks

`setting.py` is the model and the records, `sides.py` the trainers that are compared, `stepping.py` runs real `train()` loops in turn,
`parts.py` the measurements, `limits.py` the products that both must do, `profiled.py` where a
step's time goes, `page.py` what is printed.
"""
