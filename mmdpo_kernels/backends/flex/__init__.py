"""PyTorch's FlexAttention with the tree rule as its mask."""
