"""CogVideoX's denoiser: text and video as one sequence (arXiv:2408.06072).

x_t, t, text -> v, from which `diffusion.objectives` gets x0. Tokens of text
come first, then those of the video's patches, and every token attends to every
other, padding of the text included. Adaptive layer norms shift, scale and gate
the two kinds apart ("expert" adaLN) and share their weights otherwise.

The versions differ in where a token stands (`Config.positions`), in how many
latent frames a patch holds, and in whether a first image is given: its latents
come in through `Cond.latents`, zero where nothing is given, beside x_t's
channels.
"""

import dataclasses
import math

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

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

POSITIONS = ("sincos", "crop", "crop_learned", "slice")

_MLP_RATIO = 4
_ROPE_THETA = 10_000.0
_QK_EPS = 1e-6  # of the norms of queries and keys; `Config.eps` is the others'
_TIMESTEPS = 1000
_OFS = 2.0  # the only value that 1.5's image-to-video was ever shown


@dataclasses.dataclass(frozen=True)
class Config(compute.Compute):
  """Shape of the denoiser, beside `compute.Compute`'s fields.

  Attributes:
    latent_channels: c of x_t and of the output.
    image_channels: channels of `Cond.latents`; 0 takes none.
    patch: latents a patch along frames, height, width.
    depth, heads, head_dim: sizes of the transformer; D is heads * head_dim.
    text_width: E of the text embeddings.
    text_tokens: M that it was trained with; a table of positions needs it.
    time_width: of the noise level's embedding.
    ofs: whether a constant is embedded beside the noise level (1.5's
      image-to-video).
    positions: "sincos": a fixed table added to the tokens. "crop": rotary; a
      grid of another size is laid centred over the sample's and keeps its
      aspect ratio. "crop_learned": the same and a learned table added, which
      fixes height and width. "slice": rotary, counting from 0.
    sample: latents (f, h, w) that it was trained at.
    interpolation: what places in a fixed table are divided by, in time and
      in space.
    time_stride: frames of video a latent frame, but for the first.
    attention_bias: whether queries, keys and values have a bias.
    patch_bias: whether patches have one on their way in.
    eps: of the layer norms of tokens.
  """

  latent_channels: int = 16
  image_channels: int = 0
  patch: tuple[int, int, int] = (1, 2, 2)
  depth: int = 42
  heads: int = 48
  head_dim: int = 64
  text_width: int = 4096
  text_tokens: int = 226
  time_width: int = 512
  ofs: bool = False
  positions: str = "crop"
  sample: tuple[int, int, int] = (13, 60, 90)
  interpolation: tuple[float, float] = (1.0, 1.875)
  time_stride: int = 4
  attention_bias: bool = True
  patch_bias: bool = True
  eps: float = 1e-5

  def __post_init__(self):
    super().__post_init__()
    compute.check_choice(self, "positions", POSITIONS)
    if self.head_dim % 16 and self.positions != "sincos":
      raise ValueError(
        "head_dim must be a multiple of 16, to be shared out among frames, "
        f"height and width as 2:3:3 pairs, got {self.head_dim}"
      )
    if self.patch[0] != 1 and self.positions != "slice":
      raise ValueError(
        f"patch {self.patch} has more than one latent frame, which "
        f"positions={self.positions!r} does not know of; use 'slice'"
      )

  @property
  def width(self) -> int:
    """D."""
    return self.heads * self.head_dim

  @property
  def space_stride(self) -> int:
    """Pixels of height or width a latent's."""
    return 8


_I2V = dict(image_channels=16)
_1_5 = dict(patch=(2, 2, 2), positions="slice", sample=(21, 300, 300))
VARIANTS = {
  "2b": Config(depth=30, heads=30, positions="sincos"),
  "5b": Config(),
  "5b_i2v": Config(positions="crop_learned", **_I2V),
  "1_5_5b": Config(**_1_5),
  "1_5_5b_i2v": Config(ofs=True, **_1_5, **_I2V),
}


