"""What an image-to-video denoiser is shown of clips in training.

batch -> first frames, noised and perhaps dropped -> Given
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vdit_jax import encoding, sampling, types
from vdit_jax.diffusion import schedules
from vdit_jax.models.system import Modules


@dataclasses.dataclass(frozen=True)
class Image:
  """How an image-to-video denoiser is shown the first frame in training.

  Noise whose standard deviation is log-normal, so that a user's image need not
  be as clean as a video's frame, and sometimes no image at all.

  Attributes:
    noise_mean, noise_std: of the logarithm of the noise's deviation, pixels
      being in [-1, 1]. arXiv:2408.06072, section 3.1, and its code have these.
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
  modules: Modules,
  image: Image,
  frozen: Any,
  batch: types.Batch,
  f: int,
  keys: jax.Array | None,
) -> types.Given:
  """Condition on the first frames of a batch.

  Args:
    modules: the networks.
    image: noise and dropout.
    frozen: weights, with the autoencoder's.
    batch: clips, or their latents and images.
    f: latent frames of a clip.
    keys: of each clip [B]; without them images are clean and all are shown.
  """
  first = batch.video[:, 0] if batch.image is None else batch.image
  first, keep, draw = encoding.to_float(first), True, lambda shape: None
  if keys is not None:
    keys = jax.vmap(lambda key: jax.random.split(key, 4))(keys)  # [B, 4]
    first = first + _noise(image, first.shape[1:], keys)
    draw = lambda shape: sampling.draw_noise(keys[:, 2], shape)
    keep = jax.vmap(jax.random.uniform)(keys[:, 3]) >= image.dropout

  def apply(*args: Any, method: str, network: str = "autoencoder") -> Any:
    variables = {"params": frozen[network]}
    return modules[network].apply(variables, *args, method=method)

  num_frames = modules.autoencoder.video_frames(f)
  rest = [(0, 0), (0, num_frames - 1), *[(0, 0)] * 3]
  mask = np.arange(num_frames)[None].repeat(len(first), 0) == 0
  video = jnp.pad(first[:, None], rest)
  given = modules.system.condition(modules, apply, video, mask, draw)
  return jax.tree.map(lambda x: _keep(x, keep), given)


def _keep(x: jax.Array, keep: Any) -> jax.Array:
  """Put zeros, or False, in the place of clips that `keep` [B] drops."""
  kept = schedules.expand(jnp.asarray(keep), x)
  return jax.lax.stop_gradient(jnp.where(kept, x, jnp.zeros_like(x)))


def _noise(image: Image, shape: tuple[int, ...], keys: jax.Array) -> jax.Array:
  """Draw the noise of images [B, H, W, 3] by the first two keys of each."""
  deviation = jnp.exp(
    image.noise_mean + image.noise_std * jax.vmap(jax.random.normal)(keys[:, 0])
  )
  noise = sampling.draw_noise(keys[:, 1], shape)
  return schedules.expand(deviation, noise) * noise
