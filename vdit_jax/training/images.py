"""What a denoiser that must be given frames is shown of clips in training.

batch -> the frames, noised and perhaps dropped -> Given
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vdit_jax import encoding, sampling, types
from vdit_jax.diffusion import schedules
from vdit_jax.models import frame_positions, networks
from vdit_jax.models import system as systems
from vdit_jax.models.system import Modules


def shower(image: types.Image) -> Callable[..., types.Given]:
  """Give `show` with its image settled, as `training.denoiser` takes it."""
  return lambda modules, *clips: show(modules, image, *clips)


def show(
  modules: Modules,
  image: types.Image,
  frozen: Any,
  batch: types.Batch,
  f: int,
  keys: jax.Array | None,
) -> types.Given:
  """Condition on the frames of a batch that its system must be given.

  Args:
    modules: the networks.
    image: noise and dropout.
    frozen: weights, with the autoencoder's, and those of other networks that
      frames are encoded by unless the batch has what they gave.
    batch: clips, or their latents and these frames.
    f: latent frames of a clip.
    keys: of each clip [B]; without them frames are clean and all are shown.
  """
  keep, draw, noise = True, lambda shape: None, None
  if keys is not None:
    keys = jax.vmap(lambda key: jax.random.split(key, 4))(keys)  # [B, 4]
    draw = lambda shape: sampling.draw_noise(keys[:, 2], shape)
    keep = jax.vmap(jax.random.uniform)(keys[:, 3]) >= image.dropout
    noise = lambda shape: _noise(image, shape, keys)
  num_frames = modules.autoencoder.video_frames(f)
  apply = _applied(modules, frozen, dict(batch.encoded))
  given = _condition(modules, apply, batch, num_frames, draw, noise)
  return jax.tree.map(lambda x: _keep(x, keep), given)


def encode(
  modules: Modules, params: Any, video: jax.Array
) -> dict[str, jax.Array]:
  """Encode the frames that a system must be given, as a cache keeps it.

  Args:
    modules: the networks.
    params: of the autoencoder and of those that frames are encoded by.
    video: clips, uint8 [B, F, H, W, 3].

  Returns:
    What each network but the autoencoder gave in the system's `condition`, by
    name, [B, k, ...] of its k rows a clip; `show` takes it back as
    `Batch.encoded`.
  """
  found: dict[str, jax.Array] = {}
  run = _applied(modules, params, {})

  def apply(*args: Any, method: str, network: str = "autoencoder") -> Any:
    if network in found:
      raise ValueError(
        f"condition of {modules.system.name} must run {network} once to be "
        "cached; let it encode all frames in one batch"
      )
    output = run(*args, method=method, network=network)
    if network != "autoencoder":
      found[network] = output.reshape(len(video), -1, *output.shape[1:])
    return output

  batch = types.Batch(video=video, weight=jnp.ones(len(video)))
  _condition(modules, apply, batch, video.shape[1], lambda shape: None, None)
  return found


def describe(modules: Modules, video: Any) -> dict[str, Any]:
  """Describe what `encode` gives of clips, as shapes."""

  def run(video: jax.Array) -> dict[str, jax.Array]:
    params = {
      name: networks.init(module, jax.random.key(0))
      for name, module in modules.frame_encoders.items()
    }
    return encode(modules, nn.meta.unbox(params), video)

  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
    return jax.eval_shape(run, video)


def frames_of(
  modules: Modules, batch: types.Batch, num_frames: int
) -> jax.Array:
  """Frames of a batch that its system must be given, uint8 [B, n, H, W, 3]."""
  if batch.frames is not None:
    return batch.frames
  positions = frame_positions.resolve(modules.needs, num_frames)
  return batch.video[:, np.array(positions)]


def _applied(
  modules: Modules, params: Any, encoded: dict[str, jax.Array]
) -> systems.Apply:
  """Run networks with their weights, or give what they gave before."""

  def apply(*args: Any, method: str, network: str = "autoencoder") -> Any:
    if network in encoded:
      rows = encoded[network].astype(jnp.float32)
      return rows.reshape(-1, *rows.shape[2:])
    variables = {"params": params[network]}
    return modules[network].apply(variables, *args, method=method)

  return apply


def _condition(
  modules: Modules,
  apply: systems.Apply,
  batch: types.Batch,
  num_frames: int,
  draw: systems.Draw,
  noise: Callable[[tuple[int, ...]], jax.Array] | None,
) -> types.Given:
  """Ask the system, of clips that are zeros but for the given frames."""
  frames = encoding.to_float(frames_of(modules, batch, num_frames))
  if noise is not None:
    frames = frames + noise(frames.shape[1:])
  mask = frame_positions.mask(modules.needs, num_frames)
  video = jnp.zeros((len(frames), num_frames, *frames.shape[2:]))
  video = video.at[:, mask.nonzero()[0]].set(frames)
  given = np.broadcast_to(mask, video.shape[:2])
  return modules.system.condition(modules, apply, video, given, draw)


def _keep(x: jax.Array, keep: Any) -> jax.Array:
  """Put zeros, or False, in the place of clips that `keep` [B] drops."""
  kept = schedules.expand(jnp.asarray(keep), x)
  return jax.lax.stop_gradient(jnp.where(kept, x, jnp.zeros_like(x)))


def _noise(
  image: types.Image, shape: tuple[int, ...], keys: jax.Array
) -> jax.Array:
  """Draw the noise of frames [B, n, H, W, 3] by the first two keys of each.

  It is of one deviation a clip.
  """
  noise = sampling.draw_noise(keys[:, 1], shape)
  if image.noise_mean is None:
    return jnp.zeros_like(noise)
  deviation = jnp.exp(
    image.noise_mean + image.noise_std * jax.vmap(jax.random.normal)(keys[:, 0])
  )
  return schedules.expand(deviation, noise) * noise
