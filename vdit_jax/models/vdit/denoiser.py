"""Our denoiser: a video diffusion transformer with joint attention.

x_t, t, text -> the network's raw output, from which `diffusion.objectives`
gets x0. Latents are cut into 3D patches (DiT, arXiv:2212.09748) and every
patch of every frame attends to every other, placed by rotary positions in
three axes; text enters by cross-attention; the noise level by adaptive
layer norms with one projection for all blocks and a table for each
(adaLN-single, PixArt-alpha, arXiv:2310.00426).

`attention="factorised"` is the older way, for comparison: blocks alternate
between attention inside a frame and attention along time at one place. Both
have the same parameters.
"""

import dataclasses
import functools

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from vdit_jax import schema, sharding, types
from vdit_jax.models import checks
from vdit_jax.models.vdit import numbers
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

ATTENTION = ("joint", "factorised")


@dataclasses.dataclass(frozen=True)
class Config(compute.Compute):
  """Shape of the denoiser, beside `compute.Compute`'s fields.

  Attributes:
    latent_channels: c of the latents.
    patch: latents a patch along frames, height, width.
    width, depth, heads, mlp_width: sizes of the transformer.
    text_width: E of the text embeddings.
    pooled_text: whether the mean of the text embeddings joins the noise
      level in the adaptive norms, beside cross-attention.
    cond: numbers known of a clip that join it too, by name: "fps" and "size"
      are `types.Cond`'s, each other name is one of its scores, in order.
    given: frames a latent frame, its autoencoder's time_stride, each of which
      may be given alone (see `given`); 0 takes whole latent frames whose noise
      level is 0.
    attention: "joint" or "factorised".
    rope_theta: base of the rotary frequencies.
    eps: of the norms.
  """

  latent_channels: int = 16
  patch: tuple[int, int, int] = (1, 2, 2)
  width: int = 3072
  depth: int = 32
  heads: int = 24
  mlp_width: int = 12288
  text_width: int = 4096
  pooled_text: bool = False
  cond: tuple[str, ...] = ()
  given: int = 0
  attention: str = "joint"
  rope_theta: float = 10_000.0
  eps: float = 1e-6

  def __post_init__(self):
    super().__post_init__()
    compute.check_choice(self, "attention", ATTENTION)
    if self.width % self.heads:
      raise ValueError(
        f"width {self.width} must be a multiple of heads {self.heads}"
      )
    positions.split_head_dim(self.width // self.heads)
    if self.given < 0:
      raise ValueError(f"given must not be negative, got {self.given}; try 4")
    if isinstance(self.cond, str) or len(set(self.cond)) < len(self.cond):
      raise ValueError(
        "cond must be a tuple of different names, got "
        f'{schema.quote(self.cond)}; write ("fps", "motion_score")'
      )


def _sized(heads: int, depth: int, mlp_width: int | None = None) -> Config:
  """A size of ours: heads of 128, as TPUs want them, many meshes divide."""
  width = 128 * heads
  return Config(
    width=width,
    depth=depth,
    heads=heads,
    mlp_width=mlp_width or 4 * width,
    remat="attention",
  )


VARIANTS = {
  "digits": Config(
    latent_channels=8,
    width=128,
    depth=6,
    heads=4,
    mlp_width=512,
    text_width=128,
    pooled_text=True,
    rope_theta=100.0,
    unroll=6,
    dtype="float32",
  ),
  "s": _sized(heads=4, depth=8),
  "b": _sized(heads=8, depth=12),
  "l": _sized(heads=12, depth=20),
  "2b": _sized(heads=16, depth=28),
  "5b": _sized(heads=24, depth=32),
  "14b": _sized(heads=40, depth=40, mlp_width=13_824),
}


def example(cfg: Config) -> tuple[jax.Array, jax.Array, types.Text]:
  """Inputs of one clip, as small as may be, to initialise a denoiser with."""
  embeds = jnp.zeros((1, 1, cfg.text_width))
  text = types.Text(embeds=embeds, mask=jnp.ones((1, 1), bool))
  latents = jnp.zeros((1, *cfg.patch, cfg.latent_channels))
  return latents, jnp.zeros(1), text


@flax.struct.dataclass
class Context:
  """What all blocks share.

  Attributes:
    modulation: of the adaptive norms, float32 [B, 1 or f, 6, D].
    angles: rotary angles of the tokens, [L, K / 2].
    text: with a learned null where a caption is absent.
    grid: tokens along frames, height and width.
  """

  modulation: jax.Array
  angles: jax.Array
  text: types.Text
  grid: tuple[int, int, int] = flax.struct.field(pytree_node=False)


class Denoiser(nn.Module):
  """Predict from noised latents; see `__call__`."""

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
      text: embeds [B, M, E] and mask [B, M]. A row whose mask is all False
        has no caption and gets the learned null.
      cond: the numbers that `cfg.cond` names, what is None or NaN being not
        known; and latents [B, f, h, w, n c] and their mask [B, f, h, w, n] of
        n = `cfg.given` frames. Others are refused.

    Returns:
      The raw output [B, f, h, w, c], float32.
    """
    cfg = self.cfg
    _check(cfg, x_t, t, cond)
    dtype = jnp.dtype(cfg.dtype)
    grid = tuple(n // p for n, p in zip(x_t.shape[1:4], cfg.patch, strict=True))
    x = patches.cut(x_t, cfg.patch).astype(dtype)
    x = _dense(cfg, cfg.width, (None, "embed"), "patch_in", bias=True)(
      x
    )  # [B, L, D]
    if cfg.given:
      x = x + ShowGiven(cfg, name="given")(x_t.shape[:4], cond)
    x = sharding.constrain(x, "batch", "sequence", None)
    text = NullText(cfg, name="null_text")(text)
    vector = Conditioning(cfg, name="conditioning")(
      t, text, cond
    )  # [B, 1|f, D]
    project = _dense32(6 * cfg.width, name="modulation", zero=True)
    modulation = project(nn.silu(vector))
    context = Context(
      modulation=modulation.reshape(*vector.shape[:2], 6, cfg.width),
      angles=positions.rotary_angles(
        grid, cfg.width // cfg.heads, cfg.rope_theta
      ),
      text=text,
      grid=grid,
    )
    inside_frame = jnp.arange(cfg.depth) % 2 == 0
    blocks = layers.stack(Block, cfg, (0, nn.broadcast))
    x, _ = blocks(x, inside_frame, context)
    x = FinalLayer(cfg, name="final")(x, vector, grid)
    return patches.join(x, grid, cfg.patch)


class Block(nn.Module):
  """One transformer block: [B, L, D] -> same."""

  cfg: Config

  @nn.compact
  def __call__(
    self, x: jax.Array, inside_frame: jax.Array, context: Context
  ) -> tuple[jax.Array, None]:
    """Apply; `inside_frame` is bool [], used by factorised attention."""
    cfg = self.cfg
    zeros = sharding.boxed(linear.ZEROS, (None, None))
    table = self.param("scale_shift_table", zeros, (6, cfg.width))
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = (
      patches.to_tokens(m[:, :, 0], context.grid)
      for m in jnp.split(context.modulation + table, 6, axis=2)
    )
    x, h = _modulate(cfg, x, shift_a, scale_a)
    h = SelfAttention(cfg, name="self_attention")(h, inside_frame, context)
    x = x + (gate_a * h).astype(x.dtype)
    x, h = _modulate(cfg, x, None, None)
    x = x + CrossAttention(cfg, name="cross_attention")(h, context.text)
    x, h = _modulate(cfg, x, shift_m, scale_m)
    x = x + (gate_m * Mlp(cfg, name="mlp")(h)).astype(x.dtype)
    return sharding.constrain(x, "batch", "sequence", None), None


class SelfAttention(nn.Module):
  """Attention among the video's tokens: [B, L, D] -> same."""

  cfg: Config

  @nn.compact
  def __call__(
    self, x: jax.Array, inside_frame: jax.Array, context: Context
  ) -> jax.Array:
    cfg = self.cfg
    qkv = _dense(cfg, 3 * cfg.width, ("embed", "heads"), "qkv")(x)
    q, k, v = _heads(cfg, qkv, 3, ("q", "k"), context.angles)
    attend = functools.partial(
      attention.attend, kernel=cfg.kernel, context=cfg.context
    )
    if cfg.attention == "joint":
      y = attend(q, k, v)
    else:
      y = _factorised(attend, q, k, v, inside_frame, context.grid)
    return _dense(cfg, cfg.width, ("heads", "embed"), "out")(y.reshape(x.shape))


class CrossAttention(nn.Module):
  """Attention from video to text: [B, L, D] -> same, zero at first."""

  cfg: Config

  @nn.compact
  def __call__(self, x: jax.Array, text: types.Text) -> jax.Array:
    cfg = self.cfg
    embeds = text.embeds.astype(x.dtype)
    axes = ("embed", "heads")
    (q,) = _heads(cfg, _dense(cfg, cfg.width, axes, "q")(x), 1, "q")
    kv = _dense(cfg, 2 * cfg.width, axes, "kv")(embeds)
    k, v = _heads(cfg, kv, 2, "k")
    y = attention.attend(
      q, k, v, mask=text.mask, kernel=cfg.kernel, context=None
    )
    out = _dense(cfg, cfg.width, ("heads", "embed"), "out", init=linear.ZEROS)
    return out(y.reshape(x.shape))


class Mlp(nn.Module):
  """Two dense layers with a GELU between: [B, L, D] -> same."""

  cfg: Config

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    cfg = self.cfg
    h = _dense(cfg, cfg.mlp_width, ("embed", "mlp"), "in")(x)
    h = nn.gelu(h, approximate=True)
    return _dense(cfg, cfg.width, ("mlp", "embed"), "out")(h)


class NullText(nn.Module):
  """Give a row of text that has no token one learned token."""

  cfg: Config

  @nn.compact
  def __call__(self, text: types.Text) -> types.Text:
    E = self.cfg.text_width
    checks.text(self.cfg, text)
    init = sharding.boxed(nn.initializers.normal(1.0), (None,))
    null = self.param("embedding", init, (E,))
    absent = ~jnp.any(text.mask, axis=-1, keepdims=True)  # [B, 1]
    first = jnp.arange(text.mask.shape[-1]) == 0
    return text.replace(
      embeds=jnp.where(absent[..., None], null, text.embeds),
      mask=text.mask | (absent & first),
    )


class Conditioning(nn.Module):
  """Embed the noise level, the pooled text, numbers: float32 [B, 1|f, D]."""

  cfg: Config

  @nn.compact
  def __call__(
    self, t: jax.Array, text: types.Text, cond: types.Cond | None
  ) -> jax.Array:
    width = self.cfg.width
    t = t[:, None] if t.ndim == 1 else t
    x = _dense32(width, name="time_in")(positions.time_embedding(t, 256))
    x = _dense32(width, name="time_out")(nn.silu(x))
    if self.cfg.pooled_text:
      weight = text.mask[..., None].astype(jnp.float32)
      mean = jnp.sum(text.embeds * weight, 1) / jnp.sum(weight, 1)
      x = x + _dense32(width, name="pooled_text")(mean)[:, None]
    if self.cfg.cond:
      values = numbers.gather(self.cfg.cond, cond, t.shape[0])
      x = x + Numbers(self.cfg, name="numbers")(values)[:, None]
    return sharding.constrain(x, "batch", None, None)


class ShowGiven(nn.Module):
  """What patches are shown of given frames: [B, L, D], zero at first."""

  cfg: Config

  @nn.compact
  def __call__(
    self, shape: tuple[int, ...], cond: types.Cond | None
  ) -> jax.Array:
    cfg, parts = self.cfg, []
    for name, width in (("latents", cfg.latent_channels), ("mask", 1)):
      wanted = *shape, cfg.given * width
      value = getattr(cond, name, None)
      value = jnp.zeros(wanted) if value is None else value
      if value.shape != wanted:
        raise ValueError(f"cond.{name} must be {wanted}, got {value.shape}")
      parts.append(value)
    x = patches.cut(jnp.concatenate(parts, -1), cfg.patch)
    x = x.astype(jnp.dtype(cfg.dtype))
    return _dense(cfg, cfg.width, (None, "embed"), "in", init=linear.ZEROS)(x)


class Numbers(nn.Module):
  """Embed numbers [B, n], NaN where not known: -> [B, D], zero at first.

  Each by sinusoids of its value, as SDXL does with sizes (arXiv:2307.01952).
  """

  cfg: Config

  @nn.compact
  def __call__(self, values: jax.Array) -> jax.Array:
    known = ~jnp.isnan(values)
    values = jnp.where(known, values, 0.0)
    # Of scale 1: sizes reach thousands, a score's tenths are still told apart.
    x = positions.time_embedding(values, 256, scale=1.0)
    x = (x * known[..., None]).reshape(values.shape[0], -1)
    x = _dense32(self.cfg.width, name="in")(x)
    return _dense32(self.cfg.width, name="out", zero=True)(nn.silu(x))


class FinalLayer(nn.Module):
  """Norm, modulation and projection to patches, zero at first."""

  cfg: Config

  @nn.compact
  def __call__(
    self, x: jax.Array, vector: jax.Array, grid: tuple[int, int, int]
  ) -> jax.Array:
    cfg = self.cfg
    modulation = _dense32(2 * cfg.width, name="modulation", zero=True)
    shift, scale = (
      patches.to_tokens(m, grid)
      for m in jnp.split(modulation(nn.silu(vector)), 2, axis=-1)
    )
    _, x = _modulate(cfg, x, shift, scale)
    p_f, p_h, p_w = cfg.patch
    features = p_f * p_h * p_w * cfg.latent_channels
    axes = ("embed", None)
    out = _dense(cfg, features, axes, "out", init=linear.ZEROS, bias=True)
    # Or a split sequence would be gathered before and not behind this layer.
    x = sharding.constrain(out(x), "batch", "sequence", None)
    return x.astype(jnp.float32)


def _factorised(attend, q, k, v, inside_frame, grid):
  """Attend inside each frame, or along time at each place: [B, L, N, K]."""
  B, L, N, K = q.shape
  f, s = grid[0], grid[1] * grid[2]

  def frames(q, k, v):
    q, k, v = (x.reshape(B * f, s, N, K) for x in (q, k, v))
    return attend(q, k, v).reshape(B, L, N, K)

  def places(q, k, v):
    q, k, v = (
      x.reshape(B, f, s, N, K).swapaxes(1, 2).reshape(B * s, f, N, K)
      for x in (q, k, v)
    )
    y = attend(q, k, v).reshape(B, s, f, N, K)
    return y.swapaxes(1, 2).reshape(B, L, N, K)

  return jax.lax.cond(inside_frame, frames, places, q, k, v)


def _modulate(cfg, x, shift, scale):
  """Adaptive layer norm: x itself, and what the next layer works on."""
  return norms.modulate(x, shift, scale, cfg.eps, cfg.kernel)


def _heads(cfg, x, parts, normed, angles=None):
  """Cut into heads [B, L, N, K], the first with norms named so."""
  K = cfg.width // cfg.heads
  return heads.cut(
    x,
    [norms.Scale(name=f"norm_{name}")(K) for name in normed],
    angles,
    heads=cfg.heads,
    parts=parts,
    eps=cfg.eps,
    kernel=cfg.kernel,
  )


def _dense(cfg, features, axes, name, init=linear.LECUN, bias=False):
  dtype = jnp.dtype(cfg.dtype)
  return linear.dense(
    features, axes, name=name, dtype=dtype, init=init, bias=bias
  )


def _dense32(features, *, name, zero=False):
  return linear.dense32(features, ("embed", None), name=name, zero=zero)


def _check_cond(cfg: Config, cond: types.Cond | None) -> None:
  """Refuse what the network has no input for."""
  taken = {n if n in ("fps", "size") else "scores" for n in cfg.cond}
  taken |= {"latents", "mask"} if cfg.given else set()
  fields = dataclasses.fields(types.Cond)
  given = {f.name for f in fields if getattr(cond, f.name, None) is not None}
  if given - taken:
    raise ValueError(
      f"vdit takes no cond {sorted(given - taken)}, its cond is {cfg.cond} and "
      f"its given {cfg.given}; numbers are named in denoiser.cond, and without "
      "denoiser.given a given frame is one with t = 0"
    )


def _check(cfg, x_t, t, cond):
  """Refuse what the network cannot take, naming the remedy."""
  _check_cond(cfg, cond)
  checks.latents(cfg, x_t)
  checks.times(x_t, t)
