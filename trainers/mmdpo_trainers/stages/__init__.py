"""The stages of a run, one module each, imported when it runs; beside them what they share: context, run folder, batches, prompts.

A stage module has two functions: `inputs(context) -> list[Path]`, the files and folders its result depends on, and
`run(context) -> dict`, which does (or continues) the work and returns a JSON-able summary. No stage imports a stage; `run/` calls them.
"""
