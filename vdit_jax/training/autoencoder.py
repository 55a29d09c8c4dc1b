"""Training loss of the autoencoder: L1, L2 and KL, and room for more terms.

L1 alone is least where a pixel is told its median, so where most of a clip is
background it stays at background until a stroke is more likely than not. A
share of L2, least at the mean, rewards every step on the way.

A perceptual or an adversarial term joins as an entry of `extra`: a weight and
a function of (reconstruction, video). A discriminator's own update would be a
second step beside this one, on a state of its own.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdit_jax import encoding, types
from vdit_jax.nn import posterior
from vdit_jax.training import state as states

Term = Callable[[jax.Array, jax.Array], jax.Array]  # -> [B]


def make_loss(
  module: nn.Module,
  *,
  l2_weight: float,
  kl_weight: float,
  extra: Mapping[str, tuple[float, Term]] | None = None,
) -> states.Loss:
  """Make the loss; nothing is frozen.

  Args:
    module: the autoencoder.
    l2_weight: weight of the mean squared error of pixels in [-1, 1], beside
      their mean absolute error, whose weight is 1.
    kl_weight: weight of the KL divergence, nats a latent.
    extra: further terms by name: (weight, function of reconstruction and
      video, both [B, F, H, W, 3], to a loss a clip [B]).
  """

  def draw(batch: types.Batch, key: jax.Array) -> jax.Array:
    return jax.random.split(key, batch.weight.shape[0])

  def terms(params: Any, frozen: Any, batch: types.Batch, keys: jax.Array):
    del frozen
    video = encoding.to_float(batch.video)
    output, (mean, logvar) = module.apply({"params": params}, video, keys)
    axes = tuple(range(1, video.ndim))
    weighted = {
      "l1": (1.0, jnp.mean(jnp.abs(output - video), axes)),
      "l2": (l2_weight, jnp.mean(jnp.square(output - video), axes)),
      "kl": (kl_weight, jnp.mean(posterior.kl(mean, logvar), axes)),
    }
    for name, (weight, term) in (extra or {}).items():
      weighted[name] = weight, term(output, video)
    total = sum(weight * value for weight, value in weighted.values())
    return {"loss": total} | {k: value for k, (_, value) in weighted.items()}

  return states.Loss(draw, terms)


def measure_latents(
  module: nn.Module, params: Any, batches: Any
) -> tuple[jax.Array, jax.Array]:
  """Measure mean and standard deviation of each channel of the latents.

  Over samples of the posterior: its variance counts beside the means'.

  Args:
    module: the autoencoder.
    params: its weights; the statistics that they hold are undone first.
    batches: of clips, an iterable of `types.Batch`.

  Returns:
    (mean, std), float32 [c] each, to be stored as `latent_mean`, `latent_std`.
  """
  raw = params | {
    "latent_mean": jnp.zeros_like(params["latent_mean"]),
    "latent_std": jnp.ones_like(params["latent_std"]),
  }

  @jax.jit
  def moments(params, batch):
    video = encoding.to_float(batch.video)
    mean, logvar = module.apply({"params": params}, video, method="moments")
    weight = jnp.broadcast_to(
      batch.weight[:, None, None, None, None], mean.shape
    )
    axes = tuple(range(mean.ndim - 1))
    power = mean**2 + jnp.exp(logvar)
    return (
      jnp.sum(weight, axes),
      jnp.sum(weight * mean, axes),
      jnp.sum(weight * power, axes),
    )

  total = None
  for batch in batches:
    sums = moments(raw, batch)
    total = sums if total is None else jax.tree.map(jnp.add, total, sums)
  if total is None:
    raise ValueError("batches must hold clips to measure, got none")
  count, first, second = total
  mean = first / count
  return mean, jnp.sqrt(jnp.maximum(second / count - mean**2, 1e-12))
