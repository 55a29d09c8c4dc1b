"""CLIP's vision tower: images in, one embedding a patch out.

The ViT of arXiv:2103.00020 and of OpenCLIP: pre-norm blocks over patches and a
class token, with learned positions. Image-to-video takes the tokens before the
last block, which is left for what CLIP itself was trained for.
"""

import dataclasses
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdit_jax import sharding
from vdit_jax.nn import attention, compute, linear, norms, patches

ACTIVATIONS = ("gelu", "quick_gelu")


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape of the encoder.

  Attributes:
    width, depth, heads, mlp_width: sizes.
    patch, image: pixels of a patch's side and of an image's.
    activation: "gelu", or OpenAI's "quick_gelu".
    eps: of the norms.
    dtype: compute type.
  """

  width: int = 1280
  depth: int = 32
  heads: int = 16
  mlp_width: int = 5120
  patch: int = 14
  image: int = 224
  activation: str = "gelu"
  eps: float = 1e-5
  dtype: str = "bfloat16"

  def __post_init__(self):
    compute.check_choice(self, "activation", ACTIVATIONS)
    for name, whole, part in (
      ("width", self.width, self.heads),
      ("image", self.image, self.patch),
    ):
      if whole % part:
        raise ValueError(f"{name} must be a multiple of {part}, got {whole}")

  @property
  def tokens(self) -> int:
    """S: those of the patches, and the class token."""
    return (self.image // self.patch) ** 2 + 1


VARIANTS = {"vit_h_14": Config()}


def example(cfg: Config) -> tuple[jax.Array]:
  """Inputs as small as may be, to initialise an encoder with."""
  return (jnp.zeros((1, cfg.image, cfg.image, 3)),)


class VisionEncoder(nn.Module):
  """Encode images that `pictures.prepare` has prepared."""

  cfg: Config

  def setup(self) -> None:
    cfg, norm = self.cfg, functools.partial(norms.LayerNorm, self.cfg.eps)
    self.embedder = Embedder(cfg)
    self.norm_in, self.norm_out = norm(), norm()
    self.layers = [Block(cfg) for _ in range(cfg.depth)]

  def __call__(self, images: jax.Array) -> jax.Array:
    """Encode images [B, H, W, 3] to one embedding each, float32 [B, E]."""
    x = self.layers[-1](self._inner(images))
    return self.norm_out(x[:, 0].astype(jnp.float32))

  def penultimate(self, images: jax.Array) -> jax.Array:
    """Encode images to the tokens before the last block, float32 [B, S, E]."""
    return self._inner(images).astype(jnp.float32)

  def _inner(self, images):
    x = self.norm_in(self.embedder(images))
    for layer in self.layers[:-1]:
      x = layer(x)
    return x


class Embedder(nn.Module):
  """Patches with their positions behind a class token: -> [B, S, E]."""

  cfg: Config

  @nn.compact
  def __call__(self, images: jax.Array) -> jax.Array:
    cfg, normal = self.cfg, nn.initializers.normal(0.02)
    if images.shape[1:] != (cfg.image, cfg.image, 3):
      raise ValueError(
        f"images must be [B, {cfg.image}, {cfg.image}, 3], got {images.shape}; "
        "make them so with `pictures.prepare`"
      )
    cut = patches.cut(images[:, None], (1, cfg.patch, cfg.patch), "first")
    x = _dense(cfg, cfg.width, (None, "embed"), "patch_in", bias=False)(
      cut.astype(cfg.dtype)
    )
    embed = lambda axes: sharding.boxed(normal, axes)
    first = self.param("class_token", embed(("embed",)), (cfg.width,))
    shape = cfg.tokens, cfg.width
    table = self.param("positions", embed((None, "embed")), shape)
    first = jnp.broadcast_to(first.astype(x.dtype), (len(x), 1, cfg.width))
    return jnp.concatenate([first, x], axis=1) + table.astype(x.dtype)


class Block(nn.Module):
  """Self-attention and MLP, each behind a norm: [B, S, E] -> same."""

  cfg: Config

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    cfg = self.cfg
    h = norms.LayerNorm(cfg.eps, name="norm_a")(x)
    q, k, v = (
      _dense(cfg, cfg.width, ("embed", "heads"), name)(h).reshape(
        *x.shape[:2], cfg.heads, -1
      )
      for name in ("q", "k", "v")
    )
    y = attention.dot(q, k, v).reshape(x.shape)
    x = x + _dense(cfg, cfg.width, ("heads", "embed"), "out")(y)
    h = norms.LayerNorm(cfg.eps, name="norm_m")(x)
    h = _dense(cfg, cfg.mlp_width, ("embed", "mlp"), "mlp_in")(h)
    h = _activate(cfg, h)
    return x + _dense(cfg, cfg.width, ("mlp", "embed"), "mlp_out")(h)


def _activate(cfg, x):
  if cfg.activation == "quick_gelu":
    return x * nn.sigmoid(1.702 * x)
  return nn.gelu(x, approximate=False)


def _dense(cfg, features, axes, name, bias=True):
  dtype = jnp.dtype(cfg.dtype)
  return linear.dense(features, axes, name=name, dtype=dtype, bias=bias)
