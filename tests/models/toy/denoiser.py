"""A denoiser of one block, shown images by channels, text by its mean.

And by the pooled embedding, beside the noise level.
"""

import dataclasses
import math

import flax.linen as nn
import jax.numpy as jnp

from vdit_jax import sharding, types
from vdit_jax.nn import attention, compute, linear, patches, positions


@dataclasses.dataclass(frozen=True)
class Config(compute.Compute):
  latent_channels: int = 3
  image_channels: int = 3
  patch: tuple[int, int, int] = (2, 2, 2)
  heads: int = 2
  head_dim: int = 16
  text_width: int = 8
  pooled_width: int = 6
  text_tokens: tuple[int, ...] = (12, 7)
  given: tuple[int, ...] = ()
  image_width: int = 0


VARIANTS = {"small": Config()}


def example(cfg):
  embeds = jnp.zeros((1, 2, cfg.text_width))
  pooled = jnp.zeros((1, cfg.pooled_width))
  text = types.Text(embeds, jnp.ones((1, 2), bool), pooled)
  latents = jnp.zeros((1, *cfg.patch, cfg.latent_channels))
  return latents, jnp.zeros(1), text


class Denoiser(nn.Module):
  cfg: Config

  @nn.compact
  def __call__(self, x_t, t, text, cond=None):
    cfg = self.cfg
    width, dtype = cfg.heads * cfg.head_dim, jnp.dtype(cfg.dtype)
    shown = jnp.zeros((*x_t.shape[:4], cfg.image_channels))
    if cond is not None and cond.latents is not None:
      shown = cond.latents
    grid = tuple(n // p for n, p in zip(x_t.shape[1:4], cfg.patch, strict=True))
    x = jnp.concatenate([x_t, shown], -1)
    x = patches.cut(x, cfg.patch, "first").astype(dtype)
    x = _dense(width, "patch_in", dtype)(x)
    weight = text.mask[..., None].astype(jnp.float32)
    said = jnp.sum(text.embeds * weight, 1) / jnp.sum(weight, 1)
    x = x + _dense(width, "text_in", dtype)(said.astype(dtype))[:, None]
    pooled = text.pooled.astype(dtype)
    x = x + _dense(width, "pooled_in", dtype)(pooled)[:, None]
    if cfg.image_width:
      images = jnp.zeros((len(x), 1, cfg.image_width))
      if cond is not None and cond.image_embeds is not None:
        images = cond.image_embeds
      images = jnp.mean(images, 1).astype(dtype)
      x = x + _dense(width, "image_in", dtype)(images)[:, None]
    noise = positions.time_embedding(t, width).astype(dtype)
    x = x + _dense(width, "time_in", dtype)(noise)[:, None]
    x = sharding.constrain(x, "batch", "sequence", None)
    heads = lambda name: _dense(width, name, dtype, ("embed", "heads"))(
      x
    ).reshape(*x.shape[:2], cfg.heads, cfg.head_dim)
    y = attention.attend(
      *map(heads, ("q", "k", "v")), kernel=cfg.kernel, context=cfg.context
    )
    x = x + y.reshape(x.shape)
    features = cfg.latent_channels * math.prod(cfg.patch)
    x = _dense(features, "out", dtype)(x).astype(jnp.float32)
    return patches.join(x, grid, cfg.patch, "first")


def _dense(features, name, dtype, axes=(None, "embed")):
  return linear.dense(features, axes, name=name, dtype=dtype, bias=False)
