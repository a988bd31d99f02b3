"""Objects that an answer names, held to annotations by rule: CHAIR, Object HalBench, AMBER. Imported by the benchmarks beside it."""
