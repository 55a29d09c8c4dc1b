"""Datasets built from clips in files."""
