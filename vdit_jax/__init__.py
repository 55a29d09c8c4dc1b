"""Text-to-video latent diffusion transformers in JAX/Flax."""

__version__ = "0.1.0"
