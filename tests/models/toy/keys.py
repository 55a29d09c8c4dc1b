"""Config.json and checkpoint keys of the toy's networks."""

import jax.numpy as jnp

from tests.models.toy import autoencoder, denoiser, encoder, image_encoder
from vdit_jax.convert import configs, rules

_NAME = {"architectures": None}  # where a layout is its own


def _transformer(config, dtype):
  given = configs.fields(
    config,
    _NAME
    | {"channels": 3, "heads": 2, "tokens": (12, 7)}
    | {"given": (), "image_width": 0},
    {},
  )
  return denoiser.Config(
    latent_channels=given["channels"],
    image_channels=given["channels"],
    heads=given["heads"],
    text_tokens=tuple(given["tokens"]),
    given=tuple(given["given"]),
    image_width=given["image_width"],
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
  rules=lambda module: _table(
    *((f"x.{n}_in", f"{n}_in") for n in ("patch", "text", "pooled", "time")),
    *((("x.image_in", "image_in"),) * (module.cfg.image_width > 0)),
    ("x.out", "out"),
    *((f"x.to_{n}", n) for n in "qkv"),
  )(module),
)
IMAGE = rules.Component(
  module=image_encoder.ImageEncoder,
  config=lambda config, dtype: image_encoder.Config(
    configs.fields(config, _NAME | {"width": 8}, {})["width"],
    jnp.dtype(dtype).name,
  ),
  example=image_encoder.example,
  rules=_table(("out", "out")),
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
