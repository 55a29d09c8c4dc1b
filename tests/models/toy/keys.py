"""Config.json and checkpoint keys of the toy's networks."""

import jax.numpy as jnp

from tests.models.toy import autoencoder, denoiser, encoder
from vdit_jax.convert import configs, rules

_NAME = {"architectures": None}  # where a layout is its own


def _transformer(config, dtype):
  given = configs.fields(
    config, _NAME | {"channels": 3, "heads": 2, "tokens": (12, 7)}, {}
  )
  return denoiser.Config(
    latent_channels=given["channels"],
    image_channels=given["channels"],
    heads=given["heads"],
    text_tokens=tuple(given["tokens"]),
    dtype=jnp.dtype(dtype).name,
  )


def _vae(config, dtype):
  given = configs.fields(config, _NAME | {"shift": None, "factor": None}, {})
  return autoencoder.Config(
    shift=tuple(given["shift"]),
    factor=tuple(given["factor"]),
    dtype=jnp.dtype(dtype).name,
  )


def _text(config, dtype):
  config = {k: v for k, v in config.items() if k != "architectures"}
  given = configs.fields(config, {"vocab_size": 64}, {})
  return encoder.Config(given["vocab_size"], dtype=jnp.dtype(dtype).name)


def _table(*pairs):
  rows = [row for a, b in pairs for row in rules.dense(a, b, bias=False)]
  return lambda module: tuple(rows)


TRANSFORMER = rules.Component(
  module=denoiser.Denoiser,
  config=_transformer,
  example=denoiser.example,
  rules=_table(
    *((f"x.{n}_in", f"{n}_in") for n in ("patch", "text", "pooled", "time")),
    ("x.out", "out"),
    *((f"x.to_{n}", n) for n in "qkv"),
  ),
)
TEXT = rules.Component(
  module=encoder.TextEncoder,
  config=_text,
  example=encoder.example,
  rules=lambda module: (
    rules.Rule("table", "embedding"),
    *rules.dense("pool", "pool", bias=False),
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
