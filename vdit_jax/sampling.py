"""From noise to latents: the sampling loop over a denoiser.

  noise, Text -> sampler over the guided denoiser -> latents x0

`Sampling` says how, `settle` makes one of a recipe, and `sample_latents` is
the whole loop in one jit. `pipeline` puts the text before it and the decoder
behind it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence
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
    sampler, sampler_options: name in `diffusion.samplers`, and arguments.
    steps: of the sampler.
    shift: of the sampling times towards noise.
    experts: the denoisers, their times and guidance; a scale of 1 everywhere
      runs the prompt's branch alone.
    rescale, interval: see `diffusion.guidance`.
    strength: 1 begins from noise; less keeps that much of given frames.
    spacing: of the steps as a released scheduler has them; None is ours.
    guidance_kind: one of `diffusion.guidance.KINDS`.
    image_guidance: scale of what is shown, where there are three branches.
    branches: what each branch of guidance is told, as (text, shown); the last
      one is the prompt's.
  """

  objective: str
  schedule: schedules.Schedule
  sampler: str
  steps: int
  shift: float
  experts: tuple[types.Expert, ...]
  rescale: float = 0.0
  interval: tuple[float, float] = (0.0, 1.0)
  strength: float = 1.0
  spacing: schedules.Spacing | None = None
  guidance_kind: str = "constant"
  image_guidance: float = 1.0
  branches: tuple[tuple[str, bool], ...] = (
    ("negative", True),
    ("prompt", True),
  )
  sampler_options: tuple[tuple[str, Any], ...] = ()

  @property
  def guidance(self) -> float:
    """Scale of the first expert."""
    return self.experts[0].guidance

  @property
  def guided(self) -> bool:
    """Whether there are more branches than the prompt's."""
    if len(self.branches) == 1:
      return False
    text = any(expert.guidance != 1 for expert in self.experts)
    return text or (len(self.branches) > 2 and self.image_guidance != 1)

  @property
  def draws_noise(self) -> bool:
    """Whether steps draw fresh noise."""
    return samplers.draws_noise(self.sampler, dict(self.sampler_options))


def settle(
  recipe: types.Recipe,
  *,
  steps: int | None = None,
  guidance: float | tuple[float, ...] | None = None,
  rescale: float | None = None,
  interval: tuple[float, float] = (0.0, 1.0),
  sampler: str | None = None,
  shift: float | None = None,
  strength: float = 1.0,
  guidance_kind: str | None = None,
  image_guidance: float | None = None,
  branches: tuple[tuple[str, bool], ...] = Sampling.branches,
) -> Sampling:
  """Settle how to sample; what is not given is the recipe's.

  Args:
    recipe: of the system.
    guidance: scale of every expert, or of each from low noise to high.
    steps, rescale, interval, sampler, shift, strength, guidance_kind,
      image_guidance, branches: see `Sampling`.
  """
  if not 0 < strength <= 1:
    raise ValueError(f"strength must be in (0, 1], got {strength}")
  if steps is not None and steps < 1:
    raise ValueError(f"steps must be at least 1, got {steps}; try 30")
  own = lambda value, name: getattr(recipe, name) if value is None else value
  experts = recipe.experts
  if guidance is not None:
    experts = _guided_by(experts, guidance)
  sampler = own(sampler, "sampler")
  options = recipe.sampler_options if sampler == recipe.sampler else {}
  samplers.make(sampler, options)  # refuses unknown ones
  guidances.check_kind(own(guidance_kind, "guidance_kind"))
  return Sampling(
    objective=recipe.objective,
    schedule=schedules.Schedule(**recipe.schedule),
    sampler=sampler,
    sampler_options=tuple(sorted(options.items())),
    steps=steps or recipe.steps,
    shift=own(shift, "shift"),
    experts=experts,
    rescale=own(rescale, "rescale"),
    interval=interval,
    strength=strength,
    spacing=recipe.spacing and schedules.Spacing(**recipe.spacing),
    guidance_kind=own(guidance_kind, "guidance_kind"),
    image_guidance=float(own(image_guidance, "image_guidance")),
    branches=branches,
  )


def _guided_by(experts, scales) -> tuple[types.Expert, ...]:
  """Put a scale of guidance, or one each, in the place of the experts'."""
  if not isinstance(scales, tuple):
    scales = (scales,) * len(experts)
  if len(scales) != len(experts):
    raise ValueError(
      f"guidance must be one number or {len(experts)}, one for each denoiser "
      f"from low noise to high, got {scales}"
    )
  return tuple(
    dataclasses.replace(expert, guidance=float(scale))
    for expert, scale in zip(experts, scales, strict=True)
  )


