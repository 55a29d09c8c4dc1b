"""From noise to latents: the sampling loop over a denoiser.

  noise, Text -> sampler over the guided denoiser -> latents x0

`Sampling` says how, `settle` makes one of a recipe, and `sample_latents` is
the whole loop in one jit; `sample_in_turn` is it with one expert's weights in
memory. `pipeline` puts the text before it and the decoder behind it.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from vdit_jax import types
from vdit_jax.diffusion import guidance as guidances
from vdit_jax.diffusion import objectives, samplers, schedules, shifts


@dataclasses.dataclass(frozen=True)
class Sampling:
  """How latents are sampled; static under jit.

  Attributes:
    objective, schedule: as the denoiser was trained.
    sampler, sampler_options: name in `diffusion.samplers`, and arguments.
    steps: of the sampler.
    shift: of the sampling times towards noise, or how it follows the size.
    experts: the denoisers, their times and guidance; a scale of 1 everywhere
      runs the prompt's branch alone.
    rescale, interval: see `diffusion.guidance`.
    strength: 1 begins from noise; less keeps that much of given frames.
    spacing: of the steps as a released scheduler has them; None is ours.
    course: how the scale goes with steps and frames.
    image_guidance: scale of what is shown, where there are three branches.
    image_course: how that goes.
    branches: what each branch of guidance is told; the last one is the
      prompt's.
  """

  objective: str
  schedule: schedules.Schedule
  sampler: str
  steps: int
  shift: float | shifts.SizeShift
  experts: tuple[types.Expert, ...]
  rescale: float = 0.0
  interval: tuple[float, float] = (0.0, 1.0)
  strength: float = 1.0
  spacing: schedules.Spacing | None = None
  course: guidances.Course = guidances.Course()
  image_guidance: float = 1.0
  image_course: guidances.Course = guidances.Course()
  branches: tuple[types.Branch, ...] = types.CLASSIFIER_FREE
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
  branches: tuple[types.Branch, ...] = types.CLASSIFIER_FREE,
) -> Sampling:
  """Settle how to sample; what is not given is the recipe's.

  Args:
    recipe: of the system.
    guidance: scale of every expert, or of each from low noise to high.
    guidance_kind: of both scales' courses.
    steps, rescale, interval, sampler, shift, strength, image_guidance,
      branches: see `Sampling`.
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
  course, image_course = _courses(recipe, guidance_kind)
  return Sampling(
    objective=recipe.objective,
    schedule=schedules.Schedule(**recipe.schedule),
    sampler=sampler,
    sampler_options=tuple(sorted(options.items())),
    steps=steps or recipe.steps,
    shift=shifts.read(own(shift, "shift")),
    experts=experts,
    rescale=own(rescale, "rescale"),
    interval=interval,
    strength=strength,
    spacing=recipe.spacing and schedules.Spacing(**recipe.spacing),
    course=course,
    image_guidance=float(own(image_guidance, "image_guidance")),
    image_course=image_course,
    branches=branches,
  )


def _courses(
  recipe: types.Recipe, kind: str | None
) -> tuple[guidances.Course, guidances.Course]:
  """Read how the scales of text and image go; a kind is that of both."""
  text = {"kind": recipe.guidance_kind, **recipe.guidance_options}
  image = {**text, **recipe.image_guidance_options}
  asked = {} if kind is None else {"kind": kind}
  return guidances.Course(**text | asked), guidances.Course(**image | asked)


def _guided_by(experts, scales) -> tuple[types.Expert, ...]:
  """Put a scale of guidance, or one each, in the place of the experts'."""
  if not isinstance(scales, tuple):
    scales = (scales,) * len(experts)
  if not np.isfinite(scales).all():
    raise ValueError(f"guidance must be finite, got {scales}; try 5")
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
  run = _run(how, denoisers, how.experts, params, text, noise, given)
  found = _sampler(how, step_noise)(*run, key, trace=traced)
  return jax.tree.map(lambda x: _held(given, x), found)


class Inputs(flax.struct.PyTreeNode):
  """What latents are sampled from; see `sample_latents`."""

  text: types.Text
  noise: jax.Array
  given: types.Given | None = None
  key: jax.Array | None = None
  step_noise: jax.Array | None = None


