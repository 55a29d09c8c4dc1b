"""Kernels for TPU; `nn` chooses between them and plain jax."""
