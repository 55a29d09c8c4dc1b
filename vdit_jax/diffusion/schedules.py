"""Noise schedules: how much data and how much noise at a diffusion time.

`x_t = alpha x0 + sigma eps`, with t float32 in [0, 1], 0 data and 1 noise.
Training asks `alpha_sigma` for the level at random times; a sampler walks down
the rows of a `sampling_table`.

  rectified_flow  alpha = 1 - t, sigma = t (arXiv:2209.03003, 2210.02747).
  linear          variance preserving, a table of N training timesteps whose
                  betas are equally spaced (arXiv:2006.11239); t = n / N.
  scaled_linear   the same, with the square roots of the betas equally spaced
                  (arXiv:2112.10752).
  cosine          variance preserving and continuous (arXiv:2102.09672, eq. 17).

Variance preserving means alpha^2 + sigma^2 = 1. The signal-to-noise ratio is
SNR = alpha^2 / sigma^2; `abar` is alpha^2 of a variance-preserving schedule.
"""

import dataclasses
import functools
import math

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array

DISCRETE_KINDS = ("linear", "scaled_linear")
KINDS = ("rectified_flow", *DISCRETE_KINDS, "cosine")

# Offset s of arXiv:2102.09672, eq. 17: keeps the first noise levels above the
# size of a pixel's quantisation step.
_COSINE_OFFSET = 0.008


@dataclasses.dataclass(frozen=True)
class Schedule:
  """A noise schedule.

  Attributes:
    kind: one of `KINDS`.
    num_timesteps: N, the training timesteps n = 0..N-1 of the discrete kinds.
      A cosine schedule without zero terminal SNR stops at t = (N - 1) / N.
    beta_start, beta_end: first and last beta of the discrete kinds.
    zero_terminal_snr: move the last level to pure noise (arXiv:2305.08891,
      algorithm 1). Rectified flow ends in pure noise by itself.
    snr_shift: divides the SNR at every t, before the move to zero terminal
      SNR; 1 is none (CogVideoX, arXiv:2408.06072).
  """

  kind: str = "rectified_flow"
  num_timesteps: int = 1000
  beta_start: float = 0.00085
  beta_end: float = 0.012
  zero_terminal_snr: bool = False
  snr_shift: float = 1.0

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(f"kind must be one of {KINDS}, got {self.kind!r}")
    if self.num_timesteps < 2:
      raise ValueError(
        f"num_timesteps must be at least 2, got {self.num_timesteps}"
      )
    if not 0 < self.beta_start <= self.beta_end < 1:
      raise ValueError(
        "beta_start and beta_end must be 0 < beta_start <= beta_end < 1, got "
        f"{self.beta_start} and {self.beta_end}"
      )
    if self.snr_shift <= 0:
      raise ValueError(f"snr_shift must be positive, got {self.snr_shift}")
    if self.kind == "rectified_flow" and self.snr_shift != 1:
      raise ValueError(
        f"snr_shift must be 1 for rectified_flow, got {self.snr_shift}; shift "
        "the times instead: schedules.shift(t, snr_shift ** 0.5) is the same"
      )


@flax.struct.dataclass
class Table:
  """Noise levels of a sampling run, float32 [steps + 1]; a row has scalars.

  Attributes:
    alpha: factor of the data.
    sigma: factor of the noise.
    t: time that the network is shown.
  """

  alpha: Array
  sigma: Array
  t: Array


def alpha_sigma(schedule, t):
  """Return the factors of data and noise at a time.

  Args:
    schedule: a `Schedule`.
    t: diffusion time in [0, 1], any shape; the discrete kinds look up the
      training timestep round(N t), at most N - 1.

  Returns:
    (alpha, sigma), float32 of t's shape.
  """
  t = jnp.asarray(t, jnp.float32)
  if schedule.kind == "rectified_flow":
    return 1 - t, t
  if schedule.kind == "cosine":
    return _cosine(schedule, t)
  last = schedule.num_timesteps - 1
  n = jnp.round(t * schedule.num_timesteps).astype(jnp.int32)
  n = jnp.clip(n, 0, last)
  alpha, sigma = _discrete(schedule)
  return jnp.asarray(alpha)[n], jnp.asarray(sigma)[n]


def has_zero_terminal_snr(schedule):
  """Tell whether the last level is pure noise (alpha = 0)."""
  return schedule.kind == "rectified_flow" or schedule.zero_terminal_snr


def expand(v, x):
  """Add trailing axes of size 1 to v so that it broadcasts against x.

  Args:
    v: scalar, [B] or [B, f].
    x: [B, f, h, w, c], or any array that v's axes are the first of.

  Returns:
    v with x.ndim axes; a v of another batch or frame count is refused.
  """
  v = jnp.asarray(v)
  leading = x.shape[: v.ndim]
  if v.ndim > x.ndim or any(
    a not in (1, b) for a, b in zip(v.shape, leading, strict=True)
  ):
    raise ValueError(
      f"v must be a scalar, [B] or [B, f] of x {x.shape}, got {v.shape}"
    )
  return v.reshape(v.shape + (1,) * (x.ndim - v.ndim))


def shift(t, factor):
  """Move times towards noise: s t / (1 + (s - 1) t), 0 and 1 stay.

  Divides the square root of a rectified flow's SNR by `factor`
  (arXiv:2403.03206, eq. 23).

  Args:
    t: time in [0, 1], any shape.
    factor: s > 0; 1 is none, above 1 spends more steps near noise.
  """
  return factor * t / (1 + (factor - 1) * t)


