"""Our system: trained here from nothing, any of its frames may be given."""

from collections.abc import Mapping

from vdit_jax import types
from vdit_jax.models import system
from vdit_jax.models.vdit import autoencoder, denoiser, numbers


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
  numbers=lambda cfg: cfg.cond,
  number_cond=number_cond,
)
