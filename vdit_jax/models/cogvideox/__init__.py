"""CogVideoX (arXiv:2408.06072)."""