def resolution_shift(
  tokens_per_frame,
  latent_frames,
  *,
  low_tokens=256,
  low_shift=1.0,
  high_tokens=4096,
  high_shift=3.0,
):
  """Return the factor of `shift` for a clip's size, as a float.

  A larger clip repeats its content more often, so that the same sigma hides
  less of it. The factor is a line in the tokens of a frame, through
  (low_tokens, low_shift) and (high_tokens, high_shift) and on beyond them,
  times the square root of the latent frames (Open-Sora 2.0, arXiv:2503.09642).
  """
  if tokens_per_frame < 1 or latent_frames < 1:
    raise ValueError(
      "tokens_per_frame and latent_frames must be at least 1, got "
      f"{tokens_per_frame} and {latent_frames}"
    )
  slope = (high_shift - low_shift) / (high_tokens - low_tokens)
  line = low_shift + slope * (tokens_per_frame - low_tokens)
  return line * math.sqrt(latent_frames)


def sampling_table(schedule, steps, shift=1.0, t_start=1.0):
  """Return the noise levels of a sampling run, from noise to data.

  Row i is the level before step i; the last row is data. Continuous kinds take
  equally spaced times. Discrete kinds take "trailing" training timesteps, which
  begin at the last one (arXiv:2305.08891, section 3.3).

  Args:
    schedule: a `Schedule`.
    steps: denoising steps, at least 1.
    shift: factor of `shift`, applied to the spaced times.
    t_start: time of the first row before the shift, in (0, 1]; below 1 it is
      the strength of an edit, whose clip is noised to the first row.

  Returns:
    `Table` of [steps + 1]. Refused when two rows fall on the same level.
  """
  if steps < 1:
    raise ValueError(f"steps must be at least 1, got {steps}")
  if not 0 < t_start <= 1:
    raise ValueError(f"t_start must be in (0, 1], got {t_start}")
  if shift <= 0:
    raise ValueError(f"shift must be positive, got {shift}; 1 is none")
  t = _sampling_times(schedule, steps, shift, t_start)
  # The rows are constants of the program also when this is called in a trace.
  with jax.ensure_compile_time_eval():
    levels = alpha_sigma(schedule, t)
  # float32 once, at the end: the times were spaced in float64.
  alpha = np.append(np.asarray(levels[0]), np.float32(1))
  sigma = np.append(np.asarray(levels[1]), np.float32(0))
  if not np.all(np.diff(sigma / (alpha + sigma)) < 0):
    raise ValueError(
      f"steps={steps} with shift={shift} and t_start={t_start} puts two rows "
      f"on one level of {schedule.kind}; take fewer steps or a smaller shift"
    )
  t = np.append(t, 0).astype(np.float32)
  return Table(jnp.asarray(alpha), jnp.asarray(sigma), jnp.asarray(t))


def _sampling_times(schedule, steps, factor, t_start):
  """Space the times of all rows but the last, float64 [steps]."""
  N = schedule.num_timesteps
  i = np.arange(steps)
  if schedule.kind in DISCRETE_KINDS:
    start = N * t_start
    # In units of timesteps, so that without a shift the halves that round to
    # even are those of the published spacing.
    position = start - i * (start / steps)
    position = factor * position / (1 + (factor - 1) * position / N)
    return np.clip(np.round(position) - 1, 0, None) / N
  t_end = _last_time(schedule)
  t = min(t_start, t_end) * (1 - i / steps)
  return np.minimum(shift(t, factor), t_end)


def _last_time(schedule):
  """Return the time of the noisiest level of a continuous schedule."""
  if has_zero_terminal_snr(schedule):
    return 1.0
  return 1 - 1 / schedule.num_timesteps


def _cosine(schedule, t):
  """Evaluate cos(a(t)) / cos(a(0)), a(t) = pi/2 (t + s) / (1 + s).

  The sine of the complement is exactly 0 at t = 1, and
  cos^2 a(0) - cos^2 a = sin(a - a(0)) sin(a + a(0)) loses no digits near t = 0.
  """
  t = jnp.clip(t, 0, _last_time(schedule))
  unit = math.pi / 2 / (1 + _COSINE_OFFSET)
  first = unit * _COSINE_OFFSET
  alpha = jnp.sin(unit * (1 - t)) / math.cos(first)
  sigma = jnp.sqrt(jnp.sin(unit * t) * jnp.sin(unit * t + 2 * first))
  return _shift_snr(alpha, sigma / math.cos(first), schedule.snr_shift, jnp)


def _shift_snr(alpha, sigma, factor, xp):
  """Divide the SNR by factor: abar / (s + (1 - s) abar), and 1 minus it."""
  norm = xp.sqrt(alpha**2 + factor * sigma**2)
  return alpha / norm, math.sqrt(factor) * sigma / norm


@functools.lru_cache(maxsize=64)
def _discrete(schedule):
  """Compute the levels of all training timesteps, two float32 [N].

  In numpy float64: a product of a thousand factors near 1 is not to be had in
  float32.
  """
  ends = np.array([schedule.beta_start, schedule.beta_end])
  power = 2 if schedule.kind == "scaled_linear" else 1
  betas = np.linspace(*ends ** (1 / power), schedule.num_timesteps) ** power
  abar = np.cumprod(1 - betas)
  alpha, _ = _shift_snr(
    np.sqrt(abar), np.sqrt(1 - abar), schedule.snr_shift, np
  )
  if schedule.zero_terminal_snr:
    first, last = alpha[0], alpha[-1]
    alpha = (alpha - last) * (first / (first - last))
  sigma = np.sqrt(1 - alpha**2)
  return alpha.astype(np.float32), sigma.astype(np.float32)
