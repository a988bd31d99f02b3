"""The methods, one declaration a file: which stages a run has, what it trains with, how it is evaluated and what its page shows.

Imported by report, stages, run and cli, which name no method; imports data and what is below it.
"""
