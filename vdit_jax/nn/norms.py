"""Normalisations, computed in float32: over the last axis, and in groups.

On a TPU an adaptive layer norm is one kernel; `heads` has queries' and keys'.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdit_jax import sharding
from vdit_jax.kernels import norm as kernels
from vdit_jax.kernels import windows
from vdit_jax.nn import attention, context


class RMSNorm(nn.Module):
  """Root-mean-square norm with a scale (arXiv:1910.07467): [..., D] -> same.

  Attributes:
    eps: added to the mean square.
    axis: logical axis of the scale.
  """

  eps: float = 1e-6
  axis: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return rms_norm(x, _scale(self, x.shape[-1]), self.eps)


class Scale(nn.Module):
  """The scale of an `RMSNorm` that is applied elsewhere: D -> [D].

  Attributes:
    axis: logical axis of the scale.
  """

  axis: str | None = None

  @nn.compact
  def __call__(self, width: int) -> jax.Array:
    return _scale(self, width)


class LayerNorm(nn.Module):
  """Layer norm with a scale and a bias (arXiv:1607.06450): [..., D] -> same.

  Attributes:
    eps: added to the variance.
    axis: logical axis of the scale and the bias.
  """

  eps: float = 1e-5
  axis: str | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
    D = x.shape[-1:]
    scale = self.param("scale", sharding.boxed(ones, (self.axis,)), D)
    bias = self.param("bias", sharding.boxed(zeros, (self.axis,)), D)
    return (layer_norm(x, self.eps) * scale + bias).astype(x.dtype)


class GroupNorm(nn.Module):
  """Group norm with a scale and a bias (arXiv:1803.08494): float32.

  [B, ..., D] -> same; each group of channels is normalised over all places.

  Attributes:
    groups: of channels; they divide D.
    eps: added to the variance.
  """

  groups: int
  eps: float = 1e-6

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    ones, zeros = nn.initializers.ones_init(), nn.initializers.zeros_init()
    D = x.shape[-1:]
    scale = self.param("scale", sharding.boxed(ones, (None,)), D)
    bias = self.param("bias", sharding.boxed(zeros, (None,)), D)
    return group_norm(x, self.groups, self.eps) * scale + bias


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
  """Divide [..., D] by its root mean square in float32, times scale [D]."""
  x32 = x.astype(jnp.float32)  # a bfloat16 mean of squares loses digits
  power = jnp.mean(x32 * x32, axis=-1, keepdims=True)
  return (x32 * jax.lax.rsqrt(power + eps) * scale).astype(x.dtype)


def modulate(
  x: jax.Array,
  shift: jax.Array | None,
  scale: jax.Array | None,
  eps: float,
  kernel: str = "auto",
) -> tuple[jax.Array, jax.Array]:
  """Normalise layers' input and modulate it: adaptive layer norm.

  Args:
    x: tokens [B, L, D].
    shift: float32 [B, 1 or L, D]; None is 0.
    scale: float32 [B, 1 or L, D]; None is 0.
    eps: added to the variance.
    kernel: as in `attention.attend`; widths of 128n and vectors that all
      tokens share alone have one.

  Returns:
    x, to be used in its place behind this, and the result, like x.
  """
  shared = scale is None or scale.shape[1] == 1
  if (
    attention.choose(kernel) == "splash"
    and shared
    and not x.shape[-1] % windows.LANES
  ):
    return _modulate_by_kernel(x, shift, scale, eps)
  y = layer_norm(x, eps)
  if scale is not None:
    y = y * (1 + scale) + shift
  return x, y.astype(x.dtype)


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
  """Normalise [..., D] to zero mean and unit variance in float32."""
  x = x.astype(jnp.float32)
  x = x - jnp.mean(x, axis=-1, keepdims=True)
  variance = jnp.mean(x * x, axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(variance + eps)


def group_norm(x: jax.Array, groups: int, eps: float) -> jax.Array:
  """Normalise groups of [B, ..., D]'s channels over all places, in float32.

  Means are of each channel first: with places and a group's channels in one
  reduction, XLA's CPU compiler takes four times as long.
  """
  x = x.astype(jnp.float32)
  x = x - _group_mean(x, groups)
  variance = _group_mean(x * x, groups)
  return x * jax.lax.rsqrt(variance + eps)


def _group_mean(x, groups):
  """Mean of each channel's group over all places, [B, 1, ..., D]."""
  means = jnp.mean(x, axis=range(1, x.ndim - 1), keepdims=True)
  means = means.reshape(*means.shape[:-1], groups, -1)
  means = jnp.broadcast_to(means.mean(-1, keepdims=True), means.shape)
  return means.reshape(*means.shape[:-2], x.shape[-1])


def _modulate_by_kernel(x, shift, scale, eps):
  zeros = jnp.zeros((x.shape[0], 1, x.shape[-1]), jnp.float32)
  vectors = [zeros if v is None else v for v in (shift, scale)]
  interpret = sharding.platform() != "tpu"
  run = functools.partial(kernels.modulate, eps=eps, interpret=interpret)
  tokens, vector = ["batch", "sequence", None], ["batch", None, None]
  names = [tokens, vector, vector]
  return context.each(run, [x, *vectors], names, tokens)


def _scale(module: nn.Module, width: int) -> jax.Array:
  init = sharding.boxed(nn.initializers.ones_init(), (module.axis,))
  return module.param("scale", init, (width,))
