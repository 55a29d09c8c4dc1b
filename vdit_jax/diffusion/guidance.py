"""Guidance (arXiv:2207.12598) over predictions of x0.

`guide` makes the denoiser that a sampler wants out of a network that is run on
several batches in one, its branches: from the one that is told least, such as
the null text, to the one that is told all, the prompt. Two are classifier-free
guidance; three have a scale for what is shown and one for the text
(arXiv:2211.09800, equation 3). Guidance on x0 equals guidance on any output of
`objectives`, each being linear in x0 at a given x_t. Its rescale does not: the
spread here is that of x0, not of a network's raw output.

A scale may go with the steps and over the latent frames: `scale_of` makes one
of a `Course`.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("constant", "dynamic", "oscillating")

Scale = float | jax.Array | Callable[..., jax.Array]

# Below the standard deviation of any latents; keeps constant ones finite.
_TINY = 1e-12


def guide(
  network: Callable,
  scale: Scale | Sequence[Scale],
  rescale: float = 0.0,
  interval: tuple[float, float] = (0.0, 1.0),
) -> Callable:
  """Return a denoiser that guides a network.

  A batch of n branches costs n networks: at scale 1 the last branch's
  prediction is returned, but a caller who knows that beforehand should hand
  the sampler the network on that branch in place of this.

  Args:
    network: (x [n B, f, h, w, c], row) -> x0 [n B, f, h, w, c]; the first B
      are told least, the last B see the prompts.
    scale: guidance scale of each branch but the first, or one alone where
      there are two branches: float, scalar array or a function of the row,
      such as `dynamic` makes; 0 is unconditional, 1 is conditional.
    rescale: see `join`.
    interval: (t_low, t_high), both included; at other times of the table the
      scales are 1 (arXiv:2404.07724, there in sigma).

  Returns:
    denoise(x [B, f, h, w, c], row) -> x0, float32 [B, f, h, w, c].
  """
  t_low, t_high = interval
  if not 0 <= t_low <= t_high <= 1:
    raise ValueError(
      f"interval must be 0 <= t_low <= t_high <= 1, got {interval}"
    )
  scales = tuple(scale) if isinstance(scale, Sequence) else (scale,)
  n = len(scales) + 1

  def denoise(x, row):
    branches = jnp.split(network(jnp.concatenate([x] * n), row), n)
    inside = (row.t >= t_low) & (row.t <= t_high)
    now = [s(row) if callable(s) else s for s in scales]
    return join(branches, [jnp.where(inside, s, 1.0) for s in now], rescale)

  return denoise


@dataclasses.dataclass(frozen=True)
class Course:
  """How a scale of guidance goes with the steps and over latent frames.

  Attributes:
    kind: "constant"; "dynamic", see `dynamic`; or "oscillating": at every odd
      step from `steady` on it is `rest`, as open pipelines of rectified flow
      have it against colours that saturate.
    steady: steps before an oscillating scale rests.
    rest: what it is then.
    rises: whether a scale above `floor` rises in equal parts over the latent
      frames, from `floor` at the first to the step's at the last, and the
      step's falls in equal parts to `floor` over the run: what is shown holds
      the frames near it less (Open-Sora 1.3 and 2.0).
    floor: see `rises`.
    falls_to: where the fall ends: at the last "step", or at the "data" that it
      ends in, a part lower.
  """

  kind: str = "constant"
  steady: int = 10
  rest: float = 1.0
  rises: bool = False
  floor: float = 1.0
  falls_to: str = "data"

  def __post_init__(self):
    if self.kind not in KINDS:
      raise ValueError(
        f"guidance_kind must be one of {KINDS}, got {self.kind!r}"
      )
    if self.falls_to not in _FALLS:
      raise ValueError(
        f"falls_to must be one of {tuple(_FALLS)}, got {self.falls_to!r}"
      )
    if self.steady < 0:
      raise ValueError(f"steady must be at least 0, got {self.steady}")


# Parts of a scale's fall beside those between the steps.
_FALLS = {"step": 0, "data": 1}


def scale_of(
  course: Course,
  scale: float,
  times: jax.Array,
  num_timesteps: int = 1000,
  frames: int = 1,
) -> Scale:
  """Make a scale for a run.

  Args:
    course: how it goes.
    scale: its greatest value, about.
    times: of the table's rows but the last, from noise to data, [steps].
    num_timesteps: of a discrete schedule.
    frames: of the latents, f.

  Returns:
    The scale, or at(row) -> scale: a float32 scalar, [1, f, 1, 1, 1] where it
    rises over the frames.
  """
  found: Scale = scale
  if course.kind == "dynamic":
    found = dynamic(scale, times.shape[0], num_timesteps)
  elif course.kind == "oscillating":
    found = _oscillating(course, scale, times)
  return _rising(course, found, times, frames) if course.rises else found


def _oscillating(course: Course, scale: float, times: jax.Array) -> Scale:
  """Let a scale rest at odd steps."""

  def at(row):
    step = _step(times, row)
    rests = (step >= course.steady) & (step % 2 == 1)
    return jnp.where(rests, course.rest, jnp.float32(scale))

  return at


def _rising(course: Course, scale: Scale, times: jax.Array, f: int) -> Scale:
  """Let a scale rise over the frames and fall with the steps."""
  parts = max(times.shape[0] - 1 + _FALLS[course.falls_to], 1)
  share = jnp.linspace(0.0, 1.0, f).reshape(1, f, 1, 1, 1)

  def at(row):
    now = jnp.asarray(scale(row) if callable(scale) else scale, jnp.float32)
    above = (now - course.floor) * (1 - _step(times, row) / parts)
    return jnp.where(now > course.floor, course.floor + above * share, now)

  return at


def _step(times: jax.Array, row) -> jax.Array:
  """Return which step begins at a row."""
  return jnp.sum(times > row.t)


def dynamic(
  scale: float | jax.Array, steps: int, num_timesteps: int = 1000
) -> Scale:
  """Return dynamic guidance, a scale that `guide` asks each row.

  That of arXiv:2408.06072's code,

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


