"""One file a benchmark, or a family of them that are published in one form. Imported by `suites` alone."""
