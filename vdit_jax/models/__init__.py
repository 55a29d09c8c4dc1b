"""Whole networks, one file each, with their published sizes."""
