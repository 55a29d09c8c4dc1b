"""Classifier-free guidance (arXiv:2207.12598) over predictions of x0.

`guide` makes the denoiser that a sampler wants out of a network that is run on
two batches in one: the null branch first, the conditional one after it.
Guidance on x0 equals guidance on any output of `objectives`, each being linear
in x0 at a given x_t. Its rescale does not: the spread here is that of x0, not
of a network's raw output.
"""

import jax.numpy as jnp
import numpy as np

# Below the standard deviation of any latents; keeps constant ones finite.
_TINY = 1e-12


def guide(network, scale, rescale=0.0, interval=(0.0, 1.0)):
  """Return a denoiser that guides a network.

  A doubled batch costs a doubled network: at scale 1 the conditional
  prediction is returned, but a caller who knows that beforehand should hand
  the sampler the network on the conditional batch in place of this.

  Args:
    network: (x2 [2B, f, h, w, c], row) -> x0 [2B, f, h, w, c]; the first B
      see the null (or negative) text, the last B the prompts.
    scale: guidance scale, float, scalar array or a function of the row, such
      as `dynamic` makes; 0 is unconditional, 1 is conditional.
    rescale: see `combine`.
    interval: (t_low, t_high), both included; at other times of the table the
      scale is 1 (arXiv:2404.07724, there in sigma).

  Returns:
    denoise(x [B, f, h, w, c], row) -> x0, float32 [B, f, h, w, c].
  """
  t_low, t_high = interval
  if not 0 <= t_low <= t_high <= 1:
    raise ValueError(
      f"interval must be 0 <= t_low <= t_high <= 1, got {interval}"
    )

  def denoise(x, row):
    both = network(jnp.concatenate([x, x]), row)  # [2B, f, h, w, c]
    uncond, cond = jnp.split(both, 2)
    inside = (row.t >= t_low) & (row.t <= t_high)
    now = scale(row) if callable(scale) else scale
    return combine(cond, uncond, jnp.where(inside, now, 1.0), rescale)

  return denoise


def dynamic(scale, steps, num_timesteps=1000):
  """Return CogVideoX's dynamic guidance, a scale that `guide` asks each row.

    1 + scale (1 - cos(pi ((steps - n) / steps)^5)) / 2

  as diffusers' pipelines write it: n is the value of the training timestep,
  not the number of the step. Above n = 2 steps the power is of many turns, and
  the scale jumps between 1 and 1 + scale; it rises smoothly in the last few
  steps alone. The power is taken in float64, for float32 has no such cosine.

  Args:
    scale: largest guidance added to 1, float or scalar array.
    steps: steps of the run that are taken.
    num_timesteps: of the discrete schedule, whose row t is n / num_timesteps.

  Returns:
    at(row) -> scale, float32.
  """
  if steps < 1:
    raise ValueError(f"steps must be at least 1, got {steps}")
  turns = ((steps - np.arange(num_timesteps)) / steps) ** 5
  share = jnp.asarray((1 - np.cos(np.pi * turns)) / 2, jnp.float32)

  def at(row):
    n = jnp.round(row.t * num_timesteps).astype(jnp.int32)
    return 1 + scale * share[jnp.clip(n, 0, num_timesteps - 1)]

  return at


def combine(cond_x0, uncond_x0, scale, rescale=0.0):
  """Extrapolate from the unconditional through the conditional prediction.

  A large scale also widens the values' spread. `rescale` mixes in, as its
  share phi, the guided prediction brought back to the standard deviation of
  the conditional one, each over all axes of a sample (arXiv:2305.08891,
  section 3.4).

  Args:
    cond_x0: prediction given the prompt [B, f, h, w, c].
    uncond_x0: prediction given the null text [B, f, h, w, c].
    scale: guidance scale, float or scalar array.
    rescale: phi, a float in [0, 1]; 0 is none.

  Returns:
    x0, float32 [B, f, h, w, c].
  """
  if not 0 <= rescale <= 1:
    raise ValueError(f"rescale must be in [0, 1], got {rescale}")
  cond = _float32(cond_x0)
  # In this form a scale of 1 is the conditional prediction to the bit.
  guided = cond + (scale - 1) * (cond - _float32(uncond_x0))
  if rescale == 0:
    return guided
  ratio = _std(cond) / jnp.maximum(_std(guided), _TINY)
  return guided * (1 + rescale * (ratio - 1))


def _float32(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _std(x):
  return jnp.std(x, axis=tuple(range(1, x.ndim)), keepdims=True)
