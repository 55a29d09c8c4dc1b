"""T5's encoder: captions' tokens in, one embedding a token out.

The form of T5 (arXiv:1910.10683): pre-norm blocks without biases, relative
position biases in buckets, attention logits not scaled by the head dim. It
serves as our own small text encoder, trained with the denoiser, and as the
released encoders: T5 v1.0 and v1.1, Flan-T5 (v1.1's shape), mT5
(arXiv:2010.11934) and UMT5 (arXiv:2304.09151), where each layer has a position
bias of its own.
"""

import dataclasses
import functools
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdit_jax import schema, sharding
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

  def __post_init__(self):
    schema.check("text_encoder", vars(self), LIMITS)


# The bounds of the buckets are counted out.
LIMITS = {
  "buckets": schema.Field(int, 4, 256),
  "max_distance": schema.Field(int, 1, 2**14),
}
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
  "v1_1_xl": Config(width=2048, heads=32, mlp_width=5120),
  "v1_1_xxl": Config(),
  "mt5_xxl": Config(vocab_size=250112),
  "umt5_xxl": Config(vocab_size=256384, layer_bias=True),
}


def example(cfg: Config) -> tuple[jax.Array, jax.Array]:
  """Inputs as small as may be, to initialise an encoder with."""
  del cfg
  tokens = jnp.zeros((1, 1), jnp.int32)
  return tokens, jnp.ones((1, 1), bool)


class TextEncoder(nn.Module):
  """Encode a caption's tokens; see `__call__`."""

  cfg: Config

  @nn.compact
  def __call__(self, tokens: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Apply the encoder.

    The blocks are unrolled, not scanned over stacked parameters: what we have
    trained has them by name, and all 24 of XXL lower and compile in 2 seconds
    of a CPU (XLA's CPU compiler).

    Args:
      tokens: ids [B, M].
      mask: True on tokens, bool [B, M]. None lets every token see all of
        them, the padding too: some systems were trained so.

    Returns:
      The embeddings, float32 [B, M, E].
    """
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
    self, x: jax.Array, mask: jax.Array | None, bias: jax.Array
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
    self, x: jax.Array, mask: jax.Array | None, bias: jax.Array
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
  starts = _logarithmic_starts(exact, half - exact, max_distance)
  logarithmic = exact + sum((far >= d).astype(jnp.int32) for d in starts)
  near = jnp.where(far < exact, far, logarithmic)
  return near + half * (distance > 0)


@functools.cache  # each layer of UMT5 asks
def _logarithmic_starts(exact: int, steps: int, max_distance: int) -> list[int]:
  """First distance of each logarithmic bucket but the first one.

  Bucket n begins where steps log(d / exact) / log(max_distance / exact) is n.
  That is found in integers: a logarithm that is off by one unit in the last
  place, as an accelerator's may be, puts d = 16 or 32 into another bucket.
  """
  return [
    next(
      d
      for d in itertools.count(exact)
      if d**steps * exact**n >= max_distance**n * exact**steps
    )
    for n in range(1, steps)
  ]


def _dense(cfg, features, axes, name):
  dtype = jnp.dtype(cfg.dtype)
  return linear.dense(features, axes, name=name, dtype=dtype, bias=False)
