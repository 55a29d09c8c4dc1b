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

A released sampler takes its rows from a `Spacing`.
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
DISCRETE_SPACINGS = ("trailing", "leading", "linspace")
FLOW_SPACINGS = ("flow_euler", "flow_unipc")
SPACINGS = (*DISCRETE_SPACINGS, *FLOW_SPACINGS)

# How far below pure noise the rows of "flow_unipc" begin.
_UNIPC_MARGIN = 1e-6
# alpha of the noisiest level of multistep spacings: its square in float16 is
# the smallest number above 0.
_MULTISTEP_ALPHA = 2.0**-12

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
      SNR; 1 is none (arXiv:2408.06072).
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


@dataclasses.dataclass(frozen=True)
class Spacing:
  """Which levels a released sampler visits, and where it steps.

  Of training timesteps, "trailing", "leading" and "linspace" (arXiv:2305.08891,
  table 2), for the discrete kinds of schedule without a shift. The convention
  of diffusers' DDIM, which others of theirs keep: a step from timestep n ends
  at n - N // steps, whatever the next row is. The two differ where steps does
  not divide N: 7 of 1000 end in 142 -> 0, not at data.

  With `multistep` they are those of diffusers' multistep schedulers, such as
  UniPC's: "leading" and "linspace" space steps + 1 timesteps and leave out the
  cleanest, each step ends at the next row, and zero terminal SNR stops just
  short of pure noise, where log alpha is finite.

  Of a rectified flow, whose rows end at data, with the shift s:

    flow_euler  diffusers' FlowMatchEulerDiscreteScheduler. It shifts twice: the
                ends of the training levels 1/N..1, and what is spaced between
                them, so that the last level is near s^2/N and not s/N.
    flow_unipc  its UniPCMultistepScheduler of flow sigmas. Begins at 1 - 1e-6,
                where log alpha is finite, and shows the network whole
                timesteps, cut off: up to 1/N less than the level's time.

  Attributes:
    kind: one of `SPACINGS`.
    offset: added to the timesteps of "leading"; the other kinds have none.
    clean_end: a step to below timestep 0 ends at data; else at timestep 0.
      Multistep, that is the last step.
    multistep: see above; of the discrete kinds.
  """

  kind: str = "trailing"
  offset: int = 0
  clean_end: bool = True
  multistep: bool = False

  def __post_init__(self):
    if self.kind not in SPACINGS:
      raise ValueError(f"kind must be one of {SPACINGS}, got {self.kind!r}")
    if self.offset < 0:
      raise ValueError(f"offset must be at least 0, got {self.offset}")


class Table(flax.struct.PyTreeNode):
  """Noise levels of a sampling run, float32 [steps + 1]; a row has scalars.

  Attributes:
    alpha: factor of the data.
    sigma: factor of the noise.
    t: time that the network is shown.
    end: the level at which the step from each row ends, where that is not
      always the next row (see `Spacing`); its t is below 0 where the step goes
      past training timestep 0. None: the next row.
  """

  alpha: Array
  sigma: Array
  t: Array
  end: "Table | None" = None


def alpha_sigma(schedule: Schedule, t: Array | float) -> tuple[Array, Array]:
  """Return the factors of data and noise at a time.

  Args:
    schedule: a `Schedule`.
    t: diffusion time in [0, 1], any shape; the discrete kinds look up the
      training timestep round(N t), at most N - 1.

  Returns:
    (alpha, sigma), float32 of t's shape.
  """
  return _alpha_sigma(schedule, t, jnp)


def snap(schedule: Schedule, t: Array) -> Array:
  """Return the time of the training timestep that a drawn time falls in.

  For the discrete kinds n / N with n = floor(N t), so that uniform times make
  every n as likely (the nearest n would give the first half a share), and a
  network is trained on the times that a `sampling_table` shows it. For the
  continuous kinds t itself.

  Args:
    schedule: a `Schedule`.
    t: drawn time in [0, 1], any shape.
  """
  t = jnp.asarray(t, jnp.float32)
  if schedule.kind not in DISCRETE_KINDS:
    return t
  N = schedule.num_timesteps
  n = jnp.floor(t * N).astype(jnp.int32)
  # Looked up: a compiler may divide by N through its rounded reciprocal.
  times = jnp.asarray(np.arange(N) / N, jnp.float32)
  return times[jnp.clip(n, 0, N - 1)]


def has_zero_terminal_snr(schedule: Schedule) -> bool:
  """Tell whether the last level is pure noise (alpha = 0)."""
  return schedule.kind == "rectified_flow" or schedule.zero_terminal_snr


def expand(v: Array, x: Array) -> Array:
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


