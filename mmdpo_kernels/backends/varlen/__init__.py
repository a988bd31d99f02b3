"""Variable-length flash attention over paths of the tree, keys and values of shared nodes repeated."""
