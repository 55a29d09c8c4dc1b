"""Latents cut into tokens, a token a patch, and joined again.

Within a token, channels come behind places ("last": DiT and most others) or
before them ("first": the weights of some released systems want it so).
"""

import jax
import jax.numpy as jnp

Patch = tuple[int, int, int]

# Axes of [B, f, p_f, h, p_h, w, p_w, c], then of [B, f, h, w, *token].
_CUT = {"last": (0, 1, 3, 5, 2, 4, 6, 7), "first": (0, 1, 3, 5, 7, 2, 4, 6)}
_JOIN = {"last": (0, 1, 4, 2, 5, 3, 6, 7), "first": (0, 1, 5, 2, 6, 3, 7, 4)}


def cut(x: jax.Array, patch: Patch, channels: str = "last") -> jax.Array:
  """Cut latents [B, f, h, w, c] into tokens [B, L, p_f p_h p_w c].

  Args:
    x: the latents, of whole patches.
    patch: latents a patch along frames, height, width.
    channels: "last", or "first" for tokens [B, L, c p_f p_h p_w].
  """
  B, f, h, w, c = x.shape
  p_f, p_h, p_w = patch
  x = x.reshape(B, f // p_f, p_f, h // p_h, p_h, w // p_w, p_w, c)
  x = x.transpose(_CUT[channels])
  return x.reshape(B, -1, p_f * p_h * p_w * c)


def to_tokens(x: jax.Array, grid: tuple[int, int, int]) -> jax.Array:
  """Give each token its frame's vector: [B, 1 or f, D] -> [B, 1 or L, D].

  Args:
    x: a vector for each clip, or for each frame of tokens.
    grid: tokens along frames, height and width.
  """
  if x.shape[1] == 1:
    return x
  return jnp.repeat(x, grid[1] * grid[2], axis=1)


def join(
  x: jax.Array,
  grid: tuple[int, int, int],
  patch: Patch,
  channels: str = "last",
) -> jax.Array:
  """Invert `cut`, given the tokens along each axis."""
  p_f, p_h, p_w = patch
  f, h, w = grid
  token = (p_f, p_h, p_w, -1) if channels == "last" else (-1, p_f, p_h, p_w)
  x = x.reshape(x.shape[0], f, h, w, *token).transpose(_JOIN[channels])
  return x.reshape(x.shape[0], f * p_f, h * p_h, w * p_w, -1)
