"""What our denoiser is shown of given frames and regions; see `nn.stills`."""

import jax
import jax.numpy as jnp
import numpy as np

from vdit_jax import types
from vdit_jax.models.system import Apply, Draw, Modules
from vdit_jax.nn import stills


def condition(
  modules: Modules,
  apply: Apply,
  frames: jax.Array,
  mask: np.ndarray,
  draw: Draw,
) -> types.Given:
  """Make what shows a denoiser the frames, or parts of them, that are given.

  Args:
    modules: the networks.
    apply: runs the autoencoder.
    frames: video whose given pixels matter, [B, F, H, W, 3] in [-1, 1].
    mask: which frames are given, bool [B, F], or which pixels [B, F, H, W].
    draw: not asked: the posterior's mean is shown.
  """
  del draw
  mask = np.asarray(mask, bool)
  B, F, H, W = frames.shape[:4]
  pixels = mask.reshape(*mask.shape, *[1] * (4 - mask.ndim))
  places = np.flatnonzero(pixels.any((0, 2, 3)))
  if not len(places):
    return types.Given()
  shown = jnp.where(pixels[:, places, ..., None], frames[:, places], -1.0)
  alone = stills.encode(apply, shown)
  h, w, c = alone.shape[2:]
  every = jnp.zeros((B, F, h, w, c)).at[:, places].set(alone)
  known = stills.cells(np.broadcast_to(pixels, (B, F, H, W)), (h, w))
  n = modules.denoiser.cfg.given
  return types.Given(cond=stills.lay_out(every, known, n))
