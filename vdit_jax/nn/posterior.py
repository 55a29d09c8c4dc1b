"""The diagonal Gaussian that an autoencoder's encoder gives."""

import jax
import jax.numpy as jnp

Moments = tuple[jax.Array, jax.Array]  # mean and log-variance


def split(moments: jax.Array) -> Moments:
  """Split an encoder's output [..., 2c] into mean and log-variance, clipped."""
  mean, logvar = jnp.split(moments, 2, axis=-1)
  return mean, jnp.clip(logvar, -30.0, 20.0)


def sample(mean: jax.Array, logvar: jax.Array, key: jax.Array) -> jax.Array:
  """Sample the posterior [B, ...] with a key, or B keys."""
  keys = key if key.ndim else jax.random.split(key, mean.shape[0])

  def draw(key: jax.Array) -> jax.Array:
    return jax.random.normal(key, mean.shape[1:], mean.dtype)

  return mean + jnp.exp(0.5 * logvar) * jax.vmap(draw)(keys)


def kl(mean: jax.Array, logvar: jax.Array) -> jax.Array:
  """KL divergence of the posterior from N(0, 1), per latent, in nats."""
  return 0.5 * (mean**2 + jnp.exp(logvar) - 1.0 - logvar)
