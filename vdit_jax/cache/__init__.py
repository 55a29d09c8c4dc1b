"""Datasets of latents, so that training needs no autoencoder."""
