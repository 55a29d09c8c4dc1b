"""Wan's autoencoder: a causal 3D VAE that streams in time without seams.

TRAIN pixels -> encode -> latents; SAMPLE latents -> decode -> pixels.

The networks of arXiv:2503.20314, section 4.1, and of 2.2. A frame depends on no
later one: convolutions pad time in front only, norms and attention look at one
frame. So chunks of any length give the exact result of the whole; what a chunk
must know of those before is kept in a `streams.Stream`. The first frame passes
the changes of time's resolution alone: F = 4n + 1 frames become n + 1 latents.

2.2's begins with pixels moved into channels and has a shortcut around each
level (arXiv:2410.10733): averages of what is moved into channels on the way
down, copies on the way up.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdit_jax import sharding
from vdit_jax.models.wan import resampling
from vdit_jax.nn import (
  attention,
  conv3d,
  linear,
  norms,
  posterior,
  sizes,
  streams,
  tiles,
)

Moments = posterior.Moments
Stream = streams.Stream

_TILE, _HOP = 256, 192  # pixels, as released
_EPS = 1e-24  # of a mean square: zeros are to stay zeros

MEAN = (
  *(-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508),
  *(0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921),
)
STD = (
  *(2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743),
  *(3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160),
)
_MEAN_2_2 = (
  *(-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557),
  *(-0.1382, 0.0542, 0.2813, 0.0891, 0.1570, -0.0098, 0.0375, -0.1825),
  *(-0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502),
  *(-0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230),
  *(-0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520, 0.3748),
  *(0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667),
)
_STD_2_2 = (
  *(0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013),
  *(0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165, 0.8454, 0.4978),
  *(0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659),
  *(0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093),
  *(0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887),
  *(0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744),
)


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape of the autoencoder.

  Attributes:
    latent_channels: c.
    patch: pixels along height and width moved into channels at the start.
    width, decoder_width: channels of the first level, of encoder and decoder.
    levels: multiples of it; height and width are halved between two.
    blocks: residual blocks a level; the decoder has one more.
    halve_time: whether time is halved behind each level but the last.
    residual: whether levels have shortcuts around them (2.2).
    mean, std: of the latents, which leave normalised.
    tiled: run in overlapping tiles of height and width, blended, where a video
      is larger than a tile. Less memory, other numbers.
    dtype: compute type; norms are float32.
  """

  latent_channels: int = 16
  patch: int = 1
  width: int = 96
  decoder_width: int = 96
  levels: tuple[int, ...] = (1, 2, 4, 4)
  blocks: int = 2
  halve_time: tuple[bool, ...] = (False, True, True)
  residual: bool = False
  mean: tuple[float, ...] = MEAN
  std: tuple[float, ...] = STD
  tiled: bool = False
  dtype: str = "bfloat16"

  def __post_init__(self):
    if len(self.halve_time) != len(self.levels) - 1:
      raise ValueError(
        f"halve_time must have {len(self.levels) - 1} entries for "
        f"{len(self.levels)} levels, got {self.halve_time}"
      )
    self._check_shortcuts()
    for name in ("mean", "std"):
      if len(getattr(self, name)) != self.latent_channels:
        raise ValueError(
          f"{name} must have {self.latent_channels} numbers, one a latent "
          f"channel, got {len(getattr(self, name))}"
        )

  def _check_shortcuts(self):
    """Refuse levels whose shortcuts have no whole groups of channels."""
    widths = (1, *self.levels)
    halvings = [*(4 * (1 + time) for time in self.halve_time), 1]
    for before, after, times in zip(
      widths, self.levels, halvings, strict=False
    ):
      if self.residual and before * times % after:
        raise ValueError(
          f"levels {self.levels} have shortcuts from {before} to {after}, "
          f"which does not divide {before * times}"
        )

  @property
  def time_stride(self) -> int:
    """Frames of video a latent frame, but for the first."""
    return 2 ** sum(self.halve_time)

  @property
  def space_stride(self) -> int:
    """Pixels of height or width a latent's."""
    return self.patch * self.halvings

  @property
  def halvings(self) -> int:
    """By how much the levels divide height and width."""
    return 2 ** (len(self.levels) - 1)


