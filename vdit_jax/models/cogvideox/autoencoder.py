"""CogVideoX's autoencoder: a causal 3D VAE that runs in released chunks.

TRAIN pixels -> encode -> latents; SAMPLE latents -> decode -> pixels.

The network of arXiv:2408.06072, section 2.1. Its GroupNorms reduce over the
frames of a chunk, so chunks are part of what it computes: the encoder takes 8
frames at a time, the decoder 2 latents, and what is left over joins the first
chunk. Convolutions see the chunk before, through `streams.Stream`. The
decoder's norms are scaled and shifted by the latents (arXiv:2209.09002).

Time is halved and doubled inside a chunk, in pairs behind an odd first frame.
So F frames become ceil(F / 4) latents, and T latents become 4 (T - 1) + 1
frames if T is odd and 4 T if it is even.
"""

import dataclasses
import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdit_jax import sharding
from vdit_jax.nn import conv3d, linear, norms, posterior, sizes, streams, tiles

Moments = posterior.Moments
Stream = streams.Stream

_FRAMES = 8  # of a chunk of the encoder
_LATENTS = 2  # of a chunk of the decoder
_EPS = 1e-6  # of the norms whose eps the released config does not set
_MID_BLOCKS = 2


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape of the autoencoder.

  Attributes:
    latent_channels: c.
    channels: width of each level; height and width are halved between two.
    blocks: residual blocks a level; the decoder has one more.
    groups: of the GroupNorms.
    eps: of the encoder's blocks; every other norm has 1e-6.
    time_stride: frames a latent frame; a power of 2, halved at the first
      levels of the encoder and doubled at the first ones of the decoder.
    scale: the latents leave multiplied by it.
    invert_scale_latents: what an image-to-video denoiser is given of an image
      is divided by `scale` (1.5) and not multiplied; `encode_condition` heeds
      it, nothing else does.
    tiled: run in overlapping tiles of height and width, blended, where a
      video is larger than `tile`. Less memory, other numbers.
    tile: height and width of a tile in pixels.
    tile_overlap: share of a tile that the next one covers too.
    dtype: compute type; norms are float32.
  """

  latent_channels: int = 16
  channels: tuple[int, ...] = (128, 256, 256, 512)
  blocks: int = 3
  groups: int = 32
  eps: float = 1e-6
  time_stride: int = 4
  scale: float = 1.15258426
  invert_scale_latents: bool = False
  tiled: bool = False
  tile: tuple[int, int] = (240, 360)
  tile_overlap: tuple[float, float] = (1 / 6, 1 / 5)
  dtype: str = "bfloat16"

  def __post_init__(self):
    most = min(self.space_stride, _FRAMES)
    if self.time_stride not in [2**i for i in range(most.bit_length())]:
      raise ValueError(
        f"time_stride must be a power of 2 up to {most} for "
        f"{len(self.channels)} levels, got {self.time_stride}; try {most}"
      )
    if self.tiled:
      for name, tile, overlap in zip(
        ("height", "width"), self.tile, self.tile_overlap, strict=True
      ):
        _check_tile(name, tile, overlap, self.space_stride)

  @property
  def space_stride(self) -> int:
    """Pixels of height or width a latent's."""
    return 2 ** (len(self.channels) - 1)


VARIANTS = {
  "2b": Config(),
  "5b": Config(scale=0.7),
  "5b_i2v": Config(scale=0.7),
  "1_5_5b": Config(scale=0.7),
  "1_5_5b_i2v": Config(scale=0.7, invert_scale_latents=True),
}