@functools.partial(jax.jit, static_argnames=("denoisers", "how", "traced"))
def sample_latents(
  denoisers: tuple[nn.Module, ...],
  how: Sampling,
  params: Mapping[str, Any],
  text: types.Text,
  noise: jax.Array,
  given: types.Given | None = None,
  key: jax.Array | None = None,
  *,
  step_noise: jax.Array | None = None,
  traced: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
  """Sample latents, the whole sampling loop in one jit.

  Args:
    denoisers: network of each expert.
    how: the sampling's settings.
    params: weights of each expert's network, by name.
    text: of the prompts, embeds [B, M, E]; with guidance [2B, M, E], the
      negative prompts or the null first.
    noise: standard normal [B, f, h, w, c].
    given: frames that are given, for B clips; None for none. With its mask the
      network is told a noise level for each latent frame, which not every one
      can be.
    key: of the noise that a stochastic sampler adds, or one a clip [B].
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
  given = given or types.Given()
  start = given.latents if how.strength < 1 else jnp.zeros_like(noise)
  x = objectives.add_noise(start, noise, table.alpha[0], table.sigma[0])
  inputs = _branch_inputs(how, text, given.cond, len(noise))
  experts = [
    _guided(
      how, expert, table, _network(module, how, params, expert, inputs, given)
    )
    for module, expert in zip(denoisers, how.experts, strict=True)
  ]
  sampler = _sampler(how, step_noise)
  found = sampler(_by_time(how.experts, experts), x, table, key, trace=traced)
  if given.mask is None:
    return found
  return jax.tree.map(lambda x: _hold(given.latents, given.mask, x), found)


def _network(denoiser, how, params, expert, inputs, given) -> Any:
  """Make x0 of an expert, of a batch that guidance may repeat."""
  text, cond = inputs

  def network(x: jax.Array, row: schedules.Table) -> jax.Array:
    held, t = x, jnp.full(x.shape[0], row.t)
    if given.mask is not None:
      times = x.shape[0] // len(given.mask)
      clean = _repeat(given.mask, times)
      held = _hold(_repeat(given.latents, times), clean, x)
      t = jnp.where(clean, 0.0, row.t)  # [B, f]: a given frame has t = 0
    variables = {"params": params[expert.network]}
    output = denoiser.apply(variables, held, t, text, cond)
    return objectives.to_x0(how.objective, output, held, row.alpha, row.sigma)

  return network


def _guided(how: Sampling, expert: types.Expert, table, network) -> Any:
  """Guide an expert's network, if there is guidance."""
  if not how.guided:
    return network
  times, N = table.t[:-1], how.schedule.num_timesteps
  make = lambda scale: guidances.scale_of(how.guidance_kind, scale, times, N)
  scales = [make(expert.guidance)]
  if len(how.branches) > 2:
    scales.insert(0, make(how.image_guidance))
  return guidances.guide(network, scales, how.rescale, how.interval)


def _by_time(rows: tuple[types.Expert, ...], experts: list[Any]) -> Any:
  """Let each expert denoise at its own times."""
  if len(experts) == 1:
    return experts[0]
  bounds = jnp.array([row.t_high for row in rows[:-1]])

  def denoise(x: jax.Array, row: schedules.Table) -> jax.Array:
    return jax.lax.switch(jnp.sum(row.t > bounds), experts, x, row)

  return denoise


def _branch_inputs(
  how: Sampling, text: types.Text, cond: types.Cond | None, B: int
) -> tuple[types.Text, types.Cond | None]:
  """Give text and condition of all branches, one batch behind another."""
  if not how.guided:
    return text, cond
  place = {"negative": slice(0, B), "prompt": slice(B, 2 * B)}
  if [name for name, _ in how.branches] != list(place):
    parts = [place[name] for name, _ in how.branches]
    text = jax.tree.map(lambda x: jnp.concatenate([x[p] for p in parts]), text)
  shown = [float(is_shown) for _, is_shown in how.branches]
  if all(shown):
    return text, jax.tree.map(lambda x: _repeat(x, len(shown)), cond)
  hide = lambda x: jnp.concatenate([x * s for s in shown])
  repeated = jax.tree.map(lambda x: _repeat(x, len(shown)), cond)
  return text, repeated and repeated.replace(
    latents=jax.tree.map(hide, cond.latents),
    mask=jax.tree.map(hide, cond.mask),
    image_embeds=jax.tree.map(hide, cond.image_embeds),
  )


def _sampler(how: Sampling, step_noise: jax.Array | None) -> Any:
  """Return the sampler, its fresh noise put in where that is given."""
  sampler = samplers.make(how.sampler, dict(how.sampler_options))
  if step_noise is None:
    return sampler
  if not how.draws_noise:
    raise ValueError(
      f"step_noise is for samplers that draw some, such as dpmpp_2m_sde, got "
      f"{how.sampler}, which adds none; leave it out"
    )
  return functools.partial(sampler, noise=step_noise)


def _hold(given: jax.Array, mask: jax.Array, x: jax.Array) -> jax.Array:
  """Put given latent frames in x [..., B, f, h, w, c], where mask says."""
  return jnp.where(schedules.expand(mask, given), given, x)


def _repeat(x: jax.Array, times: int) -> jax.Array:
  """Repeat a batch as a whole."""
  return jnp.concatenate([x] * times)


def clip_keys(seed: int | Sequence[int], number: int) -> jax.Array:
  """Give the key of each clip's noise.

  Args:
    seed: of the first clip, the next ones having the next; or of each.
    number: of the clips, B.

  Returns:
    Keys [B], each of which depends on its clip's seed alone.
  """
  if isinstance(seed, int | np.integer):
    seed = range(int(seed), int(seed) + number)
  if len(seed) != number:
    raise ValueError(f"seed must be one, or {number}, got {len(seed)}")
  wrong = [s for s in seed if not 0 <= s < 2**32]
  if wrong:
    raise ValueError(
      f"seed must be a whole number from 0 to 2**32 - 1, got {wrong[0]}"
    )
  keys = [jax.random.split(jax.random.key(int(s)), 1)[0] for s in seed]
  return jnp.stack(keys)


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
