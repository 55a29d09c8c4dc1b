"""A network that makes embeddings of frames: one of each quarter."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp

from vdit_jax.nn import linear


@dataclasses.dataclass(frozen=True)
class Config:
  width: int = 8
  dtype: str = "float32"


VARIANTS = {"small": Config()}


def example(cfg):
  del cfg
  return (jnp.zeros((1, 4, 4, 3)),)


class ImageEncoder(nn.Module):
  cfg: Config

  @nn.compact
  def __call__(self, images):
    B, H, W, C = images.shape
    quarters = images.reshape(B, 2, H // 2, 2, W // 2, C).mean((2, 4))
    dense = linear.dense(
      self.cfg.width, (None, None), name="out", dtype=jnp.float32, bias=False
    )
    return jnp.sin(dense(quarters.reshape(B, 4, C)))
