"""The networks of a run, without weights: built, initialised, sized."""

import dataclasses
import importlib
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from vdit_jax import types

# Files of the networks that configs name.
_FILES = {
  "causal_vae": "vdit.autoencoder",
  "cogvideox": "cogvideox.denoiser",
  "cogvideox_vae": "cogvideox.autoencoder",
  "t5": "t5.encoder",
  "vdit": "vdit.denoiser",
}


@dataclasses.dataclass(frozen=True)
class Modules:
  """The three networks, without weights."""

  autoencoder: nn.Module
  text_encoder: nn.Module
  denoiser: nn.Module


def build(config: ml_collections.ConfigDict) -> Modules:
  """Build the networks that a run's config describes."""
  return Modules(
    autoencoder=build_module(config.autoencoder, "Autoencoder"),
    text_encoder=build_module(config.text_encoder, "TextEncoder"),
    denoiser=build_module(config.denoiser, "Denoiser"),
  )


def build_module(group: ml_collections.ConfigDict, kind: str) -> nn.Module:
  """Build one network: `name` is its file, the other fields its Config's."""
  fields = dict(group)
  file = importlib.import_module(
    f"vdit_jax.models.{_FILES[fields.pop('name')]}"
  )
  return getattr(file, kind)(file.Config(**fields))


def with_dtype(modules: Modules, dtype: Any) -> Modules:
  """Let networks compute in another dtype; None leaves theirs."""
  if dtype is None:
    return modules
  name = jnp.dtype(dtype).name
  change = lambda x: x.clone(cfg=dataclasses.replace(x.cfg, dtype=name))  # noqa: E731
  fields = {
    f.name: getattr(modules, f.name) for f in dataclasses.fields(modules)
  }
  return Modules(**{k: change(v) for k, v in fields.items()})


def tiled(modules: Modules) -> Modules:
  """Let a released autoencoder run in overlapping tiles; refuse ours."""
  module = modules.autoencoder
  if not hasattr(module.cfg, "tiled"):
    raise ValueError(
      f"tiled is for released autoencoders; {type(module).__module__} has no "
      "tiles, and its rows are split over devices by mesh.context"
    )
  cfg = dataclasses.replace(module.cfg, tiled=True)
  return dataclasses.replace(modules, autoencoder=module.clone(cfg=cfg))


def file(module: nn.Module) -> Any:
  """Return the file of a network, which has its family's functions."""
  return importlib.import_module(type(module).__module__)


def latent_shape(
  autoencoder: nn.Module, num_frames: int, height: int, width: int
) -> tuple[int, int, int, int]:
  """Latents (f, h, w, c) of a video; refuses a size that does not fit."""
  return file(autoencoder).latent_shape(
    autoencoder.cfg, num_frames, height, width
  )


def denoised_shape(
  modules: Modules, num_frames: int, height: int, width: int
) -> tuple[int, int, int, int]:
  """Latents (f, h, w, c) that a denoiser works on to make a video.

  Those of the autoencoder, or more that fill up patches where a family does
  so; refuses a size that does not fit.
  """
  cfg, size = modules.denoiser.cfg, (num_frames, height, width)
  if hasattr(file(modules.denoiser), "latent_shape"):
    return file(modules.denoiser).latent_shape(cfg, *size)
  shape = latent_shape(modules.autoencoder, *size)
  strides = modules.autoencoder.cfg
  per = strides.time_stride, strides.space_stride, strides.space_stride
  names = "num_frames", "height", "width"
  for name, n, p, s in zip(names, shape[:3], cfg.patch, per, strict=True):
    if n % p:
      near = max(round(n / p), 1) * p
      asked, near = (
        ((m - 1) * s + 1 if name == "num_frames" else m * s) for m in (n, near)
      )
      raise ValueError(
        f"{name} {asked} gives {n} latents, which patches of {p} do not "
        f"divide; try {near}"
      )
  return shape


def tell(
  denoiser: nn.Module,
  B: int,
  known: Mapping[str, float],
  numbers: Mapping[str, float] | None,
) -> types.Cond | None:
  """Say numbers of B clips to be made to a denoiser; None if it takes none.

  Args:
    denoiser: the network.
    B: clips.
    known: of the clips by name, said if the denoiser takes them.
    numbers: asked for, in place of what is known; refused if not taken.
  """
  if not getattr(denoiser.cfg, "cond", ()):
    if numbers:
      raise ValueError(
        f"numbers must be None, got {dict(numbers)}: this denoiser was told "
        "none in training; leave them out"
      )
    return None
  family = file(denoiser)
  taken = family.told_names(denoiser.cfg)
  told = {name: value for name, value in known.items() if name in taken}
  return family.tell(denoiser.cfg, B, told | dict(numbers or {}))


def init_denoiser(modules: Modules, key: jax.Array) -> dict[str, Any]:
  """Initialise the trained networks, boxed with their logical axes."""
  text_key, denoiser_key = jax.random.split(key)
  tokens, mask = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)
  denoiser, inputs = modules.denoiser, _example(modules)
  return {
    "text_encoder": modules.text_encoder.init(text_key, tokens, mask)["params"],
    "denoiser": denoiser.init(denoiser_key, *inputs)["params"],
  }


def init_autoencoder(module: nn.Module, key: jax.Array) -> dict[str, Any]:
  """Initialise an autoencoder, boxed with its logical axes."""
  side = module.cfg.space_stride
  video = jnp.zeros((1, module.cfg.time_stride + 1, side, side, 3))
  return module.init(key, video, key)["params"]  # pyright: ignore[reportReturnType]


def _example(modules: Modules) -> tuple[Any, ...]:
  """Inputs to initialise a denoiser with: its file's, or the smallest."""
  cfg, family = modules.denoiser.cfg, file(modules.denoiser)
  if hasattr(family, "example"):
    return family.example(cfg)
  latents = jnp.zeros((1, *cfg.patch, cfg.latent_channels))
  embeds = jnp.zeros((1, 1, modules.text_encoder.cfg.width))
  text = types.Text(embeds=embeds, mask=jnp.ones((1, 1), bool))
  return latents, jnp.zeros(1), text
