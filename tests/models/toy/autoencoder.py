"""An autoencoder without time compression, normalised by vectors."""

import dataclasses

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from vdit_jax.nn import linear, sizes, streams


@dataclasses.dataclass(frozen=True)
class Config:
  latent_channels: int = 3
  space_stride: int = 8
  time_stride: int = 1
  shift: tuple[float, ...] = (0.1, -0.2, 0.3)
  factor: tuple[float, ...] = (2.0, 3.0, 4.0)
  dtype: str = "float32"


VARIANTS = {"small": Config()}


def example(cfg):
  return (jnp.zeros((1, 1, cfg.space_stride, cfg.space_stride, 3)),)


class Autoencoder(nn.Module):
  cfg: Config

  def setup(self):
    dense = lambda name, n: linear.dense(
      n, (None, None), name=name, dtype=jnp.float32
    )
    self.encode_in = dense("encoder", self.cfg.latent_channels)
    self.decode_out = dense("decoder", 3 * self.cfg.space_stride**2)

  def __call__(self, video):
    return self.decode(self.encode(video))

  def encode(self, video, key=None):
    del key
    return self.moments(video)[0]

  def moments(self, video):
    n, (B, F, H, W, C) = self.cfg.space_stride, video.shape
    x = video.reshape(B, F, H // n, n, W // n, n, C).swapaxes(3, 4)
    z = self.encode_in(x.reshape(B, F, H // n, W // n, n * n * C))
    z = (z - jnp.array(self.cfg.shift)) * jnp.array(self.cfg.factor)
    return z, jnp.full_like(z, -10.0)

  def encode_condition(self, video, noise=None):
    mean, logvar = self.moments(video)
    return mean if noise is None else mean + jnp.exp(0.5 * logvar) * noise

  def decode(self, latents):
    n, (B, F, h, w, _) = self.cfg.space_stride, latents.shape
    x = latents / jnp.array(self.cfg.factor) + jnp.array(self.cfg.shift)
    x = self.decode_out(x).reshape(B, F, h, w, n, n, 3).swapaxes(3, 4)
    return jnp.tanh(x.reshape(B, F, h * n, w * n, 3))

  def latent_frames(self, num_frames):
    return num_frames

  def video_frames(self, latents):
    return latents

  def latent_shape(self, num_frames, height, width):
    space = sizes.latent_space(self.cfg.space_stride, height, width)
    return num_frames, *space, self.cfg.latent_channels

  def latent_mask(self, mask):
    return np.asarray(mask)

  def normalisation(self, params):
    del params
    return {"shift": self.cfg.shift, "factor": self.cfg.factor}

  def in_tiles(self):
    raise ValueError("toy has no tiles")

  def init_stream(self):
    return streams.Stream(past={})

  def decode_chunks(self, latents):
    return (1,) * latents

  def decode_step(self, params, state, latents):
    video = self.apply({"params": params}, latents, method="decode")
    return state.replace(first=False), video