def example(
  cfg: Config,
) -> tuple[jax.Array, jax.Array, types.Text, types.Cond]:
  """Inputs of one clip, as small as may be, to initialise a denoiser with."""
  size = cfg.sample if cfg.positions == "crop_learned" else cfg.patch
  embeds = jnp.zeros((1, cfg.text_tokens, cfg.text_width))
  text = types.Text(embeds=embeds, mask=jnp.ones(embeds.shape[:2], bool))
  cond = types.Cond()
  if cfg.image_channels:
    cond = types.Cond(latents=jnp.zeros((1, *size, cfg.image_channels)))
  latents = jnp.zeros((1, *size, cfg.latent_channels))
  return latents, jnp.zeros(1), text, cond


@flax.struct.dataclass
class Context:
  """What all blocks share.

  Attributes:
    vector: embedding of the noise level behind its activation, float32 [B, T].
    angles: rotary angles of all tokens, zero for those of text, [M + L,
      K / 2]; None without rotary positions.
    is_text: which tokens are text's, bool [M + L, 1].
  """

  vector: jax.Array
  angles: jax.Array | None
  is_text: jax.Array


class Denoiser(nn.Module):
  """Predict v from noised latents; see `__call__`."""

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
      t: noise level in [0, 1] of each clip, [B]; the training timestep is
        round(1000 t).
      text: embeds [B, M, E]. Its mask is not looked at: released weights see
        the padding too, so M matters to the numbers.
      cond: latents [B, f, h, w, image_channels] where the config has those;
        nothing otherwise.

    Returns:
      The raw output [B, f, h, w, c], float32.
    """
    cfg = self.cfg
    _check(cfg, x_t, t, text, cond)
    dtype, M = jnp.dtype(cfg.dtype), text.embeds.shape[1]
    if cfg.image_channels:
      x_t = jnp.concatenate([x_t, cond.latents], axis=-1)
    size = x_t.shape[1:4]
    grid = tuple(n // p for n, p in zip(size, cfg.patch, strict=True))
    x = self._embed(patches.cut(x_t, cfg.patch, "first"), text.embeds, size)
    x = sharding.constrain(x, "batch", "sequence", None)  # [B, M + L, D]
    vector = nn.silu(Conditioning(cfg, name="conditioning")(t))  # [B, T]
    context = Context(
      vector=sharding.constrain(vector, "batch", None),
      angles=_angles(cfg, grid, M),
      is_text=jnp.arange(x.shape[1])[:, None] < M,
    )
    blocks = layers.stack(Block, cfg, nn.broadcast)
    x, _ = blocks(x.astype(dtype), context)
    x = FinalLayer(cfg, name="final")(x[:, M:], vector)
    return patches.join(x, grid, cfg.patch, "first")

  def _embed(self, cut, embeds, size):
    """Join text and patches in one sequence of tokens [B, M + L, D]."""
    cfg, M = self.cfg, embeds.shape[1]
    patch_in = _dense(
      cfg, cfg.width, (None, "embed"), "patch_in", bias=cfg.patch_bias
    )
    text_in = _dense(cfg, cfg.width, (None, "embed"), "text_in")
    video = patch_in(cut.astype(cfg.dtype))
    x = jnp.concatenate([text_in(embeds.astype(cfg.dtype)), video], axis=1)
    table = None
    if cfg.positions == "sincos":
      table = sincos_table(cfg, size, M)
    if cfg.positions == "crop_learned":
      init = lambda key: sincos_table(cfg, cfg.sample, cfg.text_tokens)
      init = sharding.boxed(init, (None, "embed"))
      table = self.param("position_table", init)
      # As released: the learned table is not cut or stretched in time.
      if size != cfg.sample:
        table = sincos_table(cfg, size, M)
    return x if table is None else x + table.astype(x.dtype)


class Block(nn.Module):
  """One transformer block: [B, M + L, D] -> same."""

  cfg: Config

  @nn.compact
  def __call__(self, x: jax.Array, context: Context) -> tuple[jax.Array, None]:
    cfg = self.cfg
    h, gate = AdaptiveNorm(cfg, name="norm_a")(x, context)
    h = SelfAttention(cfg, name="attention")(h, context.angles)
    x = x + (gate * h).astype(x.dtype)
    h, gate = AdaptiveNorm(cfg, name="norm_m")(x, context)
    x = x + (gate * Mlp(cfg, name="mlp")(h)).astype(x.dtype)
    return sharding.constrain(x, "batch", "sequence", None), None


class AdaptiveNorm(nn.Module):
  """Norm, shift and scale, by the kind of token; and the gate to come."""

  cfg: Config

  @nn.compact
  def __call__(
    self, x: jax.Array, context: Context
  ) -> tuple[jax.Array, jax.Array]:
    """Return x [B, M + L, D], modulated, and its gate, float32."""
    cfg = self.cfg
    axes = ("embed", "mlp")
    modulation = linear.dense32(6 * cfg.width, axes, "modulation", zero=True)
    video, of_text = jnp.split(modulation(context.vector)[:, None], 2, axis=-1)
    shift, scale, gate = (
      jnp.where(context.is_text, b, a)
      for a, b in zip(
        jnp.split(video, 3, axis=-1),
        jnp.split(of_text, 3, axis=-1),
        strict=True,
      )
    )
    h = norms.LayerNorm(cfg.eps, name="norm")(x.astype(jnp.float32))
    return (h * (1 + scale) + shift).astype(x.dtype), gate


class SelfAttention(nn.Module):
  """Attention among all tokens: [B, M + L, D] -> same."""

  cfg: Config

  @nn.compact
  def __call__(self, x: jax.Array, angles: jax.Array | None) -> jax.Array:
    cfg = self.cfg
    q, k, v = (self._heads(x, name) for name in ("q", "k", "v"))
    q = norms.LayerNorm(_QK_EPS, name="norm_q")(q)
    k = norms.LayerNorm(_QK_EPS, name="norm_k")(k)
    if angles is not None:
      flat = x.shape[:2] + (-1,)
      q, k = (
        heads.rotate_pairs(h.reshape(flat), angles, cfg.heads, cfg.kernel)
        for h in (q, k)
      )
    y = attention.attend(q, k, v, kernel=cfg.kernel, context=cfg.context)
    return _dense(cfg, cfg.width, ("heads", "embed"), "out")(y.reshape(x.shape))

  def _heads(self, x, name):
    """Project to one of q, k, v: [B, M + L, D] -> [B, M + L, N, K]."""
    cfg = self.cfg
    axes, bias = ("embed", "heads"), cfg.attention_bias
    x = _dense(cfg, cfg.width, axes, name, bias=bias)(x)
    x = x.reshape(*x.shape[:2], cfg.heads, cfg.head_dim)
    return sharding.constrain(x, "batch", "sequence", "act_heads", None)


class Mlp(nn.Module):
  """Two dense layers with a GELU between: [B, M + L, D] -> same."""

  cfg: Config

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    cfg = self.cfg
    h = _dense(cfg, _MLP_RATIO * cfg.width, ("embed", "mlp"), "in")(x)
    h = nn.gelu(h, approximate=True)
    return _dense(cfg, cfg.width, ("mlp", "embed"), "out")(h)


class Conditioning(nn.Module):
  """Embed the noise level t [B]: -> float32 [B, T]."""

  cfg: Config

  @nn.compact
  def __call__(self, t: jax.Array) -> jax.Array:
    cfg, T = self.cfg, self.cfg.time_width
    # float32 n / 1000 * 1000 is not always n.
    n = jnp.minimum(jnp.round(t * _TIMESTEPS), _TIMESTEPS - 1)
    x = positions.time_embedding(n, cfg.width, scale=1.0)
    x = linear.dense32(T, ("embed", None), "time_in")(x)
    x = linear.dense32(T, ("embed", None), "time_out")(nn.silu(x))
    if cfg.ofs:
      ofs = positions.time_embedding(jnp.full(1, _OFS), T, scale=1.0)
      ofs = linear.dense32(T, ("embed", None), "ofs_in")(ofs)
      x = x + linear.dense32(T, ("embed", None), "ofs_out")(nn.silu(ofs))
    return x


class FinalLayer(nn.Module):
  """Two norms in a row, the second adaptive, and projection to patches."""

  cfg: Config

  @nn.compact
  def __call__(self, x: jax.Array, vector: jax.Array) -> jax.Array:
    """Map tokens [B, L, D] to patches, float32 [B, L, c p_f p_h p_w]."""
    cfg = self.cfg
    dtype, x = x.dtype, x.astype(jnp.float32)
    modulation = linear.dense32(
      2 * cfg.width, ("embed", "mlp"), "modulation", zero=True
    )
    shift, scale = jnp.split(modulation(vector)[:, None], 2, axis=-1)
    x = norms.LayerNorm(cfg.eps, name="norm_in")(x)
    x = norms.LayerNorm(cfg.eps, name="norm_out")(x)
    x = (x * (1 + scale) + shift).astype(dtype)
    features = cfg.latent_channels * math.prod(cfg.patch)
    x = _dense(cfg, features, ("embed", None), "out")(x)
    # Or a split sequence would be gathered before and not behind this layer.
    x = sharding.constrain(x, "batch", "sequence", None)
    return x.astype(jnp.float32)


def sincos_table(
  cfg: Config, size: tuple[int, int, int], text_tokens: int
) -> jax.Array:
  """Fixed table of latents (f, h, w): zeros for text, [M + L, D] float32.

  A quarter of the width tells the frame, the rest first the column and then
  the row, each place divided by the interpolation.
  """
  f, h, w = (n // p for n, p in zip(size, cfg.patch, strict=True))
  time, space = cfg.interpolation
  places = np.arange(f) / time, np.arange(h) / space, np.arange(w) / space
  side = cfg.width // 8 * 3
  dims = {0: cfg.width // 4, 2: side, 1: side}
  table = positions.sincos(places, dims)
  return jnp.pad(table, ((text_tokens, 0), (0, 0)))


def _angles(cfg, grid, text_tokens):
  """Rotary angles of all tokens [M + L, K / 2]; text's do not turn."""
  if cfg.positions == "sincos":
    return None
  side = cfg.head_dim // 8 * 3
  rows, columns = np.arange(grid[1]), np.arange(grid[2])
  if cfg.positions != "slice":
    trained = tuple(n // p for n, p in zip(cfg.sample, cfg.patch, strict=True))
    rows, columns = positions.crop(grid[1:], trained[1:])
  places = np.arange(grid[0]), rows, columns
  dims = cfg.head_dim // 4, side, side
  angles = positions.place_angles(places, dims, _ROPE_THETA)
  return jnp.pad(angles, ((text_tokens, 0), (0, 0)))


def _dense(cfg, features, axes, name, bias=True):
  dtype = jnp.dtype(cfg.dtype)
  return linear.dense(features, axes, name=name, dtype=dtype, bias=bias)


def _check(cfg, x_t, t, text, cond):
  """Refuse what the network cannot take, naming the remedy."""
  _check_latents(cfg, x_t)
  if t.shape == x_t.shape[:2]:
    raise ValueError(
      f"t must be [B] = {x_t.shape[:1]}: CogVideoX was trained with one noise "
      f"level for a clip and cannot be told one for each frame, got {t.shape}; "
      "give the first frame as cond.latents of an image-to-video variant"
    )
  if t.shape != x_t.shape[:1]:
    raise ValueError(f"t must be [B] = {x_t.shape[:1]}, got {t.shape}")
  checks.text(cfg, text)
  M = text.embeds.shape[1]
  if cfg.positions in ("sincos", "crop_learned") and M != cfg.text_tokens:
    raise ValueError(
      f"text has {M} tokens, but the table of positions is for "
      f"{cfg.text_tokens}; pad or cut prompts to {cfg.text_tokens}"
    )
  channels = cfg.image_channels
  shapes = {"latents": (*x_t.shape[:4], channels)} if channels else {}
  checks.cond("this CogVideoX", cond, shapes)


def _check_latents(cfg, x_t):
  checks.latents(cfg, x_t)
  if cfg.positions == "crop_learned" and x_t.shape[2:4] != cfg.sample[1:]:
    raise ValueError(
      f"latent h, w must be {cfg.sample[1:]}, of which the positions were "
      f"learned, got {x_t.shape[2:4]}; resize the image and the video"
    )
