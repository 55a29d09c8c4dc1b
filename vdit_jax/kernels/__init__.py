"""Attention kernels, one a file; their references stand in the tests."""
