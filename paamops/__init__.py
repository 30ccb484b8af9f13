"""paamops: fused kernels and methods for filter pruning of convolutional networks in PyTorch."""
