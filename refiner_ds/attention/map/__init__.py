"""The attention map: softmax(scale·QKᵀ) plus the residual map of the block before, and its product with the values."""
