"""Wan's denoiser: joint attention over video, cross-attention to the prompt.

x_t, t, text -> velocity, from which `diffusion.objectives` gets x0
(arXiv:2503.20314, section 4.2). Every patch of every frame attends to every
other, with rotary positions in three axes that count from 0; queries and keys
are normalised over all heads together. The noise level shifts, scales and gates
by one projection for all blocks and a table for each.

The image-to-video denoisers are shown images by channels beside x_t's (a mask,
and latents that are zeros where nothing is given), and those of 2.1 by an image
encoder's tokens too, to which each block attends beside the text's. That of
2.2's smallest model takes a noise level for each latent frame instead: a given
frame is one whose t is 0.
"""

import dataclasses
import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from vdit_jax import sharding, types
from vdit_jax.models import checks
from vdit_jax.nn import (
  attention,
  compute,
  heads,
  layers,
  linear,
  norms,
  patches,
  positions,
)

_TIMESTEPS = 1000
_NEAR = 2.0**-10  # of a whole timestep: float32 n / 1000 * 1000 is not always n
_ROPE_THETA = 10_000.0
_IMAGE_EPS = 1e-5  # of the norms of image tokens; `Config.eps` is the others'


@dataclasses.dataclass(frozen=True)
class Config(compute.Compute):
  """Shape of the denoiser, beside `compute.Compute`'s fields.

  Attributes:
    latent_channels: c of x_t and of the output.
    mask_channels: channels of `Cond.mask`, a latent frame's frames; where there
      are some, `Cond.latents` are shown too. 0 takes neither.
    image_width: E of `Cond.image_embeds`; 0 takes none.
    image_tokens: S that a learned table of their positions is for, of all
      images together; 0 has none (first-and-last-frame alone has).
    patch: latents a patch along frames, height, width.
    depth, heads, head_dim, mlp_width: sizes of the transformer; D is heads *
      head_dim.
    text_width: E of the text embeddings.
    text_tokens: M that it was trained with.
    time_width: of the noise level's sinusoids.
    cross_norm: whether cross-attention has a norm before it.
    max_places: tokens along an axis, at most.
    eps: of the norms.
  """

  latent_channels: int = 16
  mask_channels: int = 0
  image_width: int = 0
  image_tokens: int = 0
  patch: tuple[int, int, int] = (1, 2, 2)
  depth: int = 40
  heads: int = 40
  head_dim: int = 128
  mlp_width: int = 13_824
  text_width: int = 4096
  text_tokens: int = 512
  time_width: int = 256
  cross_norm: bool = True
  max_places: int = 1024
  eps: float = 1e-6

  def __post_init__(self):
    super().__post_init__()
    positions.split_head_dim(self.head_dim)
    if self.image_width and not self.mask_channels:
      raise ValueError(
        "image_width needs mask_channels: image tokens tell of what the "
        f"channels show, got {self.image_width} and {self.mask_channels}"
      )
    if self.image_tokens and not self.image_width:
      raise ValueError(
        f"image_tokens {self.image_tokens} need image_width, which is 0"
      )

  @property
  def width(self) -> int:
    """D."""
    return self.heads * self.head_dim

  @property
  def shows_images(self) -> bool:
    """Whether images are shown by channels."""
    return self.mask_channels > 0


_I2V = dict(mask_channels=4)
_CLIP = dict(image_width=1280, **_I2V)
VARIANTS = {
  "1_3b": Config(depth=30, heads=12, mlp_width=8960),
  "14b": Config(),
  "14b_i2v": Config(**_CLIP),
  "14b_flf2v": Config(image_tokens=514, **_CLIP),
  "a14b": Config(),
  "a14b_i2v": Config(**_I2V),
  "5b": Config(latent_channels=48, depth=30, heads=24, mlp_width=14_336),
}


