"""Training loss of the denoiser, with the text encoder trained beside it.

  batch -> latents x0, Text, Cond; t, eps -> x_t -> network -> loss

The autoencoder is frozen. With latents read from a cache it only stands by, or
encodes the images that an image-to-video denoiser is shown. The denoiser may
be frozen too, and adapters of it be trained.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vdit_jax import lora, networks, pipeline, sampling, types
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
    caption_dropout: share of captions replaced by the learned null, or by
      the empty caption where the text encoder's padding is seen.
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


@dataclasses.dataclass(frozen=True)
class Image:
  """How an image-to-video denoiser is shown the first frame in training.

  CogVideoX's numbers (arXiv:2408.06072, section 3.1, and its code): noise
  whose standard deviation is log-normal, so that a user's image need not be
  as clean as a video's frame, and sometimes no image at all.

  Attributes:
    noise_mean, noise_std: of the logarithm of the noise's deviation, pixels
      being in [-1, 1].
    dropout: share of clips whose image is zeros.
  """

  noise_mean: float = -3.0
  noise_std: float = 0.5
  dropout: float = 0.05

  def __post_init__(self):
    if not 0 <= self.dropout < 1:
      raise ValueError(f"image.dropout must be in [0, 1), got {self.dropout}")
    if self.noise_std < 0:
      raise ValueError(
        f"image.noise_std must not be negative, got {self.noise_std}"
      )


def make_loss(
  modules: networks.Modules,
  goal: Objective,
  image: Image | None = None,
  adapters: lora.Lora | None = None,
) -> states.Loss:
  """Make the loss.

  `params` hold what is trained: "denoiser" or adapters of it, and perhaps
  "text_encoder"; `frozen` the others that a batch needs, and "null", the empty
  caption's embeddings [M, E], where that stands for a dropped caption.

  Args:
    modules: the networks.
    goal: what for.
    image: how images are shown; None for a denoiser that takes none.
    adapters: of the denoiser; None has none.
  """

  def draw(batch: types.Batch, key: jax.Array) -> dict[str, jax.Array]:
    names = ("posterior", "drop", "time", "noise")
    names += ("image",) if image else ()
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
    drawn = {
      "t": schedules.snap(goal.schedule, t),
      "keep": jax.random.uniform(keys["drop"], (B, 1)) >= goal.caption_dropout,
      "tell": _tell(keys["drop"], B, goal.cond_dropout),
      "posterior": jax.random.split(keys["posterior"], B),
      "noise": jax.random.split(keys["noise"], B),
    }
    if image:
      drawn["image"] = jax.random.split(keys["image"], B)
    return drawn

  def terms(params: Any, frozen: Any, batch: types.Batch, drawn: Any):
    weights = frozen | params
    x0 = pipeline.encode_video(modules, frozen, batch, drawn["posterior"])
    cond = None
    if image:
      keys, f = drawn["image"], x0.shape[1]
      cond = show_images(modules, image, frozen, batch, f, keys)
    x0 = fill(x0, modules.denoiser.cfg.patch[0])
    eps = sampling.draw_noise(drawn["noise"], x0.shape[1:])
    text = _text(modules, weights, batch, drawn["keep"])
    cond = cond or told(batch.cond, drawn["tell"])
    run = _network(modules, weights, adapters, text, cond)
    return {"loss": _errors(run, goal, x0, eps, drawn["t"])}

  return states.Loss(draw, terms)


def make_validation(
  modules: networks.Modules,
  goal: Objective,
  levels: tuple[float, ...],
  image: Image | None = None,
  adapters: lora.Lora | None = None,
  sees_padding: bool = False,
) -> Callable[..., jax.Array]:
  """Make `validate(params, frozen, batch, seed)`: the loss at fixed levels.

  With the posterior's mean, every caption kept, a clean image and noise that
  only the seed decides: a number to compare between checkpoints and runs.

  Args:
    modules, goal, image, adapters: as of `make_loss`.
    levels: times in [0, 1].
    sees_padding: whether the text encoder sees padding; it does if the weights
      have "null".

  Returns:
    A function to the sum of the clips' losses at each level [levels], and the
    number of clips.
  """

  def validate(params: Any, frozen: Any, batch: types.Batch, seed: int):
    weights = frozen | params
    if sees_padding:
      batch = batch.replace(mask=jnp.ones_like(batch.mask))
    x0 = pipeline.encode_video(modules, frozen, batch, None)
    cond = None
    if image:
      f = x0.shape[1]
      cond = show_images(modules, image, frozen, batch, f, None)
    x0 = fill(x0, modules.denoiser.cfg.patch[0])
    text = _text(modules, weights, batch, jnp.ones((len(x0), 1), bool))
    key = jax.random.key(seed)
    eps = jax.random.normal(key, x0.shape, x0.dtype)
    run = _network(modules, weights, adapters, text, cond or batch.cond)

    def at(level):
      t = jnp.full(x0.shape[:1], level, jnp.float32)
      errors = _errors(run, goal, x0, eps, t)
      return jnp.sum(errors * batch.weight)

    return jax.lax.map(at, jnp.asarray(levels)), jnp.sum(batch.weight)

  return validate


def fill(x0: jax.Array, patch: int) -> jax.Array:
  """Repeat the first of latents [B, f, h, w, c] until patches are whole.

  CogVideoX 1.5 was trained so; where it samples, these frames are dropped.
  """
  return jnp.concatenate([x0[:, :1]] * (-x0.shape[1] % patch) + [x0], axis=1)


def show_images(
  modules: networks.Modules,
  how: Image,
  frozen: Any,
  batch: types.Batch,
  f: int,
  keys: jax.Array | None,
) -> types.Cond:
  """Condition on the first frames of a batch.

  Args:
    modules: the networks.
    how: noise and dropout.
    frozen: weights, with the autoencoder's.
    batch: clips, or their latents and images.
    f: latent frames of a clip.
    keys: of each clip [B]; without them images are clean and all are shown.
  """
  denoiser, file = modules.denoiser.cfg, networks.file(modules.denoiser)
  image = batch.video[:, 0] if batch.image is None else batch.image
  image, keep, noise = pipeline.to_float(image), 1.0, None
  frames = denoiser.time_stride * (f - 1) + 1
  if keys is not None:
    _, h, w, _ = file.latent_shape(denoiser, frames, *image.shape[1:3])
    keys = jax.vmap(lambda key: jax.random.split(key, 4))(keys)  # [B, 4]
    image = image + _image_noise(how, image.shape[1:], keys)
    noise = sampling.draw_noise(keys[:, 2], (1, h, w, denoiser.image_channels))
    keep = jax.vmap(jax.random.uniform)(keys[:, 3]) >= how.dropout
    keep = keep.reshape(-1, 1, 1, 1, 1)

  def encode(video):
    variables = {"params": frozen["autoencoder"]}
    return modules.autoencoder.apply(
      variables, video, noise, method="encode_condition"
    )

  video = jnp.pad(image[:, None], [(0, 0), (0, frames - 1), *[(0, 0)] * 3])
  given = np.arange(frames)[None].repeat(len(image), 0) == 0
  cond = file.condition(denoiser, video, given, encode)
  return jax.tree.map(lambda x: jax.lax.stop_gradient(x * keep), cond)


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


def _text(modules, weights, batch, keep) -> types.Text:
  """Encode captions, but those that are not kept, [B, 1]."""
  if "null" not in weights:
    batch = batch.replace(mask=batch.mask & keep)
    return pipeline.batch_text(modules, weights, batch)
  batch = batch.replace(mask=jnp.ones_like(batch.mask))  # padding is seen
  text = pipeline.batch_text(modules, weights, batch)
  null = weights["null"].astype(text.embeds.dtype)
  return text.replace(embeds=jnp.where(keep[..., None], text.embeds, null))


def _image_noise(how: Image, shape: tuple[int, ...], keys: jax.Array):
  """Draw the noise of images [B, H, W, 3] by the first two keys of each."""
  deviation = jnp.exp(
    how.noise_mean + how.noise_std * jax.vmap(jax.random.normal)(keys[:, 0])
  )
  noise = sampling.draw_noise(keys[:, 1], shape)
  return schedules.expand(deviation, noise) * noise


def _network(modules, weights, adapters, text, cond):
  """Return the network as a function of x_t and t."""
  variables = {"params": weights["denoiser"]}
  if adapters is not None:
    factors = weights[lora.PARAMS]
    variables = lora.variables(weights["denoiser"], factors, adapters.scale)
  return lambda x_t, t: modules.denoiser.apply(variables, x_t, t, text, cond)


def _errors(run, goal, x0, eps, t):
  """Loss of each clip [B]."""
  alpha, sigma = schedules.alpha_sigma(goal.schedule, t)
  x_t = objectives.add_noise(x0, eps, alpha, sigma)
  output = run(x_t, t)
  weight = objectives.loss_weight(
    goal.objective, alpha, sigma, goal.min_snr_gamma
  )
  return objectives.loss(goal.objective, output, x0, eps, alpha, sigma, weight)
