"""Config.json and checkpoint keys of the toy's networks."""

import jax.numpy as jnp

from tests.models.toy import autoencoder, denoiser, encoder, image_encoder
from vdit_jax import schema
from vdit_jax.convert import configs, rules

# A layout of its own says the class as `architectures`.
_NAME = {"architectures": configs.words(None, most=1)}
_THREE = schema.Field(list, 3, 3, each=schema.Field(float))


def _transformer(given, dtype):
  return denoiser.Config(
    latent_channels=given["channels"],
    image_channels=given["channels"],
    heads=given["heads"],
    text_tokens=tuple(given["tokens"]),
    given=tuple(given["given"]),
    image_width=given["image_width"],
    dtype=jnp.dtype(dtype).name,
  )


def _vae(given, dtype):
  return autoencoder.Config(
    shift=tuple(given["shift"]),
    factor=tuple(given["factor"]),
    dtype=jnp.dtype(dtype).name,
  )


def _text(given, dtype):
  return encoder.Config(given["vocab_size"], dtype=jnp.dtype(dtype).name)


def _table(*pairs):
  rows = [row for a, b in pairs for row in rules.dense(a, b, bias=False)]
  return lambda module: tuple(rows)


TRANSFORMER = rules.Component(
  module=denoiser.Denoiser,
  fields=configs.Table(
    _NAME
    | dict(
      channels=configs.size(3),
      heads=configs.size(2),
      tokens=configs.sizes((12, 7), most=2),
      given=configs.Row((), schema.Field(list, each=schema.Field(int))),
      image_width=configs.whole(0, low=0),
    )
  ),
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
  fields=configs.Table(_NAME | {"width": configs.size(8)}),
  config=lambda given, dtype: image_encoder.Config(
    given["width"], jnp.dtype(dtype).name
  ),
  example=image_encoder.example,
  rules=_table(("out", "out")),
)
TEXT = rules.Component(
  module=encoder.TextEncoder,
  fields=configs.Table(_NAME | {"vocab_size": configs.size(64)}),
  config=_text,
  example=encoder.example,
  rules=lambda module: (
    rules.Rule("table", "embedding"),
    *rules.dense("pool", "pool", bias=False),
  ),
)
VAE = rules.Component(
  module=autoencoder.Autoencoder,
  fields=configs.Table(
    _NAME
    | {n: configs.Row(configs.REQUIRED, _THREE) for n in ("shift", "factor")}
  ),
  config=_vae,
  example=autoencoder.example,
  rules=lambda module: (
    *rules.dense("enc", "encoder"),
    *rules.dense("dec", "decoder"),
  ),
)
