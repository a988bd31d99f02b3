"""What only makes the shipped checkpoints: formats, lessons, and three commands, `base`, `prior_base` and
`looking_base`. Imported by nothing but tests."""
