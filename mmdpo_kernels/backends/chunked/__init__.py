"""Plain PyTorch over chunks of rows, so that no T x V tensor exists."""