def shift(t: Array, factor: float) -> Array:
  """Move times towards noise: s t / (1 + (s - 1) t), 0 and 1 stay.

  Divides the square root of a rectified flow's SNR by `factor`
  (arXiv:2403.03206, eq. 23).

  Args:
    t: time in [0, 1], any shape.
    factor: s > 0; 1 is none, above 1 spends more steps near noise.
  """
  return factor * t / (1 + (factor - 1) * t)


def sampling_table(
  schedule: Schedule,
  steps: int,
  shift: float = 1.0,
  t_start: float = 1.0,
  spacing: Spacing | None = None,
) -> Table:
  """Return the noise levels of a sampling run, from noise to data.

  Row i is the level before step i; the last row is data. Continuous kinds take
  equally spaced times. Discrete kinds take "trailing" training timesteps, which
  begin at the last one (arXiv:2305.08891, section 3.3), or those of a released
  sampler's spacing, whose last row is where its last step ends.

  Args:
    schedule: a `Schedule`.
    steps: denoising steps, at least 1.
    shift: factor of `shift`, applied to the spaced times, or as a flow's
      spacing has it.
    t_start: time of the first row before the shift, in (0, 1]; below 1 it is
      the strength of an edit, whose clip is noised to the first row. With a
      spacing it is the share of the steps that is left, int(steps * t_start)
      of them, at the levels that they have in the whole run.
    spacing: a `Spacing` of this kind of schedule; None is ours.

  Returns:
    `Table` of [steps + 1]. Refused when two rows fall on the same level.
  """
  if steps < 1:
    raise ValueError(f"steps must be at least 1, got {steps}")
  if not 0 < t_start <= 1:
    raise ValueError(f"t_start must be in (0, 1], got {t_start}")
  if shift <= 0:
    raise ValueError(f"shift must be positive, got {shift}; 1 is none")
  if spacing is not None:
    return _spaced_table(schedule, steps, shift, t_start, spacing)
  t = _sampling_times(schedule, steps, shift, t_start)
  # The rows are constants of the program also when this is called in a trace.
  alpha, sigma = _alpha_sigma(schedule, t, np)
  alpha, sigma = (
    np.append(alpha, np.float32(1)),
    np.append(sigma, np.float32(0)),
  )
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


def _spaced_table(schedule, steps, shift, t_start, spacing):
  """Look up the rows of a released spacing and the ends of their steps."""
  kept = int(steps * t_start)
  if not kept:
    raise ValueError(
      f"t_start={t_start} leaves none of {steps} steps; take at least "
      f"{1 / steps}"
    )
  if spacing.kind in FLOW_SPACINGS:
    return _flow_table(schedule, steps, shift, kept, spacing.kind)
  if schedule.kind not in DISCRETE_KINDS or shift != 1:
    raise ValueError(
      f"spacing {spacing.kind} needs a kind of {DISCRETE_KINDS} and shift 1, "
      f"got {schedule.kind} and {shift}; spacing=None takes any"
    )
  n = _spaced_timesteps(schedule.num_timesteps, steps, spacing)
  n = n[steps - kept :]
  if spacing.multistep:
    return _multistep_table(schedule, n, spacing)
  ends = n - schedule.num_timesteps // steps
  rows = np.append(n, ends[-1])  # [steps + 1]
  table = _levels_at(schedule, rows, spacing)
  t = np.maximum(rows, 0) / schedule.num_timesteps
  table = table.replace(t=jnp.asarray(t, jnp.float32))
  if spacing.clean_end and np.array_equal(ends, rows[1:]):
    return table
  ends = np.append(ends, ends[-1])  # the last row has no step
  return table.replace(end=_levels_at(schedule, ends, spacing))


def _multistep_table(schedule, n, spacing):
  """Look up the levels of timesteps n and of the end behind them."""
  alpha, sigma = (v.astype(np.float64) for v in _discrete(schedule))
  if schedule.zero_terminal_snr:
    alpha[-1] = _MULTISTEP_ALPHA
    sigma[-1] = math.sqrt(1 - _MULTISTEP_ALPHA**2)
  end = (1.0, 0.0) if spacing.clean_end else (alpha[0], sigma[0])
  alpha, sigma, t = (
    np.append(v[n], last)
    for v, last in zip(
      (alpha, sigma, np.arange(len(alpha)) / len(alpha)),
      (*end, 0.0),
      strict=True,
    )
  )
  return Table(*(jnp.asarray(v, jnp.float32) for v in (alpha, sigma, t)))


