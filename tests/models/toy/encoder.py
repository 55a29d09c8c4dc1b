"""A text encoder that gives a pooled embedding of each text too."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from vdit_jax import sharding
from vdit_jax.nn import linear


@dataclasses.dataclass(frozen=True)
class Config:
  vocab_size: int = 64
  width: int = 8
  pooled_width: int = 6
  dtype: str = "float32"


VARIANTS = {"small": Config()}


def example(cfg):
  del cfg
  return jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1), bool)


class TextEncoder(nn.Module):
  cfg: Config

  @nn.compact
  def __call__(self, tokens, mask):
    init = sharding.boxed(nn.initializers.normal(1.0), ("vocab", "embed"))
    shape = self.cfg.vocab_size, self.cfg.width
    embeds = self.param("embedding", init, shape)[tokens]
    said = embeds if mask is None else embeds * mask[..., None]
    pool = linear.dense(
      self.cfg.pooled_width,
      ("embed", None),
      name="pool",
      dtype=jnp.float32,
      bias=False,
    )
    return embeds.astype(jnp.float32), jnp.tanh(pool(jnp.sum(said, 1)))
