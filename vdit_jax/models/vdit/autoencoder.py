"""Our autoencoder: a causal 3D VAE that streams in time.

TRAIN pixels -> encode -> latents; SAMPLE latents -> decode -> pixels.

A frame depends on no later one: convolutions pad time in front only, time is
halved by merging pairs of frames behind a first frame that stands alone, and
every norm looks at one place of one frame. So an image is a video of one
frame, and a video goes through in chunks of any length with the exact result
of the whole: what a chunk must know of the past is kept in a
`streams.Stream`. Causal 3D VAEs are due to MAGVIT-v2 (arXiv:2310.05737);
changing resolution by moving pixels into channels to DC-AE (arXiv:2410.10733).
"""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdit_jax.nn import conv3d, linear, norms, posterior, sizes, streams

Moments = posterior.Moments
Stream = streams.Stream

_CHUNK = 8  # latent frames decoded at once: bounds the decoder's memory

# The posterior begins narrow: at a variance of 1 its noise would drown means
# that are small at first, and what is drowned gets no gradient to grow.
_FIRST_LOGVAR = -6.0

# The second convolution of a block begins small, so that blocks begin as
# identities.
_SMALL = nn.initializers.variance_scaling(0.01, "fan_in", "truncated_normal")


@dataclasses.dataclass(frozen=True)
class Config:
  """Shape of the autoencoder.

  Attributes:
    latent_channels: c.
    patch: pixels along height and width moved into channels at the start.
    channels: width of each level; between two levels height and width are
      halved where `halve_space` says so and time where `halve_time` does.
    blocks: residual blocks a level.
    kernels: convolution kernel of each level, (frames, height, width).
    dtype: compute type.
  """

  latent_channels: int = 16
  patch: int = 2
  channels: tuple[int, ...] = (128, 256, 512)
  blocks: int = 2
  halve_space: tuple[bool, ...] = (True, True)
  halve_time: tuple[bool, ...] = (True, True)
  kernels: tuple[tuple[int, int, int], ...] = ((3, 3, 3),) * 3
  dtype: str = "bfloat16"

  def __post_init__(self):
    levels = len(self.channels)
    if len(self.kernels) != levels or not (
      len(self.halve_space) == len(self.halve_time) == levels - 1
    ):
      raise ValueError(
        f"{levels} channels {self.channels} need {levels} kernels and "
        f"{levels - 1} entries in halve_space and halve_time, got "
        f"{self.kernels}, {self.halve_space}, {self.halve_time}"
      )

  @property
  def time_stride(self) -> int:
    """Frames of video a latent frame, but for the first."""
    return 2 ** sum(self.halve_time)

  @property
  def space_stride(self) -> int:
    """Pixels of height or width a latent's."""
    return self.patch * 2 ** sum(self.halve_space)


VARIANTS = {
  "digits": Config(
    latent_channels=8,
    channels=(32, 56, 72),
    blocks=1,
    halve_space=(True, False),
    kernels=((1, 3, 3), (3, 3, 3), (3, 3, 3)),
    dtype="float32",
  ),
  "4x8x8": Config(),
}


