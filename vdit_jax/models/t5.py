"""T5's encoder: captions' tokens in, one embedding a token out.

The form of T5 (arXiv:1910.10683): pre-norm blocks without biases, relative
position biases in buckets, attention logits not scaled by the head dim. It
serves as our own small text encoder, trained with the denoiser.
"""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdit_jax import sharding
from vdit_jax.nn import attention, linear, norms


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape of the encoder.

  Attributes:
    vocab_size, width, depth, heads, head_dim, mlp_width: sizes.
    gated: v1.1's gated GELU (tanh form) in place of v1.0's ReLU.
    buckets: relative positions told apart, both directions together.
    max_distance: positions further than this share the last bucket.
    layer_bias: a position bias for each layer (UMT5) and not one for all.
    eps: of the norms.
    dtype: compute type.
  """

  vocab_size: int = 32128
  width: int = 4096
  depth: int = 24
  heads: int = 64
  head_dim: int = 64
  mlp_width: int = 10240
  gated: bool = True
  buckets: int = 32
  max_distance: int = 128
  layer_bias: bool = False
  eps: float = 1e-6
  dtype: str = "bfloat16"


VARIANTS = {
  "digits": Config(
    vocab_size=64,
    width=128,
    depth=2,
    heads=4,
    head_dim=32,
    mlp_width=256,
    dtype="float32",
  ),
  "v1_1_xxl": Config(),
}


class TextEncoder(nn.Module):
  """Encode token ids [B, M] with mask bool [B, M] to [B, M, E] float32."""

  cfg: Config

  @nn.compact
  def __call__(self, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    cfg = self.cfg
    init = sharding.boxed(nn.initializers.normal(1.0), ("vocab", "embed"))
    shape = cfg.vocab_size, cfg.width
    embedding = self.param("embedding", init, shape)
    x = embedding[tokens].astype(cfg.dtype)  # [B, M, E]
    bias = None
    for i in range(cfg.depth):
      if bias is None or cfg.layer_bias:
        bias = PositionBias(cfg, name=f"position_bias_{i}")(tokens.shape[1])
      x = Block(cfg, name=f"block_{i}")(x, mask, bias)
    norm = norms.RMSNorm(cfg.eps, axis="embed", name="norm_out")
    return norm(x).astype(jnp.float32)


class Block(nn.Module):
  """Self-attention and MLP, each behind a norm: [B, M, E] -> same."""

  cfg: Config

  @nn.compact
  def __call__(
    self, x: jax.Array, mask: jax.Array, bias: jax.Array
  ) -> jax.Array:
    norm_1 = norms.RMSNorm(self.cfg.eps, axis="embed", name="norm_1")
    norm_2 = norms.RMSNorm(self.cfg.eps, axis="embed", name="norm_2")
    x = x + SelfAttention(self.cfg, name="attention")(norm_1(x), mask, bias)
    return x + Mlp(self.cfg, name="mlp")(norm_2(x))


class SelfAttention(nn.Module):
  """Attend with a position bias [N, M, M] and unscaled logits."""

  cfg: Config

  @nn.compact
  def __call__(
    self, x: jax.Array, mask: jax.Array, bias: jax.Array
  ) -> jax.Array:
    cfg, inner = self.cfg, self.cfg.heads * self.cfg.head_dim
    q, k, v = (
      _dense(cfg, inner, ("embed", "heads"), name)(x).reshape(
        *x.shape[:2], cfg.heads, cfg.head_dim
      )
      for name in ("q", "k", "v")
    )
    y = attention.dot(q, k, v, mask=mask, bias=bias, scale=1.0)
    y = y.reshape(*x.shape[:2], inner)
    return _dense(cfg, cfg.width, ("heads", "embed"), "out")(y)


class Mlp(nn.Module):
  """T5's feed-forward layer: [B, M, E] -> same."""

  cfg: Config

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    cfg, axes = self.cfg, ("embed", "mlp")
    h = _dense(cfg, cfg.mlp_width, axes, "wi_0")(x)
    if cfg.gated:
      gate = nn.gelu(h, approximate=True)
      h = gate * _dense(cfg, cfg.mlp_width, axes, "wi_1")(x)
    else:
      h = nn.relu(h)
    return _dense(cfg, cfg.width, ("mlp", "embed"), "wo")(h)


class PositionBias(nn.Module):
  """Bias of the logits by relative position: M -> [N, M, M] float32."""

  cfg: Config

  @nn.compact
  def __call__(self, length: int) -> jax.Array:
    cfg = self.cfg
    init = sharding.boxed(nn.initializers.normal(0.1), (None, "heads"))
    table = self.param("embedding", init, (cfg.buckets, cfg.heads))
    place = jnp.arange(length)
    distance = place[None, :] - place[:, None]  # key - query
    bucket = relative_bucket(distance, cfg.buckets, cfg.max_distance)
    return jnp.moveaxis(table[bucket].astype(jnp.float32), -1, 0)


def relative_bucket(
  distance: jax.Array, buckets: int, max_distance: int
) -> jax.Array:
  """Bucket of a relative position, key - query, any shape.

  Half of the buckets are for keys ahead. Of each half the first half are
  single distances and the rest grow logarithmically up to max_distance.
  """
  half = buckets // 2
  exact = half // 2
  far = jnp.abs(distance)
  ratio = jnp.log(jnp.maximum(far, 1) / exact) / jnp.log(max_distance / exact)
  logarithmic = exact + (ratio * (half - exact)).astype(jnp.int32)
  near = jnp.where(far < exact, far, jnp.minimum(logarithmic, half - 1))
  return near + half * (distance > 0)


def _dense(cfg, features, axes, name):
  dtype = jnp.dtype(cfg.dtype)
  return linear.dense(features, axes, name=name, dtype=dtype, bias=False)
