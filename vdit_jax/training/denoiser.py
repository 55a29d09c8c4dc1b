"""Training loss of the denoiser, with the text encoder trained beside it.

  batch -> latents x0, Text, Cond; t, eps -> x_t -> network -> loss

The autoencoder is frozen. With latents read from a cache it only stands by, or
encodes the images that an image-to-video denoiser is shown. The denoiser may
be frozen too, and adapters of it be trained.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from vdit_jax import encoding, sampling, types
from vdit_jax.diffusion import objectives, schedules, shifts
from vdit_jax.models.system import Modules
from vdit_jax.nn import lora
from vdit_jax.schema import Field
from vdit_jax.training import state as states

FIELDS = {
  "objective": Field(str, choices=objectives.OBJECTIVES),
  "distribution": Field(str, choices=objectives.DISTRIBUTIONS),
  "mean": Field(float, -100, 100),
  "std": Field(float, 0, 100),
  "t_low": Field(float, 0, 1, optional=True),
  "t_high": Field(float, 0, 1, optional=True),
  "strata": Field(int, 1, 2**24, optional=True),
  "min_snr_gamma": Field(float, 0, optional=True),
  "caption_dropout": Field(float, 0, 1),
  "cond_dropout": Field(float, 0, 1),
}
IMAGE_FIELDS = {
  "noise_mean": Field(float, -100, 100, optional=True),
  "noise_std": Field(float, 0, 100),
  "dropout": Field(float, 0, 1),
}
SCHEDULE_FIELDS = {
  "kind": Field(str, choices=schedules.KINDS),
  "num_timesteps": Field(int, 2, 2**20),
  "beta_start": Field(float, 0, 1),
  "beta_end": Field(float, 0, 1),
  "snr_shift": Field(float, 0, 1e6),
}


class Show(Protocol):
  """Gives frames of a batch's clips, in training and in validation.

  modules, weights that are not trained, batch, latent frames of a clip, and
  keys of its clips [B], None where nothing is drawn.
  """

  def __call__(
    self,
    modules: Modules,
    frozen: Any,
    batch: types.Batch,
    f: int,
    keys: jax.Array | None,
    /,
  ) -> types.Given:
    """Give."""
    ...


@dataclasses.dataclass(frozen=True)
class Objective:
  """What the denoiser is trained for.

  Attributes:
    objective: what its output means, see `diffusion.objectives`.
    schedule: noise schedule.
    distribution: of the training times, "uniform" or "logit_normal".
    mean, std: of the logit-normal distribution.
    shift: of the training times towards noise, or how it follows the clip's
      size; None is the default `shifts.SizeShift`.
    strata: see `objectives.sample_t`.
    min_snr_gamma: of min-SNR weighting; None is none.
    caption_dropout: share of captions replaced by the system's null.
    cond_dropout: share of clips of whose numbers (`Batch.cond`) nothing is
      told, so that sampling may leave them open.
    t_low, t_high: times that are trained, the distribution being cut to them;
      None is all, in a config those that the network has in its recipe.
  """

  objective: str = "flow"
  schedule: schedules.Schedule = schedules.Schedule()
  distribution: str = "logit_normal"
  mean: float = 0.0
  std: float = 1.0
  shift: float | shifts.SizeShift | None = None
  strata: int | None = None
  min_snr_gamma: float | None = None
  caption_dropout: float = 0.1
  cond_dropout: float = 0.1
  t_low: float | None = None
  t_high: float | None = None

  @property
  def interval(self) -> tuple[float, float]:
    """Times that are trained."""
    return self.t_low or 0.0, 1.0 if self.t_high is None else self.t_high

  def __post_init__(self):
    objectives.check(self.objective, self.schedule)
    for name in ("caption_dropout", "cond_dropout"):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")


def make_loss(
  modules: Modules,
  goal: Objective,
  show: Show | None = None,
  adapters: lora.Lora | None = None,
) -> states.Loss:
  """Make the loss.

  `params` hold what is trained: "denoiser" or adapters of it, and perhaps
  text encoders; `frozen` the others that a batch needs, and "null", the Text
  of the empty caption (embeds [M, E]) by each encoder whose null is a prompt.

  Args:
    modules: the networks.
    goal: what for.
    show: gives frames of clips; None gives none.
    adapters: of the denoiser; None has none.
  """

  def draw(batch: types.Batch, key: jax.Array) -> dict[str, jax.Array]:
    names = ("posterior", "drop", "time", "noise", *["image"] * bool(show))
    keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    B = batch.weight.shape[0]
    t = objectives.sample_t(
      keys["time"],
      (B,),
      distribution=goal.distribution,
      mean=goal.mean,
      std=goal.std,
      shift=time_shift(modules, goal, encoding.latents_of(modules, batch)),
      strata=goal.strata,
      interval=goal.interval,
    )
    drawn = {
      "t": schedules.snap(goal.schedule, t),
      "keep": jax.random.uniform(keys["drop"], (B, 1)) >= goal.caption_dropout,
      "numbers": _draw_kept(keys["drop"], B, goal.cond_dropout),
      "posterior": jax.random.split(keys["posterior"], B),
      "noise": jax.random.split(keys["noise"], B),
    }
    if show:
      drawn["image"] = jax.random.split(keys["image"], B)
    return drawn

  def terms(params: Any, frozen: Any, batch: types.Batch, drawn: Any):
    weights = frozen | params
    x0 = encoding.encode_video(modules, frozen, batch, drawn["posterior"])
    given = types.Given()
    if show:
      given = show(modules, frozen, batch, x0.shape[1], drawn["image"])
    x0 = modules.system.fill(x0, modules.denoiser.cfg.patch)
    eps = sampling.draw_noise(drawn["noise"], x0.shape[1:])
    text = _text(modules, weights, batch.captions, drawn["keep"])
    numbers = keep_numbers(batch.cond, drawn["numbers"])
    cond = types.join_conds(given.cond, numbers)
    run = _network(modules, weights, adapters, text, cond)
    return {"loss": _errors(run, goal, x0, eps, drawn["t"], given)}

  return states.Loss(draw, terms)


def make_validation(
  modules: Modules,
  goal: Objective,
  levels: tuple[float, ...],
  show: Show | None = None,
  adapters: lora.Lora | None = None,
) -> Callable[..., tuple[jax.Array, jax.Array]]:
  """Make `validate(params, frozen, batch, seed)`: the loss at fixed levels.

  With the posterior's mean, every caption kept, a clean image and noise that
  only the seed decides: a number to compare between checkpoints and runs.

  Args:
    modules, goal, show, adapters: as of `make_loss`.
    levels: times in [0, 1].

  Returns:
    A function to the sum of the clips' losses at each level [levels], and the
    number of clips.
  """

  def validate(params: Any, frozen: Any, batch: types.Batch, seed: int):
    weights = frozen | params
    x0 = encoding.encode_video(modules, frozen, batch, None)
    given = types.Given()
    if show:
      given = show(modules, frozen, batch, x0.shape[1], None)
    x0 = modules.system.fill(x0, modules.denoiser.cfg.patch)
    text = _text(modules, weights, batch.captions, jnp.ones((len(x0), 1), bool))
    key = jax.random.key(seed)
    eps = jax.random.normal(key, x0.shape, x0.dtype)
    cond = types.join_conds(given.cond, batch.cond)
    run = _network(modules, weights, adapters, text, cond)

    def at(level):
      t = jnp.full(x0.shape[:1], level, jnp.float32)
      return _errors(run, goal, x0, eps, t, given) * batch.weight

    losses = jax.lax.map(at, jnp.asarray(levels))
    # Summed at once, by one collective: of two that do not need each other
    # each may wait for devices that are in the other.
    sums = jnp.sum(jnp.concatenate([losses, batch.weight[None]]), axis=1)
    return sums[:-1], sums[-1]

  return validate


def time_shift(
  modules: Modules, goal: Objective, shape: tuple[int, ...]
) -> float:
  """Shift of the training times for latents of shape (f, h, w, c)."""
  shift = shifts.read(goal.shift)
  return shifts.factor(shift, shape, modules.denoiser.cfg.patch)


def keep_numbers(cond: types.Cond | None, keep: jax.Array) -> types.Cond | None:
  """Keep the numbers of the clips that `keep` [B] says; NaN is not known."""

  def one(x: jax.Array) -> jax.Array:
    return jnp.where(keep.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.nan)

  return jax.tree.map(one, cond)


def _draw_kept(key: jax.Array, B: int, dropout: float) -> jax.Array:
  """Draw of which clips numbers are told [B].

  From a key of its own, so that other numbers drawn are those of before.
  """
  return jax.random.uniform(jax.random.fold_in(key, 1), (B,)) >= dropout


def _text(modules, weights, captions, keep) -> types.Text:
  """Encode captions, with the null for those that are not kept, [B, 1]."""
  system, kept = modules.system, {}
  for name, rule in system.text.items():
    given = captions[name]
    if rule.null == "learned":  # of the denoiser, where no token is told
      given = given.replace(mask=given.mask & keep)
    kept[name] = given
  found = encoding.encode_each(modules, weights, kept)
  pick = lambda a, b: jnp.where(keep.reshape(-1, *[1] * (a.ndim - 1)), a, b)
  for name, null in weights.get("null", {}).items():
    found[name] = jax.tree.map(pick, found[name], null)
  text = system.join_text(found)
  if "stored" not in system.nulls:
    return text
  null = system.stored_null(weights["denoiser"], text)
  return jax.tree.map(pick, text, null)


def _network(modules, weights, adapters, text, cond):
  """Return the network as a function of x_t and t."""
  params = weights["denoiser"]
  if adapters is not None:
    params = lora.attach(params, weights[lora.PARAMS], adapters.scale)
  variables = {"params": params}
  return lambda x_t, t: modules.denoiser.apply(variables, x_t, t, text, cond)


def _errors(run, goal, x0, eps, t, given):
  """Loss of each clip [B], of the latent frames that are not given."""
  if given.mask is not None:
    t = jnp.where(given.mask, 0.0, t[:, None])  # [B, f]
    x0 = jnp.where(schedules.expand(given.mask, x0), given.latents, x0)
  counts = None if given.known is None else ~given.known
  if given.mask is not None:
    counts = ~given.mask
  alpha, sigma = schedules.alpha_sigma(goal.schedule, t)
  x_t = objectives.add_noise(x0, eps, alpha, sigma)
  output = run(x_t, t)
  weight = objectives.loss_weight(
    goal.objective, alpha, sigma, goal.min_snr_gamma
  )
  return objectives.loss(
    goal.objective, output, x0, eps, alpha, sigma, weight, counts
  )
