"""What only makes the shipped checkpoints: formats, lessons, and two commands, `base` and `prior_base`. Imported by nothing but tests."""