class Autoencoder(sizes.CausalLatents, nn.Module):
  """Causal 3D VAE: `apply({"params": params}, video, method="encode")`."""

  cfg: Config

  def setup(self) -> None:
    self.encoder = Encoder(self.cfg)
    self.decoder = Decoder(self.cfg)
    c = (self.cfg.latent_channels,)
    self.latent_mean = self.param("latent_mean", nn.initializers.zeros, c)
    self.latent_std = self.param("latent_std", nn.initializers.ones, c)

  def __call__(
    self, video: jax.Array, key: jax.Array
  ) -> tuple[jax.Array, Moments]:
    """Reconstruct a video through a sample of its posterior, for training.

    Args:
      video: [B, F, H, W, 3] in [-1, 1].
      key: of the sample, or one for each clip [B].

    Returns:
      The reconstruction [B, F, H, W, 3] and the posterior (mean, logvar) of
      the latents before normalisation, each [B, f, h, w, c].
    """
    mean, logvar = self.encoder(video)
    return self.decoder(posterior.sample(mean, logvar, key)), (mean, logvar)

  def encode(
    self, video: jax.Array, key: jax.Array | None = None, first: bool = True
  ) -> jax.Array:
    """Encode video [B, F, H, W, 3] to normalised latents [B, f, h, w, c].

    The posterior's mean, or a sample of it when given a key. `first` says
    that the video begins here and does not go on from a stream's chunk.
    """
    mean, logvar = self.moments(video, first)
    return mean if key is None else posterior.sample(mean, logvar, key)

  def moments(self, video: jax.Array, first: bool = True) -> Moments:
    """Posterior (mean, logvar) of the normalised latents [B, f, h, w, c]."""
    num_frames = video.shape[1] + (0 if first else 1)
    self.latent_shape(num_frames, *video.shape[2:4])
    mean, logvar = self.encoder(video, first)
    mean = (mean - self.latent_mean) / self.latent_std
    return mean, logvar - 2 * jnp.log(self.latent_std)

  def decode(self, latents: jax.Array, first: bool = True) -> jax.Array:
    """Decode normalised latents [B, f, h, w, c] to [B, F, H, W, 3]."""
    return self.decoder(latents * self.latent_std + self.latent_mean, first)

  def normalisation(self, params: Any) -> dict[str, Any]:
    """What normalises the latents: of the params, by name."""
    return {name: params[name] for name in ("latent_mean", "latent_std")}

  def in_tiles(self) -> nn.Module:
    """Refuse tiles of height and width, which this autoencoder has not."""
    raise ValueError(
      "tiled is for released autoencoders that have tiles; this one's rows are "
      "split over devices by mesh.context"
    )

  def decode_chunks(self, latents: int) -> tuple[int, ...]:
    """Latent frames to give to each `decode_step`; any others give the same."""
    first = latents % _CHUNK or _CHUNK
    return first, *(_CHUNK,) * (latents // _CHUNK - (first == _CHUNK))

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
    return self._step("encode", params, state, video)

  def decode_step(
    self, params: Any, state: Stream, latents: jax.Array
  ) -> tuple[Stream, jax.Array]:
    """Decode a stream's next latent frames, one or more; as `encode_step`."""
    return self._step("decode", params, state, latents)

  def _step(self, method, params, state, x):
    variables = {"params": params, conv3d.STREAM: state.past}
    y, changed = self.apply(
      variables,
      x,
      first=state.first,
      method=method,
      mutable=[conv3d.STREAM],
    )
    return Stream(past=changed[conv3d.STREAM], first=False), y


class Encoder(nn.Module):
  """Video [B, F, H, W, 3] -> moments (mean, logvar) [B, f, h, w, c]."""

  cfg: Config

  @nn.compact
  def __call__(self, video: jax.Array, first: bool = True) -> Moments:
    cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
    x = space_to_channels(video.astype(dtype), cfg.patch)
    conv = _conv(cfg, cfg.channels[0], cfg.kernels[0])
    x = conv(name="conv_in")(x, first)
    for level in range(len(cfg.channels)):
      if level:
        space = 1 + cfg.halve_space[level - 1]
        time = 1 + cfg.halve_time[level - 1]
        x = time_to_channels(space_to_channels(x, space), time, first)
        width = cfg.channels[level]
        x = _pointwise(cfg, width, f"down_{level}")(x)
      for i in range(cfg.blocks):
        x = ResBlock(cfg, level, name=f"level_{level}_block_{i}")(x, first)
    x = nn.silu(norms.RMSNorm(name="norm_out")(x))
    c2 = 2 * cfg.latent_channels
    conv = _conv(cfg, c2, cfg.kernels[-1], axis=None)
    moments = conv(name="conv_out")(x, first).astype(jnp.float32)
    mean, logvar = jnp.split(moments, 2, axis=-1)
    return mean, jnp.clip(logvar + _FIRST_LOGVAR, -30.0, 20.0)


class Decoder(nn.Module):
  """Latents [B, f, h, w, c] -> video [B, F, H, W, 3]."""

  cfg: Config

  @nn.compact
  def __call__(self, latents: jax.Array, first: bool = True) -> jax.Array:
    cfg, dtype = self.cfg, jnp.dtype(self.cfg.dtype)
    conv = _conv(cfg, cfg.channels[-1], cfg.kernels[-1])
    x = conv(name="conv_in")(latents.astype(dtype), first)
    for level in reversed(range(len(cfg.channels))):
      for i in range(cfg.blocks):
        x = ResBlock(cfg, level, name=f"level_{level}_block_{i}")(x, first)
      if level:
        space = 1 + cfg.halve_space[level - 1]
        time = 1 + cfg.halve_time[level - 1]
        width = cfg.channels[level - 1] * space * space * time
        x = _pointwise(cfg, width, f"up_{level}")(x)
        x = channels_to_space(channels_to_time(x, time, first), space)
    x = nn.silu(norms.RMSNorm(name="norm_out")(x))
    pixels = 3 * cfg.patch**2
    conv = _conv(cfg, pixels, cfg.kernels[0], axis=None)
    x = conv(name="conv_out")(x, first)
    return channels_to_space(x, cfg.patch).astype(jnp.float32)


class ResBlock(nn.Module):
  """Two convolutions beside the identity: [B, f, h, w, D] -> same."""

  cfg: Config
  level: int

  @nn.compact
  def __call__(self, x: jax.Array, first: bool = True) -> jax.Array:
    conv = _conv(self.cfg, x.shape[-1], self.cfg.kernels[self.level])
    h = nn.silu(norms.RMSNorm(name="norm_1")(x))
    h = conv(name="conv_1")(h, first)
    h = nn.silu(norms.RMSNorm(name="norm_2")(h))
    return x + conv(kernel_init=_SMALL, name="conv_2")(h, first)


def example(cfg: Config) -> tuple[jax.Array, jax.Array]:
  """Inputs as small as may be, to initialise an autoencoder with."""
  side = cfg.space_stride
  video = jnp.zeros((1, cfg.time_stride + 1, side, side, 3))
  return video, jax.random.key(0)


def space_to_channels(x: jax.Array, n: int) -> jax.Array:
  """[B, F, H, W, C] -> [B, F, H/n, W/n, n n C]."""
  B, F, H, W, C = x.shape
  x = x.reshape(B, F, H // n, n, W // n, n, C)
  x = jnp.swapaxes(x, 3, 4)
  return x.reshape(B, F, H // n, W // n, n * n * C)


def channels_to_space(x: jax.Array, n: int) -> jax.Array:
  """Invert `space_to_channels`."""
  B, F, H, W, C = x.shape
  x = x.reshape(B, F, H, W, n, n, C // n**2)
  x = jnp.swapaxes(x, 3, 4)
  return x.reshape(B, F, H * n, W * n, C // n**2)


def time_to_channels(x: jax.Array, n: int, first: bool) -> jax.Array:
  """[B, F, H, W, C] -> [B, F/n, H, W, n C]; a video's first frame is alone."""
  if first and n > 1:
    x = jnp.concatenate([x[:, :1]] * (n - 1) + [x], axis=1)
  B, F, H, W, C = x.shape
  x = jnp.moveaxis(x.reshape(B, F // n, n, H, W, C), 2, 4)
  return x.reshape(B, F // n, H, W, n * C)


def channels_to_time(x: jax.Array, n: int, first: bool) -> jax.Array:
  """Invert `time_to_channels`; a video's first frame keeps its last copy."""
  B, F, H, W, C = x.shape
  x = jnp.moveaxis(x.reshape(B, F, H, W, n, C // n), 4, 2)
  x = x.reshape(B, F * n, H, W, C // n)
  return x[:, n - 1 :] if first else x


def _conv(cfg, features, kernel, axis="conv_out"):
  return functools.partial(
    conv3d.CausalConv3d,
    features,
    kernel,
    axis=axis,
    dtype=jnp.dtype(cfg.dtype),
  )


def _pointwise(cfg, features, name):
  axes = (None, "conv_out")
  return linear.dense(features, axes, name=name, dtype=jnp.dtype(cfg.dtype))
