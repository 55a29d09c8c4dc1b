"""Frames and regions that are given one by one, as a denoiser is shown them.

  video --encode, each frame alone--> stills [B, F, h, w, c]
        --lay_out--> Cond(latents [B, f, h, w, n c], mask [B, f, h, w, n])

A latent frame stands for n frames, the first one for a single frame. Beside
its own latents, each place has n more that may be given: those of its frames,
encoded as images. So any frame can be given, at any time, and a part of it;
nothing is added to the sequence, a batch may mix all kinds, and the same
program runs whatever is given.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from vdit_jax import types


def encode(apply: Callable[..., jax.Array], video: jax.Array) -> jax.Array:
  """Encode each frame alone: [B, F, H, W, 3] -> [B, F, h, w, c]."""
  B, F = video.shape[:2]
  found = apply(video.reshape(B * F, 1, *video.shape[2:]), method="encode")
  return found.reshape(B, F, *found.shape[2:])


def cells(pixels: np.ndarray, size: tuple[int, int]) -> jax.Array:
  """Say which latents of stills are of given pixels alone.

  Args:
    pixels: that are given, bool [..., H, W].
    size: h, w of the latents.

  Returns:
    Bool [..., h, w]: False too beside one that is not, whose pixels reach in.
  """
  (h, w), (H, W) = size, pixels.shape[-2:]
  whole = pixels.reshape(*pixels.shape[:-2], h, H // h, w, W // w).all((-3, -1))
  return erode(whole)


def erode(known: jax.Array | np.ndarray) -> jax.Array:
  """Leave out what is beside a False one, of bool [..., h, w]."""
  known = jnp.asarray(known)
  for axis in (known.ndim - 2, known.ndim - 1):
    pad = [(int(a == axis),) * 2 for a in range(known.ndim)]
    wide, n = jnp.pad(known, pad, constant_values=True), known.shape[axis]
    before, behind = (
      jax.lax.slice_in_dim(wide, start, start + n, axis=axis)
      for start in (0, 2)
    )
    known = known & before & behind
  return known


def lay_out(stills: jax.Array, known: jax.Array, n: int) -> types.Cond:
  """Lay what is given beside the latents of a clip.

  Args:
    stills: latents of each frame alone, [B, F = n (f - 1) + 1, h, w, c].
    known: which of them are given, bool [B, F, h, w].
    n: frames of a latent frame.
  """
  shown = jnp.where(known[..., None], stills, 0)
  return types.Cond(
    latents=_by_latent(shown, n),
    mask=_by_latent(known[..., None].astype(shown.dtype), n),
  )


def whole(cond: types.Cond) -> jax.Array:
  """Say which latents have all their frames given, bool [B, f, h, w]."""
  known = cond.mask > 0
  first = known[:, :1, ..., -1:].all(-1)  # its only frame
  return jnp.concatenate([first, known[:, 1:].all(-1)], axis=1)


def _by_latent(x, n):
  """[B, F, h, w, c] -> [B, f, h, w, n c], the first frame as the last of n."""
  B, F, h, w, c = x.shape
  x = jnp.pad(x, [(0, 0), (n - 1, 0), (0, 0), (0, 0), (0, 0)])
  x = x.reshape(B, -1, n, h, w, c)
  return jnp.moveaxis(x, 2, 4).reshape(B, -1, h, w, n * c)
