"""Convolutions of video: causal 3D ones with an explicit state, and 2D ones."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdit_jax import sharding
from vdit_jax.nn import linear

STREAM = "stream"  # collection that holds what a stream remembers


class CausalConv3d(nn.Module):
  """Convolve [B, F, H, W, C] so that a frame sees none that come later.

  Time is padded in front only: with zeros for the first frames of a video,
  and otherwise with the last frames of the chunk before, which the collection
  "stream" carries. Height and width keep their size.

  Attributes:
    features: output channels.
    kernel: size in frames, height, width; the last two odd.
    axis: logical axis of the output channels.
    kernel_init: of the kernel.
    dtype: compute type.
  """

  features: int
  kernel: tuple[int, int, int]
  axis: str | None = "conv_out"
  kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()
  dtype: jnp.dtype = jnp.float32

  @nn.compact
  def __call__(self, x: jax.Array, first: bool = True) -> jax.Array:
    shape = (*self.kernel, x.shape[-1], self.features)
    axes = (None, None, None, None, self.axis)
    kernel = self.param("kernel", sharding.boxed(self.kernel_init, axes), shape)
    zeros = sharding.boxed(nn.initializers.zeros_init(), (self.axis,))
    bias = self.param("bias", zeros, (self.features,))
    x = self._extend(x.astype(self.dtype), first)
    convolve = _on_cpu if sharding.platform() == "cpu" else _plain
    y = convolve(x, kernel.astype(self.dtype)) + bias.astype(self.dtype)
    return sharding.constrain(y, "batch", None, "rows", None, None)

  def _extend(self, x: jax.Array, first: bool) -> jax.Array:
    """Put the frames before this chunk in front of it; remember its last."""
    past = self.kernel[0] - 1
    if not past:
      return x
    if first:
      x = jnp.pad(x, ((0, 0), (past, 0), (0, 0), (0, 0), (0, 0)))
    else:
      x = jnp.concatenate([self.get_variable(STREAM, "past"), x], axis=1)
    if self.is_mutable_collection(STREAM) and not self.is_initializing():
      self.put_variable(STREAM, "past", x[:, -past:])
    return x


def conv2d(
  features: int, *, name: str, dtype: str, halve: bool = False
) -> nn.Conv:
  """Build a 3 x 3 convolution of each frame of [B, F, H, W, C].

  Args:
    features: output channels.
    name: of the module.
    dtype: compute type.
    halve: whether every second place alone is left, the frame being padded
      below and to the right; it keeps its size otherwise.
  """
  axes = (None, None, None, "conv_out")
  return nn.Conv(
    features,
    (3, 3),
    strides=2 if halve else 1,
    padding=((0, 1), (0, 1)) if halve else ((1, 1), (1, 1)),
    dtype=jnp.dtype(dtype),
    kernel_init=sharding.boxed(linear.LECUN, axes),
    bias_init=sharding.boxed(linear.ZEROS, axes[-1:]),
    name=name,
  )


def _plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """One 3D convolution; x is padded in time already."""
  _, kh, kw, _, _ = kernel.shape
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(1, 1, 1),
    padding=((0, 0), (kh // 2, kh // 2), (kw // 2, kw // 2)),
    dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
  )


def _on_cpu(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The same by 2D convolutions.

  XLA's CPU compiler runs these 1.5 to 2.5 times as fast a FLOP as 3D ones
  (`benchmarks/steps.py` prints the ratio).
  """
  frames = x.shape[1] - kernel.shape[0] + 1
  exact = x.dtype == jnp.float32  # the sums of pairs need its digits
  # Of several devices on few cores, as in tests, four convolutions that can run
  # at once leave no thread to what one device must tell the others.
  alone = jax.sharding.get_abstract_mesh().size <= 1
  if exact and alone and kernel.shape[0] == 3 and frames > 1:
    return _paired(x, kernel)
  return _folded(x, kernel)


def _folded(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The same with the kernel's frames folded into the channels."""
  kt, kh, kw, c_in, c_out = kernel.shape
  F = x.shape[1] - kt + 1
  x = jnp.concatenate([x[:, i : i + F] for i in range(kt)], axis=-1)
  kernel = jnp.moveaxis(kernel, 0, 2).reshape(kh, kw, kt * c_in, c_out)
  return _each_frame(x, kernel)


def _paired(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The same with a kernel of three frames, for two frames at a time.

  Winograd's F(2, 3) along time (arXiv:1509.09308, section 4.1): four 2D
  convolutions for two frames and not six, of sums of frames and of the
  kernel's. No frame sees another than before.
  """
  frames = x.shape[1] - 2
  x = jnp.pad(x, ((0, 0), (0, frames % 2), (0, 0), (0, 0), (0, 0)))
  a, b, c, d = (x[:, i : x.shape[1] - 3 + i : 2] for i in range(4))
  first, middle, last = kernel
  sums = a - c, b + c, c - b, b - d
  kernels = (
    first,
    (first + middle + last) / 2,
    (first - middle + last) / 2,
    last,
  )
  p, q, r, s = map(_each_frame, sums, kernels)
  y = jnp.stack([p + q + r, q - r - s], axis=2)  # [B, F / 2, 2, H, W, D]
  return y.reshape(x.shape[0], -1, *y.shape[3:])[:, :frames]


def _each_frame(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """Convolve each frame [B, F, H, W, C] with a kernel [kh, kw, C, D]."""
  y = jax.lax.conv_general_dilated(
    x.reshape(-1, *x.shape[2:]),
    kernel,
    (1, 1),
    "SAME",
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
  )
  return y.reshape(*x.shape[:-1], kernel.shape[-1])
