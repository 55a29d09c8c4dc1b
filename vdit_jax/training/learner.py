"""What of a config's task is compiled: networks, weights, loss, batch.

Made of the config alone, without data or weights, so that `vdit_jax.aot` can
compile what `train.py` runs.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax

from vdit_jax import encoding, types
from vdit_jax.data import reading
from vdit_jax.diffusion import schedules, shifts
from vdit_jax.models import families, networks
from vdit_jax.models.system import Modules
from vdit_jax.nn import lora
from vdit_jax.training import autoencoder, denoiser, given, images
from vdit_jax.training import state as states
from vdit_jax.weights import run_config

TASKS = ("autoencoder", "denoiser")


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

  modules: Modules
  init: Callable[[jax.Array], Any]
  loss: states.Loss
  frozen: Any


def make(config: ml_collections.ConfigDict) -> Learner:
  """Make the learner that a config names; refuse an unknown task."""
  check_task(config)
  autoencoder = config.task == "autoencoder"
  return _autoencoder(config) if autoencoder else _denoiser(config)


def check_task(config: ml_collections.ConfigDict) -> None:
  """Refuse a task that is not known."""
  if config.task not in TASKS:
    raise ValueError(f"task must be one of {TASKS}: {config.task!r}")


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
  fields = config.objective.to_dict()
  fields["schedule"] = schedules.Schedule(**fields["schedule"])
  if fields["shift"] is not None:
    fields["shift"] = shifts.read(fields["shift"])
  return denoiser.Objective(**fields)


def batch(
  config: ml_collections.ConfigDict, num_frames: int, height: int, width: int
) -> types.Batch:
  """Describe a global batch of clips of one size, as ShapeDtypeStructs.

  An autoencoder reads pixels; a denoiser latents' posteriors, as
  `vdit_jax.cache` writes them, embeddings if its text encoder is frozen, and
  the frames that it must be given, with what encoders made of them.
  """
  B, like = config.batch_size, jax.ShapeDtypeStruct
  described = types.Batch(
    video=None, weight=like((B,), jnp.float32), cond=_cond(config, like)
  )
  if config.task == "autoencoder":
    video = like((B, num_frames, height, width, 3), jnp.uint8)
    return described.replace(video=video)
  module = networks.build_module(config.autoencoder, "autoencoder")
  latents = module.latent_shape(num_frames, height, width)
  moments = like((B, *latents), jnp.float16)
  described = described.replace(
    moments=(moments, moments), captions=_captions(config, like)
  )
  if positions := needs(config):
    frames = like((B, len(positions), height, width, 3), jnp.uint8)
    clips = like((B, num_frames, height, width, 3), jnp.uint8)
    encoded = jax.tree.map(
      lambda x: like(x.shape, jnp.float16),
      images.describe(networks.build(config), clips),
    )
    described = described.replace(frames=frames, encoded=encoded)
  if takes(config):
    stills = like((B, num_frames, *latents[1:]), jnp.float16)
    described = described.replace(encoded={"autoencoder": stills})
  return described


def tokens(modules: Modules, latents: tuple[int, ...]) -> int:
  """Count the tokens of a clip; without a denoiser, its latents.

  Args:
    modules: of the learner.
    latents: their shape (f, h, w, ...).
  """
  patch = modules.denoiser.cfg.patch if modules.denoiser else (1, 1, 1)
  return math.prod(-(-n // p) for n, p in zip(latents, patch, strict=False))


def cond_names(config: ml_collections.ConfigDict) -> tuple[str, ...]:
  """Names of the numbers that a run's network is told of its clips."""
  if config.task != "denoiser":
    return ()
  system = families.system(config.denoiser.name)
  cfg = networks.build_module(config.denoiser, "denoiser").cfg
  return tuple(system.numbers(cfg))


def needs(config: ml_collections.ConfigDict) -> tuple[int, ...]:
  """Positions of the frames of its clips that a run's denoiser is given."""
  if config.task != "denoiser":
    return ()
  system = families.system(config.denoiser.name)
  cfg = networks.build_module(config.denoiser, "denoiser").cfg
  return system.needs(cfg)