VARIANTS = {
  "2_1": Config(),
  "2_2": Config(
    latent_channels=48,
    patch=2,
    width=160,
    decoder_width=256,
    residual=True,
    mean=_MEAN_2_2,
    std=_STD_2_2,
  ),
}


class Autoencoder(sizes.CausalLatents, nn.Module):
  """Wan's VAE: `apply({"params": params}, video, method="encode")`."""

  cfg: Config

  def setup(self) -> None:
    self.encoder = Encoder(self.cfg)
    self.decoder = Decoder(self.cfg)
    c = self.cfg.latent_channels
    self.quant = _point(jnp.float32, 2 * c, None)
    self.post_quant = _point(jnp.float32, c, None)

  def __call__(
    self, video: jax.Array, key: jax.Array
  ) -> tuple[jax.Array, Moments]:
    """Reconstruct a video through a sample of its posterior, for training.

    Args:
      video: [B, F, H, W, 3] in [-1, 1].
      key: of the sample, or one for each clip [B].

    Returns:
      The reconstruction [B, F, H, W, 3], not clipped, and the posterior (mean,
      logvar) of the latents before normalisation, each [B, f, h, w, c].
    """
    mean, logvar = self._moments(video)
    z = posterior.sample(mean, logvar, key)
    return self._decode(z), (mean, logvar)

  def encode(self, video: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Encode video [B, F, H, W, 3] to normalised latents [B, f, h, w, c].

    The posterior's mean, or a sample of it when given a key.
    """
    mean, logvar = self.moments(video)
    return mean if key is None else posterior.sample(mean, logvar, key)

  def moments(self, video: jax.Array) -> Moments:
    """Posterior (mean, logvar) of the normalised latents [B, f, h, w, c]."""
    mean, logvar = self._moments(video)
    shift, scale = self._vectors()
    return (mean - shift) / scale, logvar - 2 * jnp.log(scale)

  def decode(self, latents: jax.Array) -> jax.Array:
    """Decode normalised latents [B, f, h, w, c] to [B, F, H, W, 3].

    In [-1, 1], as released.
    """
    shift, scale = self._vectors()
    return jnp.clip(self._decode(latents * scale + shift), -1.0, 1.0)

  def normalisation(self, params: Any) -> dict[str, Any]:
    """What normalises the latents: of the config, by name."""
    del params
    return {"mean": self.cfg.mean, "std": self.cfg.std}

  def in_tiles(self) -> "Autoencoder":
    """Return the same, run in overlapping tiles of height and width."""
    return self.clone(cfg=dataclasses.replace(self.cfg, tiled=True))

  def encode_chunks(self, num_frames: int) -> tuple[int, ...]:
    """Frames to give to each `encode_step`: 1, then 4 for a stride of 4."""
    stride = self.cfg.time_stride
    return 1, *(stride,) * (self.latent_frames(num_frames) - 1)

  def decode_chunks(self, latents: int) -> tuple[int, ...]:
    """Latent frames to give to each `decode_step`; others give the same."""
    return (1,) * latents

  def init_stream(self) -> Stream:
    """Begin a video."""
    return Stream(past={})

  def encode_step(
    self, params: Any, state: Stream, video: jax.Array
  ) -> tuple[Stream, jax.Array]:
    """Encode a stream's next frames: 4n+1 of them at first, then 4n.

    4 stands for the time stride. What comes out, one chunk after the other,
    equals `encode` of the whole.
    """
    self._check_video(video, state.first)
    net = Encoder(self.cfg, parent=None)
    x = resampling.space_to_channels(video, self.cfg.patch)
    state, y = _step(net, params["encoder"], state, x)
    mean, _ = posterior.split(_dense(params["quant"], y))
    shift, scale = self._vectors()
    return state, (mean - shift) / scale

  def decode_step(
    self, params: Any, state: Stream, latents: jax.Array
  ) -> tuple[Stream, jax.Array]:
    """Decode a stream's next latent frames, one or more; as `encode_step`."""
    shift, scale = self._vectors()
    z = _dense(params["post_quant"], latents * scale + shift)
    net = Decoder(self.cfg, parent=None)
    state, y = _step(net, params["decoder"], state, z)
    y = resampling.channels_to_space(y, self.cfg.patch)
    return state, jnp.clip(y, -1.0, 1.0)

  def _moments(self, video):
    self._check_video(video, True)
    x = resampling.space_to_channels(video, self.cfg.patch)
    size = self.cfg.time_stride
    return posterior.split(self.quant(self._whole(self.encoder, x, size)))

  def _decode(self, z):
    y = self._whole(self.decoder, self.post_quant(z), 1)
    return resampling.channels_to_space(y, self.cfg.patch)

  def _vectors(self):
    return jnp.array(self.cfg.mean), jnp.array(self.cfg.std)

  def _check_video(self, video, first):
    self.latent_shape(video.shape[1] + (not first), *video.shape[2:4])

  def _whole(self, net, x, size):
    """Run over all frames, so many at a time: memory is a chunk's."""
    if self.is_initializing():
      return net(x)
    bare = type(net)(self.cfg, parent=None)
    params = net.variables["params"]
    run = lambda _, x: ({}, streams.all_chunks(bare, params, x, size))
    return _over_tiles(bare, run, {}, x)[1]


class Encoder(nn.Module):
  """A chunk of pixels [B, F, H, W, C] -> [B, f, h, w, 2c] float32."""

  cfg: Config
  grows = False

  @nn.compact
  def __call__(self, x: jax.Array, first: bool = True) -> jax.Array:
    cfg = self.cfg
    x = _conv(cfg, cfg.width, "conv_in")(_by_batch(x), first)
    for i, times in enumerate(cfg.levels):
      width, before = cfg.width * times, x
      for j in range(cfg.blocks):
        x = ResBlock(cfg, width, name=f"down_{i}_block_{j}")(x, first)
      halves = i < len(cfg.levels) - 1
      time = halves and cfg.halve_time[i]
      if halves:
        conv = conv3d.conv2d(
          width, dtype=cfg.dtype, name=f"down_{i}_space", halve=True
        )
        x = conv(x)
      if time:
        x = resampling.halve_time(
          _time_conv(cfg, width, f"down_{i}_time"), x, first
        )
      if cfg.residual:
        x = x + resampling.average(before, width, 1 + time, 1 + halves)
    x = _middle(cfg, x, first)
    return _conv_out(cfg, x, 2 * cfg.latent_channels, first)


class Decoder(nn.Module):
  """A chunk of latents [B, f, h, w, c] -> pixels [B, F, H, W, C] float32."""

  cfg: Config
  grows = True

  @nn.compact
  def __call__(self, z: jax.Array, first: bool = True) -> jax.Array:
    cfg = self.cfg
    widths = [cfg.decoder_width * times for times in reversed(cfg.levels)]
    x = _conv(cfg, widths[0], "conv_in")(_by_batch(z), first)
    x = _middle(cfg, x, first)
    for i, width in enumerate(widths):
      before = x
      for j in range(cfg.blocks + 1):
        x = ResBlock(cfg, width, name=f"up_{i}_block_{j}")(x, first)
      if i == len(widths) - 1:
        break
      time = cfg.halve_time[::-1][i]
      if time:
        conv = _time_conv(cfg, 2 * width, f"up_{i}_time")
        x = resampling.double_time(conv, x, first)
      x = jnp.repeat(jnp.repeat(x, 2, axis=2), 2, axis=3)
      width = width if cfg.residual else width // 2
      x = conv3d.conv2d(width, dtype=cfg.dtype, name=f"up_{i}_space")(x)
      if cfg.residual:
        x = x + resampling.duplicate(before, width, 1 + time, 2, first)
    return _conv_out(cfg, x, 3 * cfg.patch**2, first)


class ResBlock(nn.Module):
  """Two convolutions beside a shortcut: [B, F, H, W, *] -> [..., features]."""

  cfg: Config
  features: int

  @nn.compact
  def __call__(self, x: jax.Array, first: bool) -> jax.Array:
    cfg, h = self.cfg, x
    for name in ("1", "2"):
      h = nn.silu(norms.RMSNorm(_EPS, name=f"norm_{name}")(h))
      h = _conv(cfg, self.features, f"conv_{name}")(h, first)
    if x.shape[-1] != self.features:
      x = _point(jnp.dtype(cfg.dtype), self.features, "shortcut")(x)
    return _by_batch(x + h)


class Attention(nn.Module):
  """Attention of one head among the places of a frame: [B, F, H, W, C]."""

  cfg: Config

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    (B, F, H, W, C), dtype = x.shape, jnp.dtype(self.cfg.dtype)
    h = norms.RMSNorm(_EPS, name="norm")(x)
    h = _point(dtype, 3 * C, "qkv")(h).reshape(B * F, H * W, 1, 3 * C)
    h = attention.attend_in_frames(*jnp.split(h, 3, axis=-1))
    return x + _point(dtype, C, "out")(h.reshape(x.shape))


def example(cfg: Config) -> tuple[jax.Array, jax.Array]:
  """Inputs as small as may be, to initialise an autoencoder with."""
  side = cfg.space_stride
  return jnp.zeros((1, 1, side, side, 3)), jax.random.key(0)


def _middle(cfg, x, first):
  x = ResBlock(cfg, x.shape[-1], name="mid_block_0")(x, first)
  x = Attention(cfg, name="mid_attention")(x)
  return ResBlock(cfg, x.shape[-1], name="mid_block_1")(x, first)


def _conv_out(cfg, x, features, first):
  x = nn.silu(norms.RMSNorm(_EPS, name="norm_out")(x))
  x = _conv(cfg, features, "conv_out", axis=None)(x, first)
  return x.astype(jnp.float32)


def _conv(cfg, features, name, kernel=(3, 3, 3), axis="conv_out"):
  dtype = jnp.dtype(cfg.dtype)
  return conv3d.CausalConv3d(
    features, kernel, axis=axis, dtype=dtype, name=name
  )


def _time_conv(cfg, features, name):
  return _conv(cfg, features, name, kernel=(3, 1, 1))


def _point(dtype, features, name):
  """A convolution of one place."""
  axes = (None, "conv_out" if name else None)
  return linear.dense(features, axes, name=name, dtype=dtype)


def _dense(params, x):
  """Apply a float32 dense layer's params."""
  return x @ params["kernel"].astype(jnp.float32) + params["bias"]


def _by_batch(x):
  return sharding.constrain(x, "batch", None, None, None, None)


def _step(net, params, state, x):
  """Run a network over a stream's next chunk: what to remember, its output."""
  run = lambda past, x: streams.one_chunk(net, params, past, x, state.first)
  past, y = _over_tiles(net, run, state.past, x)
  return Stream(past=past, first=False), y


def _over_tiles(net, run, past, x):
  """Run over x [B, F, H, W, C], or over its tiles if the config wants them."""
  cfg = net.cfg
  n, out = cfg.halvings, cfg.space_stride
  tile = tiles.Axis(_TILE, _HOP, (_TILE - _HOP) // n, _HOP // n)
  if net.grows:
    blend, keep = (_TILE - _HOP) // cfg.patch, _HOP // cfg.patch
    tile = tiles.Axis(_TILE // out, _HOP // out, blend, keep)
  if not cfg.tiled or max(x.shape[2:4]) <= tile.size:
    past, y = run(past.get("whole", {}), x)
    return {"whole": past}, y
  return tiles.run(run, past, x, tile, tile)
