"""What an image-to-video denoiser is shown of clips in training.

batch -> first frames, noised and perhaps dropped -> Cond
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vdit_jax import pipeline, sampling, types
from vdit_jax.diffusion import schedules
from vdit_jax.models import networks


@dataclasses.dataclass(frozen=True)
class Image:
  """How an image-to-video denoiser is shown the first frame in training.

  CogVideoX's numbers (arXiv:2408.06072, section 3.1, and its code): noise
  whose standard deviation is log-normal, so that a user's image need not be
  as clean as a video's frame, and sometimes no image at all.

  Attributes:
    noise_mean, noise_std: of the logarithm of the noise's deviation, pixels
      being in [-1, 1].
    dropout: share of clips whose image is zeros.
  """

  noise_mean: float = -3.0
  noise_std: float = 0.5
  dropout: float = 0.05

  def __post_init__(self):
    if not 0 <= self.dropout < 1:
      raise ValueError(f"image.dropout must be in [0, 1), got {self.dropout}")
    if self.noise_std < 0:
      raise ValueError(
        f"image.noise_std must not be negative, got {self.noise_std}"
      )


def show(
  modules: networks.Modules,
  how: Image,
  frozen: Any,
  batch: types.Batch,
  f: int,
  keys: jax.Array | None,
) -> types.Cond:
  """Condition on the first frames of a batch.

  Args:
    modules: the networks.
    how: noise and dropout.
    frozen: weights, with the autoencoder's.
    batch: clips, or their latents and images.
    f: latent frames of a clip.
    keys: of each clip [B]; without them images are clean and all are shown.
  """
  denoiser, file = modules.denoiser.cfg, networks.file(modules.denoiser)
  image = batch.video[:, 0] if batch.image is None else batch.image
  image, keep, noise = pipeline.to_float(image), 1.0, None
  frames = denoiser.time_stride * (f - 1) + 1
  if keys is not None:
    _, h, w, _ = file.latent_shape(denoiser, frames, *image.shape[1:3])
    keys = jax.vmap(lambda key: jax.random.split(key, 4))(keys)  # [B, 4]
    image = image + _noise(how, image.shape[1:], keys)
    noise = sampling.draw_noise(keys[:, 2], (1, h, w, denoiser.image_channels))
    keep = jax.vmap(jax.random.uniform)(keys[:, 3]) >= how.dropout
    keep = keep.reshape(-1, 1, 1, 1, 1)

  def encode(video):
    variables = {"params": frozen["autoencoder"]}
    return modules.autoencoder.apply(
      variables, video, noise, method="encode_condition"
    )

  video = jnp.pad(image[:, None], [(0, 0), (0, frames - 1), *[(0, 0)] * 3])
  given = np.arange(frames)[None].repeat(len(image), 0) == 0
  cond = file.condition(denoiser, video, given, encode)
  return jax.tree.map(lambda x: jax.lax.stop_gradient(x * keep), cond)


def _noise(how: Image, shape: tuple[int, ...], keys: jax.Array):
  """Draw the noise of images [B, H, W, 3] by the first two keys of each."""
  deviation = jnp.exp(
    how.noise_mean + how.noise_std * jax.vmap(jax.random.normal)(keys[:, 0])
  )
  noise = sampling.draw_noise(keys[:, 1], shape)
  return schedules.expand(deviation, noise) * noise