def _flow_table(schedule, steps, factor, kept, kind):
  """Compute the last rows, `kept` steps of them, of a flow's spacing."""
  if schedule.kind != "rectified_flow":
    raise ValueError(
      f"spacing {kind} needs a rectified_flow, got {schedule.kind}; "
      "spacing=None takes any"
    )
  N = schedule.num_timesteps
  if kind == "flow_euler":
    first, last = shift(1.0, factor), shift(1 / N, factor)
    sigma = shift(np.linspace(first, last, steps), factor)
    t = sigma
  else:
    sigma = shift(np.linspace(1, 1 / N, steps + 1)[:-1], factor)
    sigma = np.minimum(sigma, 1 - _UNIPC_MARGIN)
    t = np.floor(sigma * N) / N
  sigma, t = (
    np.append(v[steps - kept :], 0.0).astype(np.float32) for v in (sigma, t)
  )
  # Of the rounded sigma, as there: near pure noise it decides on alpha.
  return Table(*map(jnp.asarray, (1 - sigma, sigma, t)))


def _spaced_timesteps(N, steps, spacing):
  """Return a released spacing's training timesteps, int [steps]."""
  if steps > N:
    raise ValueError(f"steps must be at most num_timesteps={N}, got {steps}")
  if spacing.kind == "trailing":
    # The sums of arange decide which way its halves round. For 62 counts of
    # 1000 they also give it a last timestep more, -1, which is the level of
    # pure noise to whom follows it: it is cut off here.
    n = np.round(np.arange(N, 0, -N / steps)) - 1
    return n[:steps].astype(np.int64)
  count = steps + spacing.multistep  # of which the last one is left out
  if spacing.kind == "linspace":
    n = np.linspace(0, N - 1, count).round()[::-1].astype(np.int64)
    return n[:steps]
  n = np.arange(count)[::-1][:steps] * (N // count) + spacing.offset
  if n[0] >= N:
    raise ValueError(
      f"offset must leave timestep {n[0]} below num_timesteps={N}, got "
      f"{spacing.offset}"
    )
  return n


def _levels_at(schedule, n, spacing):
  """Return the `Table` at training timesteps n, below 0 the spacing's end."""
  clean = (n < 0) & spacing.clean_end
  alpha, sigma = (v[np.maximum(n, 0)] for v in _discrete(schedule))
  return Table(
    alpha=jnp.asarray(np.where(clean, np.float32(1), alpha)),
    sigma=jnp.asarray(np.where(clean, np.float32(0), sigma)),
    t=jnp.asarray(n / schedule.num_timesteps, jnp.float32),
  )


def _last_time(schedule):
  """Return the time of the noisiest level of a continuous schedule."""
  if has_zero_terminal_snr(schedule):
    return 1.0
  return 1 - 1 / schedule.num_timesteps


def _alpha_sigma(schedule, t, xp):
  """Compute `alpha_sigma` by jax.numpy, or by numpy for constants."""
  t = xp.asarray(t, xp.float32)
  if schedule.kind == "rectified_flow":
    return 1 - t, t
  if schedule.kind == "cosine":
    return _cosine(schedule, t, xp)
  last = schedule.num_timesteps - 1
  n = xp.round(t * schedule.num_timesteps).astype(xp.int32)
  n = xp.clip(n, 0, last)
  alpha, sigma = _discrete(schedule)
  return xp.asarray(alpha)[n], xp.asarray(sigma)[n]


def _cosine(schedule, t, xp):
  """Evaluate cos(a(t)) / cos(a(0)), a(t) = pi/2 (t + s) / (1 + s).

  The sine of the complement is exactly 0 at t = 1, and
  cos^2 a(0) - cos^2 a = sin(a - a(0)) sin(a + a(0)) loses no digits near t = 0.
  """
  t = xp.clip(t, 0, _last_time(schedule))
  unit = math.pi / 2 / (1 + _COSINE_OFFSET)
  first = unit * _COSINE_OFFSET
  alpha = xp.sin(unit * (1 - t)) / math.cos(first)
  sigma = xp.sqrt(xp.sin(unit * t) * xp.sin(unit * t + 2 * first))
  return _shift_snr(alpha, sigma / math.cos(first), schedule.snr_shift, xp)


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
  first, last = ends ** (1 / power)
  betas = np.linspace(first, last, schedule.num_timesteps) ** power
  abar = np.cumprod(1 - betas)
  alpha, _ = _shift_snr(
    np.sqrt(abar), np.sqrt(1 - abar), schedule.snr_shift, np
  )
  if schedule.zero_terminal_snr:
    first, last = alpha[0], alpha[-1]
    alpha = (alpha - last) * (first / (first - last))
  sigma = np.sqrt(1 - alpha**2)
  return alpha.astype(np.float32), sigma.astype(np.float32)
