"""Our system: trained here from nothing, any of its frames may be given."""

from collections.abc import Mapping

import jax
import numpy as np

from vdit_jax import types
from vdit_jax.models import system
from vdit_jax.models.vdit import autoencoder, denoiser, given, numbers


def number_cond(
  cfg: denoiser.Config,
  B: int,
  known: Mapping[str, float],
  asked: Mapping[str, float],
) -> types.Cond | None:
  """Tell of B clips what is known and taken, and what is asked for."""
  if not cfg.cond:
    return system.refuse_numbers(cfg, B, known, asked)
  taken = numbers.names(cfg.cond)
  told = {name: value for name, value in known.items() if name in taken}
  return numbers.cond_of(cfg.cond, B, told | dict(asked))


def condition(
  modules: system.Modules,
  apply: system.Apply,
  frames: jax.Array,
  mask: np.ndarray,
  draw: system.Draw,
) -> types.Given:
  """Give any frames: alone, or as latent frames whose noise level is 0."""
  any_frame = modules.denoiser.cfg.given > 0
  give = given.condition if any_frame else system.give_frames
  return give(modules, apply, frames, mask, draw)


def check(modules: system.Modules, where: str) -> None:
  """Refuse networks of different systems."""
  system.check_widths(modules, where)
  if n := modules.denoiser.cfg.given:
    what = "frames a latent frame of denoiser.given and autoencoder"
    system.check_equal(where, what, n, modules.autoencoder.cfg.time_stride)


SYSTEM = system.System(
  name="vdit",
  networks=(
    system.Network(
      family="vdit",
      kind="denoiser",
      module=denoiser.Denoiser,
      config=denoiser.Config,
      variants=denoiser.VARIANTS,
      example=denoiser.example,
      layers=("depth",),
    ),
    system.Network(
      family="vdit",
      kind="autoencoder",
      module=autoencoder.Autoencoder,
      config=autoencoder.Config,
      variants=autoencoder.VARIANTS,
      example=autoencoder.example,
      layers=("blocks",),
      former_names=("causal_vae",),
    ),
  ),
  places={
    "autoencoder": system.Place("autoencoder"),
    "text_encoder": system.Place("text_encoder", "tokenizer"),
    "denoiser": system.Place("denoiser"),
  },
  check=check,
  takes=lambda cfg: cfg.given,
  condition=condition,
  numbers=lambda cfg: cfg.cond,
  number_cond=number_cond,
)
