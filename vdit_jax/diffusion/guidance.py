"""Guidance (arXiv:2207.12598) over predictions of x0.

`guide` makes the denoiser that a sampler wants out of a network that is run on
several batches in one, its branches: from the one that is told least, such as
the null text, to the one that is told all, the prompt. Two are classifier-free
guidance; three have a scale for what is shown and one for the text
(arXiv:2211.09800, equation 3). Guidance on x0 equals guidance on any output of
`objectives`, each being linear in x0 at a given x_t. Its rescale does not: the
spread here is that of x0, not of a network's raw output.

A scale may go with the steps: `scale_of` makes a kind of `KINDS`.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

KINDS = ("constant", "dynamic", "oscillating")

Scale = float | jax.Array | Callable[..., jax.Array]

_STEADY = 10  # steps before a scale oscillates

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


def scale_of(
  kind: str, scale: float, times: jax.Array, num_timesteps: int = 1000
) -> Scale:
  """Make a scale of a kind for a run.

  Args:
    kind: one of `KINDS`.
    scale: its greatest value, about.
    times: of the table's rows but the last, from noise to data, [steps].
    num_timesteps: of a discrete schedule.
  """
  check_kind(kind)
  if kind == "dynamic":
    return dynamic(scale, times.shape[0], num_timesteps)
  return oscillating(scale, times) if kind == "oscillating" else scale


def check_kind(kind: str) -> None:
  """Refuse what is none of `KINDS`."""
  if kind not in KINDS:
    raise ValueError(f"guidance_kind must be one of {KINDS}, got {kind!r}")


def oscillating(scale: float, times: jax.Array) -> Scale:
  """Return a scale that is 1 at every odd step from the tenth on.

  Open pipelines of rectified flow do so against colours that saturate.

  Args:
    scale: of the other steps.
    times: of the rows, from noise to data, [steps].

  Returns:
    at(row) -> scale, float32.
  """

  def at(row):
    step = jnp.sum(times > row.t)
    rests = (step >= _STEADY) & (step % 2 == 1)
    return jnp.where(rests, 1.0, jnp.float32(scale))

  return at


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
    scales: of the step to each branch but the first.
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
