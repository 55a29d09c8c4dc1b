"""Causal 3D convolution with an explicit state for streaming in time."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdit_jax import sharding

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
    convolve = _folded if sharding.platform() == "cpu" else _plain
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


def _folded(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The same with the kernel's frames folded into the channels.

  XLA's CPU compiler runs 2D convolutions 1.5 to 2.5 times as fast a FLOP as
  3D ones (`benchmarks/steps.py` prints the ratio).
  """
  kt, kh, kw, c_in, c_out = kernel.shape
  B, padded, H, W, _ = x.shape
  F = padded - kt + 1
  taps = [x[:, i : i + F] for i in range(kt)]
  x = jnp.concatenate(taps, axis=-1).reshape(B * F, H, W, kt * c_in)
  kernel = jnp.moveaxis(kernel, 0, 2).reshape(kh, kw, kt * c_in, c_out)
  y = jax.lax.conv_general_dilated(
    x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
  )
  return y.reshape(B, F, H, W, c_out)
