"""Latents cut into tokens, channels before places, as CogVideoX has them."""

import jax


def cut(x: jax.Array, patch: tuple[int, int, int]) -> jax.Array:
  """Cut latents [B, f, h, w, c] into tokens [B, L, c p_f p_h p_w]."""
  B, f, h, w, c = x.shape
  p_f, p_h, p_w = patch
  x = x.reshape(B, f // p_f, p_f, h // p_h, p_h, w // p_w, p_w, c)
  x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6)
  return x.reshape(B, -1, c * p_f * p_h * p_w)


def join(
  x: jax.Array, grid: tuple[int, int, int], patch: tuple[int, int, int]
) -> jax.Array:
  """Invert `cut`, given the tokens along each axis."""
  p_f, p_h, p_w = patch
  f, h, w = grid
  x = x.reshape(x.shape[0], f, h, w, -1, p_f, p_h, p_w)
  x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)
  return x.reshape(x.shape[0], f * p_f, h * p_h, w * p_w, -1)
