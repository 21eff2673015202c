"""One file a kernel: the mathematics, a plain PyTorch reference, and what is faster than it."""
