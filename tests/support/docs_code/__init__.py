"""Blocks of code in README.md, CONTRIBUTING.md and docs/: what they are, and what is done with each kind of them in tests."""