def sample_in_turn(
  denoisers: tuple[nn.Module, ...],
  how: Sampling,
  read: Callable[[str], Any],
  free: Callable[[str], None],
  inputs: Inputs,
) -> jax.Array:
  """Sample as `sample_latents` does, one network's weights in memory.

  Args:
    denoisers: network of each expert.
    how: the sampling's settings.
    read: a network's name -> its weights.
    free: lets go of a network's weights.
    inputs: what latents are sampled from.

  Returns:
    Latents, float32 [B, f, h, w, c].
  """
  carry, held = None, ""
  spans = _spans(how, denoisers[0], inputs.noise.shape[1:])
  for which, start, stop in spans:
    expert = how.experts[which]
    if held not in ("", expert.network):
      jax.block_until_ready(carry)
      free(held)
    held = expert.network
    piece = samplers.Piece(start, stop, carry)
    run = denoisers[which], how, which, read(held), inputs, piece
    carry = _sample_span(*run)
    del run  # which holds the weights
  return _held(inputs.given, jnp.asarray(carry))


@functools.partial(jax.jit, static_argnames=("denoiser", "how", "which"))
def _sample_span(denoiser, how, which, params, x: Inputs, piece) -> Any:
  """Take the steps of one expert; return the sampler's carry, or latents."""
  experts = how.experts[which : which + 1]
  params = {experts[0].network: params}
  run = _run(how, (denoiser,), experts, params, x.text, x.noise, x.given)
  return _sampler(how, x.step_noise)(*run, x.key, piece=piece)


def _spans(how, denoiser, shape) -> list[tuple[int, int, int]]:
  """Say which expert takes which steps: (expert, start, stop), in order."""
  t = np.asarray(_table(how, denoiser, shape).t[:-1])
  which = (t[:, None] > [row.t_high for row in how.experts[:-1]]).sum(1)
  cuts = [0, *(np.flatnonzero(np.diff(which)) + 1).tolist(), len(t)]
  return [
    (int(which[start]), start, stop) for start, stop in itertools.pairwise(cuts)
  ]


def _run(
  how, denoisers, experts, params, text, noise, given
) -> tuple[Any, ...]:
  """Make what a sampler runs: guided experts, latents, table."""
  given = given or types.Given()
  table = _table(how, denoisers[0], noise.shape[1:])
  start = given.latents if how.strength < 1 else jnp.zeros_like(noise)
  x = objectives.add_noise(start, noise, table.alpha[0], table.sigma[0])
  inputs = _branch_inputs(how, text, given.cond, len(noise))
  networks = [
    _guided(
      how,
      expert,
      table,
      _network(module, how, params, expert, inputs, given),
      noise.shape[1],
    )
    for module, expert in zip(denoisers, experts, strict=True)
  ]
  return _by_time(experts, networks), x, table


def _table(how: Sampling, denoiser: nn.Module, shape) -> schedules.Table:
  """Return the levels of a run for latents (f, h, w, c)."""
  shift: Any = how.shift
  if isinstance(shift, shifts.SizeShift):
    shift = shift.factor(shape, denoiser.cfg.patch)  # pyright: ignore[reportAttributeAccessIssue]
  return schedules.sampling_table(
    how.schedule, how.steps, shift, how.strength, how.spacing
  )


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


def _guided(how: Sampling, expert: types.Expert, table, network, f) -> Any:
  """Guide an expert's network of f latent frames, if there is guidance."""
  if not how.guided:
    return network
  run = table.t[:-1], how.schedule.num_timesteps, f
  scales = [guidances.scale_of(how.course, expert.guidance, *run)]
  if len(how.branches) > 2:
    image = guidances.scale_of(how.image_course, how.image_guidance, *run)
    scales.insert(0, image)
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
  if [branch.text for branch in how.branches] != list(place):
    parts = [place[branch.text] for branch in how.branches]
    text = jax.tree.map(lambda x: jnp.concatenate([x[p] for p in parts]), text)
  return text, cond and _hide(how.branches, cond)


def _hide(branches: tuple[types.Branch, ...], cond: types.Cond) -> types.Cond:
  """Repeat a condition for all branches, with zeros for what each hides."""
  every = jax.tree.map(lambda x: _repeat(x, len(branches)), cond)
  hidden = {}
  for name in sorted({name for branch in branches for name in branch.hides}):
    kept = [float(name not in branch.hides) for branch in branches]
    hide = lambda x, kept=kept: jnp.concatenate([x * k for k in kept])
    hidden[name] = jax.tree.map(hide, getattr(cond, name))
  return every.replace(**hidden)


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


def _held(given: types.Given | None, x: jax.Array) -> jax.Array:
  """Put the frames that stay in x [..., B, f, h, w, c], if there are any."""
  if given is None or given.mask is None:
    return x
  return _hold(given.latents, given.mask, x)


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
