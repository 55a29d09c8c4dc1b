"""Measures of videos: against references, against captions, over time."""
