"""Changes of resolution of Wan's autoencoders, in space and in time.

The first frame of a video is alone: it passes changes of time as it is. What
goes around a level (2.2) moves places into channels or channels into places,
without parameters.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def space_to_channels(x: jax.Array, n: int) -> jax.Array:
  """[B, F, H, W, C] -> [B, F, H/n, W/n, C n n], columns before rows."""
  B, F, H, W, C = x.shape
  x = x.reshape(B, F, H // n, n, W // n, n, C).transpose(0, 1, 2, 4, 6, 5, 3)
  return x.reshape(B, F, H // n, W // n, C * n * n)


def channels_to_space(x: jax.Array, n: int) -> jax.Array:
  """Invert `space_to_channels`."""
  B, F, H, W, C = x.shape
  x = x.reshape(B, F, H, W, C // n**2, n, n).transpose(0, 1, 2, 6, 3, 5, 4)
  return x.reshape(B, F, H * n, W * n, C // n**2)


def average(x: jax.Array, features: int, time: int, space: int) -> jax.Array:
  """Average what of time and space is moved into channels.

  [B, F, H, W, C] -> [B, F / time, H / space, W / space, features], with frames
  of zeros in front where F does not divide: a video's first one is alone.
  """
  x = jnp.pad(x, ((0, 0), (-x.shape[1] % time, 0), (0, 0), (0, 0), (0, 0)))
  B, F, H, W, C = x.shape
  f, h, w = F // time, H // space, W // space
  x = x.reshape(B, f, time, h, space, w, space, C)
  x = x.transpose(0, 1, 3, 5, 7, 2, 4, 6).reshape(B, f, h, w, features, -1)
  return jnp.mean(x, axis=-1)


def duplicate(
  x: jax.Array, features: int, time: int, space: int, first: bool
) -> jax.Array:
  """Repeat channels, and move them into time and space.

  [B, F, H, W, C] -> [B, F time, H space, W space, features]; a video's first
  frame keeps its last copy.
  """
  B, F, H, W, C = x.shape
  x = jnp.repeat(x, features * time * space**2 // C, axis=-1)
  x = x.reshape(B, F, H, W, features, time, space, space)
  x = x.transpose(0, 1, 5, 2, 6, 3, 7, 4)
  x = x.reshape(B, F * time, H * space, W * space, features)
  return x[:, time - 1 :] if first else x


def halve_time(
  conv: Callable[[jax.Array, bool], jax.Array], x: jax.Array, first: bool
) -> jax.Array:
  """Make one frame of two and the one before; a video's first is alone.

  Args:
    conv: a causal convolution along time that keeps the width.
    x: [B, F, H, W, C].
    first: whether a video begins.
  """
  y = conv(x, first)
  if first:
    return jnp.concatenate([x[:, :1], y[:, 2::2]], axis=1)
  return y[:, 1::2]


def double_time(
  conv: Callable[[jax.Array, bool], jax.Array], x: jax.Array, first: bool
) -> jax.Array:
  """Make two frames of each; a video's first is alone, and not looked at.

  Args:
    conv: a causal convolution along time that doubles the width.
    x: [B, F, H, W, C].
    first: whether a video begins.
  """
  alone, x = (x[:, :1], x[:, 1:]) if first else (x[:, :0], x)
  B, F, H, W, C = x.shape
  y = conv(x, first).reshape(B, F, H, W, 2, C)
  y = jnp.moveaxis(y, 4, 2).reshape(B, 2 * F, H, W, C)
  return jnp.concatenate([alone, y], axis=1)
