"""Our system: a causal 3D VAE, a denoiser with joint attention."""
