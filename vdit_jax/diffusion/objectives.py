"""Objectives: what a denoiser's output means, and what training asks of it.

Training noises the latents (`sample_t`, `add_noise`) and compares the output
with `target`; sampling turns the output into x0 by `to_x0`, the one place where
an objective matters to a sampler. With x_t = alpha x0 + sigma eps:

  flow  eps - x0                (arXiv:2209.03003; on any schedule)
  v     alpha eps - sigma x0    (arXiv:2202.00512)
  eps   eps                     (arXiv:2006.11239)
  x0    x0

All arithmetic is float32. `alpha`, `sigma` and weights are scalars, [B] or
[B, f]: every latent frame may have a noise level of its own.
"""

import math
import statistics
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from vdit_jax.diffusion import schedules

Array = jax.Array

OBJECTIVES = ("flow", "v", "eps", "x0")
DISTRIBUTIONS = ("uniform", "logit_normal")

# Below every squared alpha or sigma of a schedule, above float32's underflow.
_TINY = 1e-30


def check(objective: str, schedule: schedules.Schedule) -> None:
  """Refuse an unknown objective, or one that is singular on the schedule."""
  _known(objective)
  if objective == "eps" and schedules.has_zero_terminal_snr(schedule):
    raise ValueError(
      f"objective 'eps' has no x0 where alpha = 0, and {schedule} ends there; "
      "take objective 'v' or 'flow', or a variance-preserving schedule with "
      "zero_terminal_snr=False"
    )


def add_noise(x0: Array, eps: Array, alpha: Array, sigma: Array) -> Array:
  """Return x_t = alpha x0 + sigma eps, float32.

  Args:
    x0: clean latents [B, f, h, w, c].
    eps: standard normal noise [B, f, h, w, c].
    alpha, sigma: noise level, scalar, [B] or [B, f].
  """
  x0, eps, alpha, sigma = _align(x0, eps, alpha, sigma)
  return alpha * x0 + sigma * eps


def target(
  objective: str, x0: Array, eps: Array, alpha: Array, sigma: Array
) -> Array:
  """Return what the network should output, float32 [B, f, h, w, c].

  Args:
    objective: one of `OBJECTIVES`.
    x0: clean latents [B, f, h, w, c].
    eps: the noise in x_t [B, f, h, w, c].
    alpha, sigma: noise level, scalar, [B] or [B, f].
  """
  _known(objective)
  x0, eps, alpha, sigma = _align(x0, eps, alpha, sigma)
  if objective == "flow":
    return eps - x0
  if objective == "v":
    return alpha * eps - sigma * x0
  return eps if objective == "eps" else x0


def to_x0(
  objective: str, output: Array, x_t: Array, alpha: Array, sigma: Array
) -> Array:
  """Turn a network's output into the clean latents that it implies.

  Each line solves its objective and x_t = alpha x0 + sigma eps for x0. Only
  "eps" is singular, at alpha = 0, which `check` refuses.

  Args:
    objective: one of `OBJECTIVES`.
    output: the network's output [B, f, h, w, c].
    x_t: what the network was given [B, f, h, w, c].
    alpha, sigma: noise level, scalar, [B] or [B, f].

  Returns:
    x0, float32 [B, f, h, w, c].
  """
  _known(objective)
  output, x_t, alpha, sigma = _align(output, x_t, alpha, sigma)
  if objective == "flow":
    return (x_t - sigma * output) / (alpha + sigma)
  if objective == "v":
    return (alpha * x_t - sigma * output) / (alpha**2 + sigma**2)
  if objective == "eps":
    return (x_t - sigma * output) / alpha
  return output


def to_eps(x_t: Array, x0: Array, alpha: Array, sigma: Array) -> Array:
  """Return the noise (x_t - alpha x0) / sigma, and 0 where sigma = 0.

  Args:
    x_t: noised latents [B, f, h, w, c].
    x0: clean latents [B, f, h, w, c].
    alpha, sigma: noise level, scalar, [B] or [B, f].
  """
  x_t, x0, alpha, sigma = _align(x_t, x0, alpha, sigma)
  noisy = sigma > 0
  eps = (x_t - alpha * x0) / jnp.where(noisy, sigma, 1)
  return jnp.where(noisy, eps, 0)


def sample_t(
  key: Array,
  shape: Sequence[int],
  *,
  distribution: str = "uniform",
  mean: float = 0.0,
  std: float = 1.0,
  shift: float = 1.0,
  strata: int | None = None,
  interval: tuple[float, float] = (0.0, 1.0),
) -> Array:
  """Draw training times, stratified over the batch.

  The unit interval is cut into B parts; each sample draws from a part of its
  own, in a random order that is fresh for each frame (a Latin hypercube). Each
  time alone is distributed as asked for, whatever its place in the batch, and
  the batch's mean loss varies less than over independent times. "logit_normal"
  (arXiv:2403.03206, eq. 19) maps the parts through its inverse distribution
  function. For a discrete schedule, `schedules.snap` the times.

  Args:
    key: a PRNG key.
    shape: (B,), or (B, f) for a time per latent frame.
    distribution: one of `DISTRIBUTIONS`.
    mean, std: of the logit of t; "logit_normal" alone.
    shift: factor of `schedules.shift`.
    strata: parts that the interval is cut into, a divisor of B; None is B.
      The number of data-parallel ranks gives the explicit uniform sampling of
      arXiv:2408.06072, 1 independent times.
    interval: (t_low, t_high) that the distribution is cut to.

  Returns:
    t in the interval, float32 of that shape.
  """
  if distribution not in DISTRIBUTIONS:
    raise ValueError(
      f"distribution must be one of {DISTRIBUTIONS}, got {distribution!r}"
    )
  if std <= 0:
    raise ValueError(f"std must be positive, got {std}")
  if len(shape) not in (1, 2):
    raise ValueError(f"shape must be (B,) or (B, f), got {shape}")
  low, high = interval
  if not 0 <= low < high <= 1:
    raise ValueError(
      f"t_low and t_high must be 0 <= t_low < t_high <= 1, got {interval}"
    )
  normal = distribution == "logit_normal"
  t = _stratified(key, shape, shape[0] if strata is None else strata)
  cut = (low, high) != (0, 1)
  if cut:  # the part of [0, 1] that falls into it
    first, last = (
      _share(schedules.shift(at, 1 / shift), normal, mean, std)
      for at in interval
    )
    t = first + (last - first) * t
  if normal:
    t = jax.nn.sigmoid(mean + std * jax.scipy.special.ndtri(t))
  t = schedules.shift(t, shift)
  return jnp.clip(t, low, high) if cut else t