class Autoencoder(nn.Module):
  """CogVideoX's VAE: `apply({"params": params}, video, method="encode")`."""

  cfg: Config

  def setup(self) -> None:
    self.encoder = Encoder(self.cfg)
    self.decoder = Decoder(self.cfg)

  def __call__(
    self, video: jax.Array, key: jax.Array
  ) -> tuple[jax.Array, Moments]:
    """Reconstruct a video through a sample of its posterior, for training.

    Args:
      video: [B, F, H, W, 3] in [-1, 1].
      key: of the sample.

    Returns:
      The reconstruction [B, F, H, W, 3], for F of 8n or 8n+1, and the
      posterior (mean, logvar) of the latents before normalisation, each
      [B, f, h, w, c].
    """
    mean, logvar = self._moments(video)
    z = posterior.sample(mean, logvar, key)
    return self._whole(self.decoder, z), (mean, logvar)

  def encode(self, video: jax.Array, key: jax.Array | None = None) -> jax.Array:
    """Encode video [B, F, H, W, 3] to normalised latents [B, f, h, w, c].

    The posterior's mean, or a sample of it when given a key.
    """
    mean, logvar = self.moments(video)
    return mean if key is None else posterior.sample(mean, logvar, key)

  def encode_condition(
    self, video: jax.Array, noise: jax.Array | None = None
  ) -> jax.Array:
    """Encode what an image-to-video denoiser is shown of given frames.

    For 1.5 the latents are divided by the scale (see
    `Config.invert_scale_latents`).

    Args:
      video: [B, F, H, W, 3] in [-1, 1].
      noise: standard normal [B, f, h, w, c], which makes a sample of the
        posterior, as released; None takes its mean.
    """
    latents, logvar = self.moments(video)
    if noise is not None:
      latents = latents + jnp.exp(0.5 * logvar) * noise
    scale = self.cfg.scale
    return latents / scale**2 if self.cfg.invert_scale_latents else latents

  def moments(self, video: jax.Array) -> Moments:
    """Posterior (mean, logvar) of the normalised latents [B, f, h, w, c]."""
    mean, logvar = self._moments(video)
    return mean * self.cfg.scale, logvar + 2 * math.log(self.cfg.scale)

  def decode(self, latents: jax.Array) -> jax.Array:
    """Decode normalised latents [B, f, h, w, c] to [B, F, H, W, 3]."""
    return self._whole(self.decoder, latents / self.cfg.scale)

  def latent_frames(self, num_frames: int) -> int:
    """Count the latent frames that a video of F frames comes back from."""
    return max(-(-num_frames // self.cfg.time_stride), 1)

  def video_frames(self, latents: int) -> int:
    """Count the frames that f latent frames decode to."""
    return _decoded_frames(self.cfg, latents)

  def latent_shape(
    self, num_frames: int, height: int, width: int
  ) -> tuple[int, int, int, int]:
    """Latents (f, h, w, c) of a video; refuse one that would not come back.

    `encode` takes any number of frames, but only 8n and 8n+1 of them are as
    many again after `decode`.
    """
    cfg, n = self.cfg, self.latent_frames(num_frames)
    if _decoded_frames(cfg, n) != num_frames:
      near = [_decoded_frames(cfg, k) for k in (max(n - 1, 1), n, n + 1)]
      near = min(near, key=lambda F: abs(F - num_frames))
      pair = _LATENTS * cfg.time_stride
      raise ValueError(
        f"num_frames must be {pair}n or {pair}n+1, got {num_frames}; try {near}"
      )
    space = sizes.latent_space(cfg.space_stride, height, width)
    return n, *space, cfg.latent_channels

  def normalisation(self, params: Any) -> dict[str, Any]:
    """What normalises the latents: of the config, by name."""
    del params
    return {"scale": self.cfg.scale}

  def in_tiles(self) -> "Autoencoder":
    """Return the same, run in overlapping tiles of height and width."""
    return self.clone(cfg=dataclasses.replace(self.cfg, tiled=True))

  def encode_chunks(self, num_frames: int) -> tuple[int, ...]:
    """Frames to give to each `encode_step`: 8, the remainder with the first."""
    return streams.split(num_frames, _FRAMES)

  def decode_chunks(self, latents: int) -> tuple[int, ...]:
    """Latents to give to each `decode_step`: 2, or 3 at first if odd."""
    return streams.split(latents, _LATENTS)

  def init_stream(self) -> Stream:
    """Begin a video."""
    return Stream(past={})

  def encode_step(
    self, params: Any, state: Stream, video: jax.Array
  ) -> tuple[Stream, jax.Array]:
    """Encode a stream's next frames: 8, or up to 15 at first.

    What comes out, one chunk of `encode_chunks` after the other, equals
    `encode` of the whole.
    """
    sizes.latent_space(self.cfg.space_stride, *video.shape[2:4])
    net = Encoder(self.cfg, parent=None)
    state, moments = _step(net, params["encoder"], state, video)
    return state, posterior.split(moments)[0] * self.cfg.scale

  def decode_step(
    self, params: Any, state: Stream, latents: jax.Array
  ) -> tuple[Stream, jax.Array]:
    """Decode a stream's next latents: 2, or up to 3 at first."""
    net = Decoder(self.cfg, parent=None)
    return _step(net, params["decoder"], state, latents / self.cfg.scale)

  def _moments(self, video):
    sizes.latent_space(self.cfg.space_stride, *video.shape[2:4])
    return posterior.split(self._whole(self.encoder, video))

  def _whole(self, net, x):
    if self.is_initializing():
      return net(x)
    bare = type(net)(self.cfg, parent=None)
    params = net.variables["params"]
    run = lambda x: streams.all_chunks(bare, params, x, bare.chunk)
    return _over_tiles(bare, lambda _, x: ({}, run(x)), {}, x)[1]


class Encoder(nn.Module):
  """A chunk of video [B, F, H, W, 3] -> moments [B, f, h, w, 2c] float32."""

  cfg: Config
  chunk = _FRAMES
  grows = False

  @nn.compact
  def __call__(self, video: jax.Array, first: bool = True) -> jax.Array:
    cfg = self.cfg
    x = _conv(cfg, cfg.channels[0], "conv_in")(_by_batch(video), first)
    for i, width in enumerate(cfg.channels):
      for j in range(cfg.blocks):
        block = ResBlock(cfg, width, name=f"down_{i}_block_{j}")
        x = block(x, None, first)
      if i < len(cfg.channels) - 1:
        x = halve_time(x) if 2**i < cfg.time_stride else x
        x = _conv2d(cfg, width, f"down_{i}_conv", halve=True)(x)
    for j in range(_MID_BLOCKS):
      x = ResBlock(cfg, x.shape[-1], name=f"mid_block_{j}")(x, None, first)
    x = nn.silu(norms.GroupNorm(cfg.groups, _EPS, name="norm_out")(x))
    c2 = 2 * cfg.latent_channels
    return _conv(cfg, c2, "conv_out", None)(x, first).astype(jnp.float32)


class Decoder(nn.Module):
  """A chunk of latents [B, f, h, w, c] -> video [B, F, H, W, 3] float32."""

  cfg: Config
  chunk = _LATENTS
  grows = True

  @nn.compact
  def __call__(self, z: jax.Array, first: bool = True) -> jax.Array:
    cfg, z = self.cfg, _by_batch(z)
    x = _conv(cfg, cfg.channels[-1], "conv_in")(z, first)
    for j in range(_MID_BLOCKS):
      x = ResBlock(cfg, x.shape[-1], name=f"mid_block_{j}")(x, z, first)
    for i, width in enumerate(reversed(cfg.channels)):
      for j in range(cfg.blocks + 1):
        x = ResBlock(cfg, width, name=f"up_{i}_block_{j}")(x, z, first)
      if i < len(cfg.channels) - 1:
        frames = x.shape[1]
        if frames > 1 and 2**i < cfg.time_stride:
          frames = 2 * frames - frames % 2
        x = stretch(x, frames, 2 * x.shape[2], 2 * x.shape[3])
        x = _conv2d(cfg, width, f"up_{i}_conv")(x)
    x = SpatialNorm(cfg, name="norm_out")(x, z)
    return _conv(cfg, 3, "conv_out", None)(x, first).astype(jnp.float32)


class ResBlock(nn.Module):
  """Two convolutions beside a shortcut: [B, F, H, W, *] -> [..., features].

  With latents z [B, f, h, w, c] the norms are spatial (the decoder's).
  """

  cfg: Config
  features: int

  @nn.compact
  def __call__(
    self, x: jax.Array, z: jax.Array | None, first: bool
  ) -> jax.Array:
    cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
    h = _conv(cfg, self.features, "conv_1")(self._act("norm_1", x, z), first)
    h = _conv(cfg, self.features, "conv_2")(self._act("norm_2", h, z), first)
    if x.shape[-1] != self.features:
      axes = (None, "conv_out")
      x = linear.dense(self.features, axes, name="shortcut", dtype=dtype)(x)
    return _by_batch(x + h)

  def _act(self, name, x, z):
    if z is None:
      return nn.silu(
        norms.GroupNorm(self.cfg.groups, self.cfg.eps, name=name)(x)
      )
    return SpatialNorm(self.cfg, name=name)(x, z)


class SpatialNorm(nn.Module):
  """GroupNorm of x [B, F, H, W, D], scale and shift by z [B, f, h, w, c], SiLU.

  In float32; it gives the compute type. The released network stretches z to
  x's size before it projects it; the other way round is the same and 64 times
  as cheap or more.
  """

  cfg: Config

  @nn.compact
  def __call__(self, x: jax.Array, z: jax.Array) -> jax.Array:
    project = functools.partial(
      linear.dense,
      x.shape[-1],
      (None, None),
      dtype=jnp.float32,
      precision=jax.lax.Precision.HIGHEST,
    )
    (B, F, H, W, D), (h, w) = x.shape, z.shape[2:4]
    # Kept small along height and width: as large as x, scale and shift would
    # be the largest arrays of the network. But for the barrier, XLA would move
    # the reshape behind their broadcasts and so write these out.
    scale, shift = (
      stretch(project(name=name)(z), F, h, w)[:, :, :, None, :, None]
      for name in ("scale", "shift")
    )
    x = jax.lax.optimization_barrier(x.reshape(B, F, h, H // h, w, W // w, D))
    x = nn.silu(
      norms.GroupNorm(self.cfg.groups, _EPS, name="norm")(x) * scale + shift
    )
    return x.astype(self.cfg.dtype).reshape(B, F, H, W, D)


class _RepeatConv3d(conv3d.CausalConv3d):
  """The causal convolution, with a video's first frame repeated before it."""

  def _extend(self, x: jax.Array, first: bool) -> jax.Array:
    past = self.kernel[0] - 1
    if first:
      before = jnp.repeat(x[:, :1], past, axis=1)
    else:
      before = self.get_variable(conv3d.STREAM, "past")
    x = jnp.concatenate([before, x], axis=1)
    if self.is_mutable_collection(conv3d.STREAM) and not self.is_initializing():
      self.put_variable(conv3d.STREAM, "past", x[:, -past:])
    return x


def halve_time(x: jax.Array) -> jax.Array:
  """Average pairs of frames of [B, F, H, W, C]; an odd first one is kept."""
  B, F, *rest = x.shape
  pairs = x[:, F % 2 :].reshape(B, F // 2, 2, *rest)
  return jnp.concatenate([x[:, : F % 2], jnp.mean(pairs, axis=2)], axis=1)


def stretch(x: jax.Array, F: int, H: int, W: int) -> jax.Array:
  """Repeat [B, f, h, w, C] to [B, F, H, W, C], all whole multiples.

  If F is odd, the first frame stays one and the others are repeated.
  """
  alone = F % 2 if F > 1 else 0
  rest = jnp.repeat(x[:, alone:], (F - alone) // (x.shape[1] - alone), axis=1)
  x = jnp.concatenate([x[:, :alone], rest], axis=1)
  x = jnp.repeat(x, H // x.shape[2], axis=2)
  return jnp.repeat(x, W // x.shape[3], axis=3)


def example(cfg: Config) -> tuple[jax.Array, jax.Array]:
  """Inputs as small as may be, to initialise an autoencoder with."""
  side = cfg.space_stride
  return jnp.zeros((1, 1, side, side, 3)), jax.random.key(0)


def _decoded_frames(cfg, latents):
  odd = latents % 2
  return cfg.time_stride * (latents - odd) + odd


def _by_batch(x):
  return sharding.constrain(x, "batch", None, None, None, None)


def _conv(cfg, features, name, axis="conv_out"):
  dtype = jnp.dtype(cfg.dtype)
  return _RepeatConv3d(features, (3, 3, 3), axis=axis, dtype=dtype, name=name)


def _conv2d(cfg, features, name, halve=False):
  return conv3d.conv2d(features, name=name, dtype=cfg.dtype, halve=halve)


def _step(net, params, state, x):
  """Run a network over a stream's next chunk."""
  n, size = x.shape[1], net.chunk
  if not (1 <= n < 2 * size if state.first else n == size):
    name = "latents" if net.grows else "video"
    raise ValueError(
      f"{name} must come in the released chunks, 1 to {2 * size - 1} frames "
      f"and then {size} each time, got {n}; split it as "
      f"{'decode' if net.grows else 'encode'}_chunks says"
    )
  run = lambda past, x: streams.one_chunk(net, params, past, x, state.first)
  past, y = _over_tiles(net, run, state.past, x)
  return Stream(past=past, first=False), y


def _tile(tile, overlap, stride, grows):
  """Tiles of one axis of a network's input, rounded as the release does."""
  small = tile // stride
  size, out = (small, tile) if grows else (tile, small)
  blend = int(out * overlap)
  return tiles.Axis(size, int(size * (1 - overlap)), blend, out - blend)


def _even(tile, overlap, stride):
  """Whether what is kept of a tile ends where the next one begins."""
  encode, decode = (_tile(tile, overlap, stride, g) for g in (False, True))
  return (
    min(encode.hop, decode.hop, encode.keep, decode.keep) > 0
    and encode.hop == stride * encode.keep
    and decode.keep == stride * decode.hop
  )


def _check_tile(name, tile, overlap, stride):
  if tile < stride or tile % stride:
    near = max(round(tile / stride), 1) * stride
    raise ValueError(
      f"tile {name} must be a multiple of {stride}, got {tile}; try {near}"
    )
  if not _even(tile, overlap, stride):
    n = tile // stride
    fit = [k for k in range(1, n) if _even(tile, k / n, stride)] or [0]
    k = min(fit, key=lambda k: abs(k / n - overlap))
    raise ValueError(
      f"tile_overlap of {name} must be a whole number of the {n} latents of a "
      f"tile of {tile} pixels, got {overlap}; try {k}/{n}"
    )


def _over_tiles(net, run, past, x):
  """Run over x [B, F, H, W, C], or over its tiles if the config wants them."""
  cfg = net.cfg
  axes = [
    _tile(tile, overlap, cfg.space_stride, net.grows)
    for tile, overlap in zip(cfg.tile, cfg.tile_overlap, strict=True)
  ]
  small = all(n <= a.size for n, a in zip(x.shape[2:4], axes, strict=True))
  if not cfg.tiled or small:
    past, y = run(past.get("whole", {}), x)
    return {"whole": past}, y
  return tiles.run(run, past, x, *axes)
