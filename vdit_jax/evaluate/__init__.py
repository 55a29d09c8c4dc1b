"""Measures of a checkpoint."""
