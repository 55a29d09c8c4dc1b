"""Config.json and checkpoint keys of the toy's networks."""

import jax.numpy as jnp

from tests.models.toy import autoencoder, denoiser
from vdit_jax.convert import configs, rules


def _transformer(config, dtype):
  given = configs.fields(
    config, {"channels": 3, "heads": 2, "tokens": (12, 7)}, {}
  )
  return denoiser.Config(
    latent_channels=given["channels"],
    image_channels=given["channels"],
    heads=given["heads"],
    text_tokens=tuple(given["tokens"]),
    dtype=jnp.dtype(dtype).name,
  )


def _vae(config, dtype):
  given = configs.fields(config, {"shift": None, "factor": None}, {})
  return autoencoder.Config(
    shift=tuple(given["shift"]),
    factor=tuple(given["factor"]),
    dtype=jnp.dtype(dtype).name,
  )


def _table(*pairs):
  rows = [row for a, b in pairs for row in rules.dense(a, b, bias=False)]
  return lambda module: tuple(rows)


TRANSFORMER = rules.Component(
  module=denoiser.Denoiser,
  config=_transformer,
  example=denoiser.example,
  rules=_table(
    *((f"x.{n}", n) for n in ("patch_in", "text_in", "time_in", "out")),
    *((f"x.to_{n}", n) for n in "qkv"),
  ),
)
VAE = rules.Component(
  module=autoencoder.Autoencoder,
  config=_vae,
  example=autoencoder.example,
  rules=lambda module: (
    *rules.dense("enc", "encoder"),
    *rules.dense("dec", "decoder"),
  ),
)