def combine(
  cond_x0: jax.Array,
  uncond_x0: jax.Array,
  scale: float | jax.Array,
  rescale: float = 0.0,
) -> jax.Array:
  """Extrapolate from the unconditional through the conditional prediction.

  `join` of two branches.
  """
  return join((uncond_x0, cond_x0), (scale,), rescale)


def join(
  branches: Sequence[jax.Array],
  scales: Sequence[float | jax.Array],
  rescale: float = 0.0,
) -> jax.Array:
  """Extrapolate through the predictions of branches, each told more.

  A large scale also widens the values' spread. `rescale` mixes in, as its
  share phi, the guided prediction brought back to the standard deviation of
  the last branch, each over all axes of a sample (arXiv:2305.08891,
  section 3.4).

  Args:
    branches: predictions [B, f, h, w, c], the last one given the prompt.
    scales: of the step to each branch but the first, scalars or what
      broadcasts against a prediction.
    rescale: phi, a float in [0, 1]; 0 is none.

  Returns:
    x0, float32 [B, f, h, w, c].
  """
  if not 0 <= rescale <= 1:
    raise ValueError(f"rescale must be in [0, 1], got {rescale}")
  branches = [_float32(x) for x in branches]
  last = guided = branches[-1]
  # In this form scales of 1 are the last prediction to the bit.
  for before, after, scale in zip(branches, branches[1:], scales, strict=False):
    guided = guided + (scale - 1) * (after - before)
  if rescale == 0:
    return guided
  ratio = _std(last) / jnp.maximum(_std(guided), _TINY)
  return guided * (1 + rescale * (ratio - 1))


def _float32(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _std(x):
  return jnp.std(x, axis=tuple(range(1, x.ndim)), keepdims=True)