def _share(t: float, normal: bool, mean: float, std: float) -> float:
  """Share of the times that are drawn below t, before the shift."""
  if not normal or t in (0, 1):
    return t
  return statistics.NormalDist(mean, std).cdf(math.log(t / (1 - t)))


def loss_weight(
  objective: str, alpha: Array, sigma: Array, min_snr_gamma: float | None
) -> Array:
  """Return the min-SNR weight of an output's squared error, float32.

  arXiv:2303.09556 weighs the squared error of x0 by min(SNR, gamma). An error
  of the output is an error of x0 times its factor in `to_x0`, so that the same
  loss on the output has the weight

    x0    min(SNR, gamma)
    eps   min(SNR, gamma) / SNR
    v     min(SNR, gamma) sigma^2 / (alpha^2 + sigma^2)^2, which is
          min(SNR, gamma) / (SNR + 1) where variance is preserved
    flow  min(SNR, gamma) sigma^2 / (alpha + sigma)^2, which is
          min(alpha^2, gamma sigma^2) on rectified flow

  written here so that alpha = 0 and sigma = 0 take their finite limits.

  Args:
    objective: one of `OBJECTIVES`.
    alpha, sigma: noise level, any shape.
    min_snr_gamma: gamma, 5 in the paper; None gives weight 1.
  """
  _known(objective)
  alpha = jnp.asarray(alpha, jnp.float32)
  sigma = jnp.asarray(sigma, jnp.float32)
  if min_snr_gamma is None:
    return jnp.ones_like(alpha)
  signal, noise = alpha**2, sigma**2
  if objective == "x0":
    return jnp.minimum(signal / jnp.maximum(noise, _TINY), min_snr_gamma)
  if objective == "eps":
    return jnp.minimum(1, min_snr_gamma * noise / jnp.maximum(signal, _TINY))
  bounded = jnp.minimum(signal, min_snr_gamma * noise)
  if objective == "v":
    return bounded / (signal + noise) ** 2
  return bounded / (alpha + sigma) ** 2


def loss(
  objective: str,
  output: Array,
  x0: Array,
  eps: Array,
  alpha: Array,
  sigma: Array,
  weight: Array | float = 1.0,
  counted: Array | None = None,
) -> Array:
  """Return each sample's weighted mean squared error, float32 [B].

  Args:
    objective: one of `OBJECTIVES`.
    output: the network's output [B, f, h, w, c].
    x0: clean latents [B, f, h, w, c].
    eps: the noise in x_t [B, f, h, w, c].
    alpha, sigma: noise level, scalar, [B] or [B, f].
    weight: of `loss_weight`, scalar, [B] or [B, f].
    counted: frames that count, [B, f], or latents [B, f, h, w]; None is all.
      A sample without any has loss 0.
  """
  aim = target(objective, x0, eps, alpha, sigma)
  error = jnp.square(output.astype(jnp.float32) - aim)
  axes = 2 if counted is None else counted.ndim
  error = error.mean(axis=tuple(range(axes, error.ndim)))  # [B, f, ...]
  error = error * schedules.expand(weight, error)
  if counted is None:
    return error.mean(axis=1)
  counts, rest = counted.astype(jnp.float32), tuple(range(1, axes))
  return (error * counts).sum(rest) / jnp.maximum(counts.sum(rest), 1)


def _stratified(key, shape, strata):
  """Draw uniform times of `shape`, of every sample's part in random order."""
  B = shape[0]
  if strata < 1 or B % strata:
    raise ValueError(
      f"strata must divide the batch of {B}, got {strata}; None is {B}"
    )
  order_key, place_key = jax.random.split(key)
  part = jnp.arange(B) // (B // strata)
  part = jnp.broadcast_to(part.reshape((-1,) + (1,) * (len(shape) - 1)), shape)
  part = jax.random.permutation(order_key, part, independent=True)
  place = jax.random.uniform(place_key, shape, jnp.float32)
  return (part + place) / strata


def _known(objective):
  if objective not in OBJECTIVES:
    raise ValueError(
      f"objective must be one of {OBJECTIVES}, got {objective!r}"
    )


def _align(a, b, alpha, sigma):
  """Cast to float32 and give the noise level the arrays' axes."""
  a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  alpha = schedules.expand(jnp.asarray(alpha, jnp.float32), a)
  return a, b, alpha, schedules.expand(jnp.asarray(sigma, jnp.float32), a)
