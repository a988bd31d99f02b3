"""Training steps on whole shapes: LLaVA-1.5-7B, Qwen2.5-VL-7B and a dense Qwen3.5 of 9B, from their configurations with random weights.

    python -m benchmarks.runs.whole_shapes --device cuda    # the whole shapes, made on the GPU in bfloat16; whole_shapes_cuda.json
    python -m benchmarks.runs.whole_shapes                  # the same code and families scaled down, whole_shapes_cpu.json, docs/results.md
    python -m benchmarks.runs.whole_shapes --small          # tiny, to see that everything runs, into build/benchmarks

`shapes.py` is the table of all sizes, `subject.py` makes model, processor and records of one, `cases.py` says who trains by which settings,
`flops.py` counts what a step has to compute, `racing.py` measures, `page.py` is what is printed. Written after each case.
"""
