"""Plain PyTorch in float32 or wider: the specification of every op and the gradient oracle."""