def example(
  cfg: Config,
) -> tuple[jax.Array, jax.Array, types.Text, types.Cond]:
  """Inputs of one clip, as small as may be, to initialise a denoiser with."""
  size = (1, *cfg.patch)
  embeds = jnp.zeros((1, 1, cfg.text_width))
  text = types.Text(embeds=embeds, mask=jnp.ones((1, 1), bool))
  cond = types.Cond()
  if cfg.shows_images:
    cond = types.Cond(
      latents=jnp.zeros((*size, cfg.latent_channels)),
      mask=jnp.zeros((*size, cfg.mask_channels)),
    )
  if cfg.image_width:
    shape = 1, cfg.image_tokens or 1, cfg.image_width
    cond = cond.replace(image_embeds=jnp.zeros(shape))
  return jnp.zeros((*size, cfg.latent_channels)), jnp.zeros(1), text, cond


@flax.struct.dataclass
class Context:
  """What all blocks share.

  Attributes:
    modulation: of the adaptive norms, float32 [B, 1 or f, 6, D].
    angles: rotary angles of the tokens, [L, K / 2].
    text: tokens of the text, [B, M, D].
    images: tokens of the images, [B, S, D]; None without.
    grid: tokens along frames, height and width.
  """

  modulation: jax.Array
  angles: jax.Array
  text: jax.Array
  images: jax.Array | None
  grid: tuple[int, int, int] = flax.struct.field(pytree_node=False)


class Denoiser(nn.Module):
  """Predict the velocity from noised latents; see `__call__`."""

  cfg: Config

  @nn.compact
  def __call__(
    self,
    x_t: jax.Array,
    t: jax.Array,
    text: types.Text,
    cond: types.Cond | None = None,
  ) -> jax.Array:
    """Apply the network.

    Args:
      x_t: noised latents [B, f, h, w, c].
      t: noise level in [0, 1] of each clip [B] or each latent frame [B, f].
      text: embeds [B, M, E], zeros in the place of padding. Its mask is not
        looked at: released weights see those zeros, so M matters to the
        numbers.
      cond: latents [B, f, h, w, c] and mask [B, f, h, w, mask_channels] where
        the config has those, and image_embeds [B, S, image_width]; nothing
        otherwise.

    Returns:
      The raw output [B, f, h, w, c], float32.
    """
    cfg = self.cfg
    _check(cfg, x_t, t, text, cond)
    dtype = jnp.dtype(cfg.dtype)
    if cfg.shows_images:
      x_t = jnp.concatenate([x_t, cond.mask, cond.latents], axis=-1)
    grid = tuple(n // p for n, p in zip(x_t.shape[1:4], cfg.patch, strict=True))
    patch_in = _dense(cfg, cfg.width, (None, "embed"), "patch_in")
    x = patch_in(patches.cut(x_t, cfg.patch, "first").astype(dtype))
    x = sharding.constrain(x, "batch", "sequence", None)  # [B, L, D]
    vector = Conditioning(cfg, name="conditioning")(t)  # [B, 1|f, D]
    project = linear.dense32(6 * cfg.width, ("embed", None), "modulation")
    modulation = project(nn.silu(vector))
    images = None
    if cfg.image_width:
      images = ImageTokens(cfg, name="image_in")(cond.image_embeds)
    context = Context(
      modulation=modulation.reshape(*vector.shape[:2], 6, cfg.width),
      angles=positions.rotary_angles(grid, cfg.head_dim, _ROPE_THETA),
      text=TextTokens(cfg, name="text_in")(text.embeds),
      images=images,
      grid=grid,
    )
    blocks = layers.stack(Block, cfg, nn.broadcast)
    x, _ = blocks(x, context)
    x = FinalLayer(cfg, name="final")(x, vector, grid)
    return patches.join(x, grid, cfg.patch)


class Block(nn.Module):
  """One transformer block: [B, L, D] -> same."""

  cfg: Config

  @nn.compact
  def __call__(self, x: jax.Array, context: Context) -> tuple[jax.Array, None]:
    cfg = self.cfg
    table = _table(self, 6, cfg.width)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
      patches.to_tokens(m[:, :, 0], context.grid)
      for m in jnp.split(context.modulation + table, 6, axis=2)
    )
    x, h = norms.modulate(x, shift_a, scale_a, cfg.eps, cfg.kernel)
    h = SelfAttention(cfg, name="self_attention")(h, context.angles)
    x = x + (gate_a * h).astype(x.dtype)
    h = norms.LayerNorm(cfg.eps, name="norm_c")(x) if cfg.cross_norm else x
    cross = CrossAttention(cfg, name="cross_attention")
    x = x + cross(h, context.text, context.images)
    x, h = norms.modulate(x, shift_m, scale_m, cfg.eps, cfg.kernel)
    x = x + (gate_m * Mlp(cfg, name="mlp")(h)).astype(x.dtype)
    return sharding.constrain(x, "batch", "sequence", None), None


