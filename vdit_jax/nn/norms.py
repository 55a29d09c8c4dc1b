"""Normalisations over the last axis, computed in float32."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdit_jax import sharding


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
    ones = nn.initializers.ones_init()
    init = sharding.boxed(ones, (self.axis,))
    scale = self.param("scale", init, (x.shape[-1],))
    x32 = x.astype(jnp.float32)  # a bfloat16 mean of squares loses digits
    power = jnp.mean(x32 * x32, axis=-1, keepdims=True)
    return (x32 * jax.lax.rsqrt(power + self.eps) * scale).astype(x.dtype)


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


def layer_norm(x: jax.Array, eps: float) -> jax.Array:
  """Normalise [..., D] to zero mean and unit variance in float32."""
  x = x.astype(jnp.float32)
  x = x - jnp.mean(x, axis=-1, keepdims=True)
  variance = jnp.mean(x * x, axis=-1, keepdims=True)
  return x * jax.lax.rsqrt(variance + eps)
