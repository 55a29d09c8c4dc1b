"""Kernels for attention on TPU, one a file; `nn.attention` chooses."""
