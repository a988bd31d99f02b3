"""PyTorch's own fused attention, rectangle by rectangle of the token tree; nothing S x S is built."""
