"""Training loss of the denoiser, with the text encoder trained beside it.

  batch -> latents x0, Text; t, eps -> x_t -> network -> loss

The autoencoder is frozen. With latents read from a cache it only stands by.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from vdit_jax import networks, pipeline, sampling, types
from vdit_jax.diffusion import objectives, schedules
from vdit_jax.training import state as states


@dataclasses.dataclass(frozen=True)
class Objective:
  """What the denoiser is trained for.

  Attributes:
    objective: what its output means, see `diffusion.objectives`.
    schedule: noise schedule.
    distribution: of the training times, "uniform" or "logit_normal".
    mean, std: of the logit-normal distribution.
    shift: of the training times towards noise; None follows the clip's size
      by `schedules.resolution_shift`.
    strata: see `objectives.sample_t`.
    min_snr_gamma: of min-SNR weighting; None is none.
    caption_dropout: share of captions replaced by the learned null.
    cond_dropout: share of clips of whose numbers (`Batch.cond`) nothing is
      told, so that sampling may leave them open.
  """

  objective: str = "flow"
  schedule: schedules.Schedule = schedules.Schedule()
  distribution: str = "logit_normal"
  mean: float = 0.0
  std: float = 1.0
  shift: float | None = None
  strata: int | None = None
  min_snr_gamma: float | None = None
  caption_dropout: float = 0.1
  cond_dropout: float = 0.1

  def __post_init__(self):
    objectives.check(self.objective, self.schedule)
    for name in ("caption_dropout", "cond_dropout"):
      if not 0 <= getattr(self, name) < 1:
        raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")


def make_loss(modules: networks.Modules, goal: Objective) -> states.Loss:
  """Make the loss.

  `params` hold "denoiser" and, where it is trained, "text_encoder"; `frozen`
  the others that a batch needs.
  """

  def draw(batch: types.Batch, key: jax.Array) -> dict[str, jax.Array]:
    names = ("posterior", "drop", "time", "noise")
    keys = dict(zip(names, jax.random.split(key, len(names)), strict=True))
    B = batch.weight.shape[0]
    t = objectives.sample_t(
      keys["time"],
      (B,),
      distribution=goal.distribution,
      mean=goal.mean,
      std=goal.std,
      shift=time_shift(modules, goal, pipeline.latents_of(modules, batch)),
      strata=goal.strata,
    )
    return {
      "t": schedules.snap(goal.schedule, t),
      "keep": jax.random.uniform(keys["drop"], (B, 1)) >= goal.caption_dropout,
      "tell": _tell(keys["drop"], B, goal.cond_dropout),
      "posterior": jax.random.split(keys["posterior"], B),
      "noise": jax.random.split(keys["noise"], B),
    }

  def terms(params: Any, frozen: Any, batch: types.Batch, drawn: Any):
    x0 = pipeline.encode_video(modules, frozen, batch, drawn["posterior"])
    eps = sampling.draw_noise(drawn["noise"], x0.shape[1:])
    batch = batch.replace(mask=batch.mask & drawn["keep"])
    text = pipeline.batch_text(modules, params, batch)
    cond = told(batch.cond, drawn["tell"])
    errors = _errors(modules, params, goal, x0, eps, drawn["t"], text, cond)
    return {"loss": errors}

  return states.Loss(draw, terms)


def make_validation(
  modules: networks.Modules, goal: Objective, levels: tuple[float, ...]
) -> Callable[..., jax.Array]:
  """Make `validate(params, frozen, batch, seed)`: the loss at fixed levels.

  With the posterior's mean, every caption kept and noise that only the seed
  decides: a number to compare between checkpoints and runs.

  Returns:
    A function to the sum of the clips' losses at each level [levels], and the
    number of clips.
  """

  def validate(params: Any, frozen: Any, batch: types.Batch, seed: int):
    x0 = pipeline.encode_video(modules, frozen, batch, None)
    text = pipeline.batch_text(modules, params, batch)
    key = jax.random.key(seed)
    eps = jax.random.normal(key, x0.shape, x0.dtype)

    def at(level):
      t = jnp.full(x0.shape[:1], level, jnp.float32)
      errors = _errors(modules, params, goal, x0, eps, t, text, batch.cond)
      return jnp.sum(errors * batch.weight)

    return jax.lax.map(at, jnp.asarray(levels)), jnp.sum(batch.weight)

  return validate


def time_shift(
  modules: networks.Modules, goal: Objective, shape: tuple[int, ...]
) -> float:
  """Shift of the training times for latents of shape (f, h, w, c)."""
  if goal.shift is not None:
    return goal.shift
  p_f, p_h, p_w = modules.denoiser.cfg.patch
  tokens = (shape[1] // p_h) * (shape[2] // p_w)
  return schedules.resolution_shift(tokens, shape[0] // p_f)


def told(cond: types.Cond | None, tell: jax.Array) -> types.Cond | None:
  """Keep the numbers of the clips that `tell` [B] says; NaN is not known."""

  def one(x: jax.Array) -> jax.Array:
    return jnp.where(tell.reshape(-1, *[1] * (x.ndim - 1)), x, jnp.nan)

  return jax.tree.map(one, cond)


def _tell(key: jax.Array, B: int, dropout: float) -> jax.Array:
  """Draw of which clips numbers are told [B].

  From a key of its own, so that other numbers drawn are those of before.
  """
  return jax.random.uniform(jax.random.fold_in(key, 1), (B,)) >= dropout


def _errors(modules, params, goal, x0, eps, t, text, cond):
  """Loss of each clip [B]."""
  alpha, sigma = schedules.alpha_sigma(goal.schedule, t)
  x_t = objectives.add_noise(x0, eps, alpha, sigma)
  variables = {"params": params["denoiser"]}
  output = modules.denoiser.apply(variables, x_t, t, text, cond)
  weight = objectives.loss_weight(
    goal.objective, alpha, sigma, goal.min_snr_gamma
  )
  return objectives.loss(goal.objective, output, x0, eps, alpha, sigma, weight)
