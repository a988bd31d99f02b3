"""Commands over whole models and runs: training steps, attention ratios, seeds, kills, families."""
