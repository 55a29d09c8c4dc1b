"""Diffusion: noise schedules, objectives, samplers and guidance."""
