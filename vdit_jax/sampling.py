"""From noise to latents: the sampling loop over a denoiser.

  noise, Text -> sampler over the guided denoiser -> latents x0

`Sampling` says how, `settle` makes one of a recipe, and `sample_latents` is
the whole loop in one jit. `pipeline` puts the text before it and the decoder
behind it.
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vdit_jax import types
from vdit_jax.diffusion import guidance as guidances
from vdit_jax.diffusion import objectives, samplers, schedules


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How latents are sampled; static under jit.

  Attributes:
    objective, schedule: as the denoiser was trained.
    sampler: name in `diffusion.samplers`.
    steps: of the sampler.
    shift: of the sampling times towards noise.
    guidance: scale; 1 runs the conditional branch alone.
    rescale, interval: see `diffusion.guidance`.
    strength: 1 begins from noise; less keeps that much of given frames.
    spacing: of the steps among a discrete schedule's timesteps; None is not.
    dynamic: whether the guidance is `guidance.dynamic`.
  """

  objective: str
  schedule: schedules.Schedule
  sampler: str
  steps: int
  shift: float
  guidance: float
  rescale: float = 0.0
  interval: tuple[float, float] = (0.0, 1.0)
  strength: float = 1.0
  spacing: schedules.Spacing | None = None
  dynamic: bool = False

  @property
  def guided(self) -> bool:
    """Whether there is a second branch, of the null or negative text."""
    return self.guidance != 1


def settle(
  recipe: types.Recipe,
  *,
  steps: int | None = None,
  guidance: float | None = None,
  rescale: float | None = None,
  interval: tuple[float, float] = (0.0, 1.0),
  sampler: str | None = None,
  shift: float | None = None,
  strength: float = 1.0,
  dynamic: bool | None = None,
) -> Sampling:
  """Settle how to sample; what is not given is the recipe's."""
  if not 0 < strength <= 1:
    raise ValueError(f"strength must be in (0, 1], got {strength}")
  if steps is not None and steps < 1:
    raise ValueError(f"steps must be at least 1, got {steps}; try 30")
  scale = recipe.denoisers[0][2] if guidance is None else guidance
  samplers.get(sampler or recipe.sampler)
  spacing = recipe.spacing and schedules.Spacing(**recipe.spacing)
  return Sampling(
    objective=recipe.objective,
    schedule=schedules.Schedule(**recipe.schedule),
    sampler=sampler or recipe.sampler,
    steps=steps or recipe.steps,
    shift=recipe.shift if shift is None else shift,
    guidance=float(scale),
    rescale=recipe.rescale if rescale is None else rescale,
    interval=interval,
    strength=strength,
    spacing=spacing,
    dynamic=recipe.dynamic_guidance if dynamic is None else dynamic,
  )


@functools.partial(jax.jit, static_argnames=("denoiser", "how", "traced"))
def sample_latents(
  denoiser: nn.Module,
  how: Sampling,
  params: Any,
  text: types.Text,
  noise: jax.Array,
  given: jax.Array | None = None,
  given_mask: jax.Array | None = None,
  key: jax.Array | None = None,
  *,
  cond: types.Cond | None = None,
  step_noise: jax.Array | None = None,
  traced: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Sample latents, the whole sampling loop in one jit.

  Args:
    denoiser: the network.
    how: the sampling's settings.
    params: its weights.
    text: of the prompts, embeds [B, M, E]; with guidance [2B, M, E], the
      negative prompts or the null first.
    noise: standard normal [B, f, h, w, c].
    given: latents of given frames, or of the clip to edit, like noise; None
      for neither.
    given_mask: which latent frames are given and stay as they are, bool
      [B, f]; None for none. With it the network is told a noise level for
      each latent frame, which not every one can be.
    key: of the noise that a stochastic sampler adds, or one a clip [B].
    cond: what the network is shown of given frames, for B clips.
    step_noise: noise of a stochastic sampler, in place of the key's, [steps,
      B, f, h, w, c].
    traced: whether to return the states too.

  Returns:
    Latents x0, float32 [B, f, h, w, c]; traced, also the latents after each
    step [steps, B, f, h, w, c].
  """
  table = schedules.sampling_table(
    how.schedule, how.steps, how.shift, how.strength, how.spacing
  )
  start = given if how.strength < 1 else jnp.zeros_like(noise)
  x = objectives.add_noise(start, noise, table.alpha[0], table.sigma[0])

  def network(x: jax.Array, row: schedules.Table) -> jax.Array:
    """x0 of a batch that may be doubled for guidance."""
    times = x.shape[0] // noise.shape[0]
    held, t = x, jnp.full(x.shape[0], row.t)
    if given_mask is not None:
      clean = _repeat(given_mask, times)
      held = _hold(_repeat(given, times), clean, x)
      t = jnp.where(clean, 0.0, row.t)  # [B, f]: a given frame has t = 0
    shown = jax.tree.map(lambda x: _repeat(x, times), cond)
    output = denoiser.apply({"params": params}, held, t, text, shown)
    return objectives.to_x0(how.objective, output, held, row.alpha, row.sigma)

  sampler, denoise = _sampler(how, step_noise), network
  if how.guided:
    scale = how.guidance
    if how.dynamic:
      steps = table.t.shape[0] - 1
      scale = guidances.dynamic(scale, steps, how.schedule.num_timesteps)
    denoise = guidances.guide(network, scale, how.rescale, how.interval)
  found = sampler(denoise, x, table, key, trace=traced)
  if given_mask is None:
    return found
  return jax.tree.map(lambda x: _hold(given, given_mask, x), found)


def _sampler(how: Sampling, step_noise: jax.Array | None) -> Any:
  """Return the sampler, its fresh noise put in where that is given."""
  sampler = samplers.get(how.sampler)
  if step_noise is None:
    return sampler
  if sampler is not samplers.dpmpp_2m_sde:
    raise ValueError(
      f"step_noise is for the sampler dpmpp_2m_sde, got {how.sampler}, which "
      "adds none; leave it out"
    )
  return functools.partial(sampler, noise=step_noise)


def _hold(given: jax.Array, mask: jax.Array, x: jax.Array) -> jax.Array:
  """Put given latent frames in x [..., B, f, h, w, c], where mask says."""
  return jnp.where(schedules.expand(mask, given), given, x)


def _repeat(x: jax.Array, times: int) -> jax.Array:
  """Repeat a batch as a whole."""
  return jnp.concatenate([x] * times)


def draw_noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
  """Draw each clip's noise from a key of its own: keys [B] -> [B, *shape]."""
  return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def initial_noise(
  keys: jax.Array, shape: tuple[int, ...], given: Any, name: str = "noise"
) -> jax.Array:
  """Draw noise [B, f, h, w, c] from keys [B], or check what is given."""
  if given is None:
    return draw_noise(keys, shape[1:])
  if np.shape(given) != shape:
    raise ValueError(f"{name} must be {shape}, got {np.shape(given)}")
  return jnp.asarray(given)