def wanted(
  config: ml_collections.ConfigDict,
  words: Mapping[str, reading.Words] | None = None,
) -> reading.Wanted:
  """Say how a run's records become batches.

  Args:
    config: of the run.
    words: how captions are read, by text encoder; None reads none.
  """
  names = [field.name for field in dataclasses.fields(reading.Options)]
  options = reading.Options(**{name: config.data[name] for name in names})
  kept = bool(needs(config) or takes(config))
  return reading.Wanted(words or {}, options, cond_names(config), kept)


def _captions(config, like) -> dict[str, types.Captions]:
  """Describe a batch's captions, by text encoder."""
  found = {}
  for name, length in run_config.text_lengths(config).items():
    shape = config.batch_size, length
    mask = like(shape, jnp.bool_)
    if config.text_encoder_dir:
      module = networks.build_module(config[name], "text_encoder")
      text = encoding.describe_text(module, *shape)
      half = jax.tree.map(lambda x: like(x.shape, jnp.float16), text)
      found[name] = types.Captions(
        mask=mask, embeds=half.embeds, pooled=half.pooled
      )
    else:
      found[name] = types.Captions(mask=mask, tokens=like(shape, jnp.int32))
  return found


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
  module = networks.build_module(config.autoencoder, "autoencoder")
  return Learner(
    modules=networks.gather({"autoencoder": module}),
    init=lambda key: networks.init(module, key),
    loss=autoencoder.make_loss(
      module, l2_weight=config.l2_weight, kl_weight=config.kl_weight
    ),
    frozen={},
  )


def _denoiser(config) -> Learner:
  modules = networks.build(config)
  stride = modules.autoencoder.cfg.time_stride
  if takes(config) not in (0, stride):
    raise ValueError(
      f"denoiser.given must be 0 or the autoencoder's {stride} frames a latent "
      f"frame, got {takes(config)}"
    )
  adapters = adapters_of(config)
  described = jax.eval_shape(
    lambda: networks.init_denoiser(modules, jax.random.key(0))
  )

  def init(key: jax.Array) -> dict[str, Any]:
    if adapters:
      return {lora.PARAMS: lora.init(described["denoiser"], adapters, key)}
    params = networks.init_denoiser(modules, key)
    if config.text_encoder_dir:
      params = {"denoiser": params["denoiser"]}
    return params

  def first() -> Any:
    return networks.init(modules.autoencoder, jax.random.key(0))

  frozen = {"autoencoder": jax.eval_shape(first)}
  if adapters:
    frozen["denoiser"] = _cast(described["denoiser"], adapters.base_dtype)
  lengths = run_config.text_lengths(config)
  row = lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype)
  nulls = {
    name: jax.tree.map(
      row, encoding.describe_text(modules[name], 1, lengths[name])
    )
    for name, rule in modules.system.text.items()
    if rule.null == "prompt"
  }
  if nulls:
    frozen["null"] = nulls
  loss = denoiser.make_loss(modules, objective(config), **options(config))
  return Learner(modules=modules, init=init, loss=loss, frozen=frozen)


def options(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Read what else a denoiser's loss and validation are made of."""
  return {"show": _show(config), "adapters": adapters_of(config)}


def takes(config: ml_collections.ConfigDict) -> int:
  """Frames of a latent frame that a denoiser takes one by one, or 0."""
  if config.task != "denoiser":
    return 0
  system = families.system(config.denoiser.name)
  return system.takes(networks.build_module(config.denoiser, "denoiser").cfg)


def _show(config) -> denoiser.Show | None:
  """Read how a run's clips show frames of theirs."""
  if needs(config):
    return images.shower(types.Image(**config.image))
  if takes(config):
    return given.shower(given.Shares(**config.given))
  return None


def adapters_of(config: ml_collections.ConfigDict) -> lora.Lora | None:
  """Read which adapters a run trains; None for none."""
  cfg = lora.of(config)
  return cfg if cfg.rank else None


def _cast(boxed: Any, dtype: str) -> Any:
  return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), boxed)