class SelfAttention(nn.Module):
  """Attention among the video's tokens: [B, L, D] -> same."""

  cfg: Config

  @nn.compact
  def __call__(self, x: jax.Array, angles: jax.Array) -> jax.Array:
    cfg = self.cfg
    q, k = (
      heads.rotate_pairs(
        _project(cfg, x, name, f"norm_{name}"), angles, cfg.heads, cfg.kernel
      )
      for name in ("q", "k")
    )
    v = _heads(cfg, x, "v")
    y = attention.attend(q, k, v, kernel=cfg.kernel, context=cfg.context)
    return _dense(cfg, cfg.width, ("heads", "embed"), "out")(y.reshape(x.shape))


class CrossAttention(nn.Module):
  """Attention to the text, and apart from it to images: [B, L, D] -> same."""

  cfg: Config

  @nn.compact
  def __call__(
    self, x: jax.Array, text: jax.Array, images: jax.Array | None
  ) -> jax.Array:
    cfg = self.cfg
    q = _heads(cfg, x, "q", "norm_q")

    def attend(tokens, suffix=""):
      # Of a text, or images, every device has all.
      k = _heads(cfg, tokens, f"k{suffix}", f"norm_k{suffix}", along=None)
      v = _heads(cfg, tokens, f"v{suffix}", along=None)
      return attention.attend(q, k, v, kernel=cfg.kernel, context=None)

    y = attend(text)
    if images is not None:
      y = y + attend(images, "_image")
    return _dense(cfg, cfg.width, ("heads", "embed"), "out")(y.reshape(x.shape))


class Mlp(nn.Module):
  """Two dense layers with a GELU between: [B, L, D] -> same."""

  cfg: Config

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    cfg = self.cfg
    h = _dense(cfg, cfg.mlp_width, ("embed", "mlp"), "in")(x)
    h = nn.gelu(h, approximate=True)
    return _dense(cfg, cfg.width, ("mlp", "embed"), "out")(h)


class Conditioning(nn.Module):
  """Embed the noise level: t [B] or [B, f] -> float32 [B, 1 or f, D]."""

  cfg: Config

  @nn.compact
  def __call__(self, t: jax.Array) -> jax.Array:
    D, axes = self.cfg.width, ("embed", None)
    n = (t[:, None] if t.ndim == 1 else t) * _TIMESTEPS
    whole = jnp.round(n)
    n = jnp.where(jnp.abs(n - whole) < _NEAR, whole, n)
    x = positions.time_embedding(n, self.cfg.time_width, scale=1.0)
    x = linear.dense32(D, axes, "time_in")(x)
    x = linear.dense32(D, axes, "time_out")(nn.silu(x))
    return sharding.constrain(x, "batch", None, None)


class TextTokens(nn.Module):
  """Bring text embeddings to the width of tokens: [B, M, E] -> [B, M, D]."""

  cfg: Config

  @nn.compact
  def __call__(self, embeds: jax.Array) -> jax.Array:
    cfg = self.cfg
    x = embeds.astype(cfg.dtype)
    x = _dense(cfg, cfg.width, (None, "embed"), "in")(x)
    x = nn.gelu(x, approximate=True)
    return _dense(cfg, cfg.width, ("embed", None), "out")(x)


