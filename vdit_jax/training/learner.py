"""What of a config's task is compiled: networks, weights, loss, batch.

Made of the config alone, without data or weights, so that `vdit_jax.aot` can
compile what `train.py` runs.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from vdit_jax import types
from vdit_jax.diffusion import schedules
from vdit_jax.models import networks
from vdit_jax.nn import lora
from vdit_jax.training import autoencoder, denoiser, images
from vdit_jax.training import state as states
from vdit_jax.weights import workdir


@dataclasses.dataclass(frozen=True)
class Learner:
  """The compiled part of a task.

  Attributes:
    modules: the networks that are built; None where a task has none.
    init: key -> params, boxed with logical axes.
    loss: of the params.
    frozen: weights that the loss may use and does not train, as boxed
      ShapeDtypeStructs.
  """

  modules: networks.Modules
  init: Callable[[jax.Array], Any]
  loss: states.Loss
  frozen: Any


def make(config: ml_collections.ConfigDict) -> Learner:
  """Make the learner that a config names; refuse an unknown task."""
  known = {"autoencoder": _autoencoder, "denoiser": _denoiser}
  if config.task not in known:
    raise ValueError(f"task must be one of {sorted(known)}: {config.task!r}")
  return known[config.task](config)


def make_step(
  config: ml_collections.ConfigDict,
  loss: states.Loss,
  tx: optax.GradientTransformation,
  learning_rate: optax.Schedule,
) -> Callable:
  """Make the training step that a config describes; see `training.state`."""
  return states.make_step(
    loss,
    tx,
    learning_rate,
    seed=config.seed,
    ema_decay=config.ema_decay,
    accumulate=config.accumulate,
    skip_nonfinite=config.guard.nonfinite == "skip",
  )


def objective(config: ml_collections.ConfigDict) -> denoiser.Objective:
  """Read a config's training objective."""
  fields = dict(config.objective)
  schedule = schedules.Schedule(**fields.pop("schedule"))
  return denoiser.Objective(schedule=schedule, **fields)


def batch(
  config: ml_collections.ConfigDict, num_frames: int, height: int, width: int
) -> types.Batch:
  """Describe a global batch of clips of one size, as ShapeDtypeStructs.

  An autoencoder reads pixels; a denoiser latents' posteriors, as
  `vdit_jax.cache` writes them, embeddings if its text encoder is frozen, and
  the images that it is shown.
  """
  B, M = config.batch_size, config.data.max_length
  like = jax.ShapeDtypeStruct
  described = types.Batch(
    video=None,
    tokens=like((B, M), jnp.int32),
    mask=like((B, M), jnp.bool_),
    weight=like((B,), jnp.float32),
    cond=_cond(config, like),
  )
  if config.task == "autoencoder":
    video = like((B, num_frames, height, width, 3), jnp.uint8)
    return described.replace(video=video)
  module = networks.build_module(config.autoencoder, "Autoencoder")
  latents = networks.latent_shape(module, num_frames, height, width)
  moments = like((B, *latents), jnp.float16)
  described = described.replace(moments=(moments, moments))
  if config.text_encoder_dir:
    embeds = like((B, M, config.text_encoder.width), jnp.float16)
    described = described.replace(tokens=None, embeds=embeds)
  if "image" in config:
    image = like((B, height, width, 3), jnp.uint8)
    described = described.replace(image=image)
  return described


def tokens(modules: networks.Modules, latents: tuple[int, ...]) -> int:
  """Count the tokens of a clip; without a denoiser, its latents.

  Args:
    modules: of the learner.
    latents: their shape (f, h, w, ...).
  """
  patch = modules.denoiser.cfg.patch if modules.denoiser else (1, 1, 1)
  return math.prod(-(-n // p) for n, p in zip(latents, patch, strict=False))


def cond_names(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """Names of the numbers that a run's network is told of its clips."""
  if config.task != "denoiser" or "cond" not in config.denoiser:
    return ()  # of configs older than this choice, and of other networks
  return tuple(config.denoiser.cond)


def _cond(config, like) -> types.Cond | None:
  """Describe the numbers of a batch."""
  names, B = cond_names(config), config.batch_size
  scores = len(set(names) - {"fps", "size"})
  if not names:
    return None
  return types.Cond(
    fps=like((B,), jnp.float32) if "fps" in names else None,
    size=like((B, 2), jnp.float32) if "size" in names else None,
    scores=like((B, scores), jnp.float32) if scores else None,
  )


def _autoencoder(config) -> Learner:
  module = networks.build_module(config.autoencoder, "Autoencoder")
  return Learner(
    modules=networks.Modules(module, None, None),
    init=lambda key: networks.init_autoencoder(module, key),
    loss=autoencoder.make_loss(
      module, l2_weight=config.l2_weight, kl_weight=config.kl_weight
    ),
    frozen={},
  )


def _denoiser(config) -> Learner:
  modules = networks.build(config)
  cfg = lora.of(config)
  described = jax.eval_shape(
    lambda: networks.init_denoiser(modules, jax.random.key(0))
  )

  def init(key: jax.Array) -> dict[str, Any]:
    if cfg.rank:
      return {lora.PARAMS: lora.init(described["denoiser"], cfg, key)}
    params = networks.init_denoiser(modules, key)
    if config.text_encoder_dir:
      del params["text_encoder"]
    return params

  def first() -> Any:
    return networks.init_autoencoder(modules.autoencoder, jax.random.key(0))

  frozen = {"autoencoder": jax.eval_shape(first)}
  if cfg.rank:
    frozen["denoiser"] = _cast(described["denoiser"], cfg.base_dtype)
  if workdir.recipe(config).sees_padding:
    shape = config.data.max_length, config.text_encoder.width
    frozen["null"] = jax.ShapeDtypeStruct(shape, jnp.float32)
  loss = denoiser.make_loss(modules, objective(config), **options(config))
  return Learner(modules=modules, init=init, loss=loss, frozen=frozen)


def options(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Read what else a denoiser's loss and validation are made of."""
  cfg = lora.of(config)
  image = images.Image(**config.image) if "image" in config else None
  return {"image": image, "adapters": cfg if cfg.rank else None}


def _cast(boxed: Any, dtype: str) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), boxed)
