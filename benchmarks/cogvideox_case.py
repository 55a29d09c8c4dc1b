"""CogVideoX networks to be timed: their configs, and what they are given.

Both sides read this, so it imports neither jax nor torch.
"""

from typing import Any

import numpy as np

GUIDANCE, LR = 6.0, 1e-4
TIME = 500  # timestep of one call of the denoiser
TEXT = (226, 4096)  # tokens, width
CHANNELS = 16  # of latents


def vae(
  channels: tuple[int, ...], layers: int, **fields: Any
) -> dict[str, Any]:
  """Arguments of diffusers' autoencoder."""
  return dict(
    block_out_channels=channels,
    down_block_types=("CogVideoXDownBlock3D",) * len(channels),
    up_block_types=("CogVideoXUpBlock3D",) * len(channels),
    latent_channels=CHANNELS,
    layers_per_block=layers,
    temporal_compression_ratio=4,
    **fields,
  )


def inputs(
  latents: tuple[int, int, int], text_width: int = TEXT[1]
) -> dict[str, np.ndarray]:
  """Draw what a denoiser is given, in our layout.

  Args:
    latents: (f, h, w).
    text_width: E.

  Returns:
    x_t and target [1, f, h, w, c]; embeds [2, M, E], of a negative and of a
    prompt.
  """
  rng = np.random.default_rng(1)
  draw = lambda *shape: rng.standard_normal(shape, np.float32)
  return {
    "x_t": draw(1, *latents, CHANNELS),
    "target": draw(1, *latents, CHANNELS),
    "embeds": draw(2, TEXT[0], text_width),
  }


def decoded(latents: tuple[int, int, int]) -> np.ndarray:
  """Draw what a decoder is given, latents [1, f, h, w, c]."""
  shape = 1, *latents, CHANNELS
  return np.random.default_rng(2).standard_normal(shape, np.float32)