class ImageTokens(nn.Module):
  """Bring embeddings of images to it: [B, S, image_width] -> [B, S, D]."""

  cfg: Config

  @nn.compact
  def __call__(self, embeds: jax.Array) -> jax.Array:
    cfg, x = self.cfg, embeds.astype(self.cfg.dtype)
    if cfg.image_tokens:
      shape = cfg.image_tokens, cfg.image_width
      init = sharding.boxed(nn.initializers.normal(0.02), (None, None))
      x = x + self.param("positions", init, shape).astype(x.dtype)
    x = norms.LayerNorm(_IMAGE_EPS, name="norm_in")(x)
    x = _dense(cfg, cfg.image_width, (None, None), "in")(x)
    x = nn.gelu(x, approximate=False)
    x = _dense(cfg, cfg.width, (None, "embed"), "out")(x)
    return norms.LayerNorm(_IMAGE_EPS, name="norm_out")(x)


class FinalLayer(nn.Module):
  """Norm, modulation and projection to patches."""

  cfg: Config

  @nn.compact
  def __call__(
    self, x: jax.Array, vector: jax.Array, grid: tuple[int, int, int]
  ) -> jax.Array:
    """Map tokens [B, L, D] to patches, float32 [B, L, p_f p_h p_w c]."""
    cfg = self.cfg
    table = _table(self, 2, cfg.width)
    shift, scale = (
      patches.to_tokens(m[:, :, 0], grid)
      for m in jnp.split(vector[:, :, None] + table, 2, axis=2)
    )
    _, x = norms.modulate(x, shift, scale, cfg.eps, cfg.kernel)
    features = math.prod(cfg.patch) * cfg.latent_channels
    x = _dense(cfg, features, ("embed", None), "out")(x)
    # Or a split sequence would be gathered before and not behind this layer.
    x = sharding.constrain(x, "batch", "sequence", None)
    return x.astype(jnp.float32)


def _table(module: nn.Module, rows: int, width: int) -> jax.Array:
  """A learned table of shifts, scales and gates, [rows, D]."""
  init = sharding.boxed(nn.initializers.normal(width**-0.5), (None, None))
  return module.param("scale_shift_table", init, (rows, width))


def _project(cfg, x, name, norm=None):
  """Project, and norm over all heads: [B, L, D] -> same."""
  x = _dense(cfg, cfg.width, ("embed", "heads"), name)(x)
  if norm:
    x = norms.RMSNorm(cfg.eps, axis="heads", name=norm)(x)
  return x


def _heads(cfg, x, name, norm=None, along="sequence"):
  """Project, norm over all heads, cut: [B, L, D] -> [B, L, N, K]."""
  x = _project(cfg, x, name, norm)
  x = x.reshape(*x.shape[:2], cfg.heads, cfg.head_dim)
  return sharding.constrain(x, "batch", along, "act_heads", None)


def _dense(cfg, features, axes, name):
  dtype = jnp.dtype(cfg.dtype)
  return linear.dense(features, axes, name=name, dtype=dtype)


def _check(cfg, x_t, t, text, cond):
  """Refuse what the network cannot take, naming the remedy."""
  checks.latents(cfg, x_t)
  checks.times(x_t, t)
  checks.text(cfg, text)
  most = [cfg.max_places * p for p in cfg.patch]
  if any(n > m for n, m in zip(x_t.shape[1:4], most, strict=True)):
    raise ValueError(
      f"latents must be at most {tuple(most)} in frames, height and width, for "
      f"which there are positions, got {x_t.shape[1:4]}; ask for less"
    )
  shapes = {}
  if cfg.shows_images:
    shapes["latents"] = x_t.shape
    shapes["mask"] = *x_t.shape[:4], cfg.mask_channels
  if cfg.image_width:
    shown = getattr(cond, "image_embeds", None)
    S = cfg.image_tokens or (shown.shape[1] if shown is not None else 0)
    shapes["image_embeds"] = x_t.shape[0], S, cfg.image_width
  checks.cond("this Wan", cond, shapes)
