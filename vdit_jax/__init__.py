"""Text-to-video latent diffusion transformers in JAX/Flax."""
