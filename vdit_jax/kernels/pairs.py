"""Rotary positions of neighbours on TPU: dimension 2i turns with 2i + 1.

As `nn.positions.rotate_pairs` computes them (arXiv:2104.09864), over heads that
lie side by side, [B, L, N K]. Written out, the pairs become an axis of two, of
which a TPU's registers hold 128 at a time: the rotation of one projection then
takes longer than the projection. Here a row is rolled by one to either side,
and each lane takes the side that its pair is on.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vdit_jax.kernels import windows

_TOKENS = 512  # of a step of the grid


def lanes(head_dim: int) -> int:
  """Lanes of whole heads, of which a step of the grid has as many."""
  return math.lcm(head_dim, windows.LANES)


def tables(angles: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Turn angles [L, K / 2] into the factors of a row and of its swapped self.

  Returns:
    cos and signed sin, float32 [L, lanes(K)]: x cos + swapped(x) sin is the
    rotation.
  """
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  pairs = lambda a, b: jnp.stack([a, b], axis=-1).reshape(len(angles), -1)
  K = 2 * angles.shape[1]
  heads = lambda x: jnp.tile(x, (1, lanes(K) // K))
  return heads(pairs(cos, cos)), heads(pairs(-sin, sin))


def rotate(
  x: jax.Array,
  cos: jax.Array,
  sin: jax.Array,
  *,
  interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
  """Rotate pairs of heads side by side.

  Args:
    x: [B, L, N K], a multiple of the tables' lanes wide.
    cos, sin: as `tables` gives them.
    interpret: run on the CPU.

  Returns:
    Like x. Differentiable in it.
  """
  if x.shape[2] % cos.shape[1]:
    raise ValueError(
      f"width must be a multiple of {cos.shape[1]}, got {x.shape[2]}; use "
      "nn.heads"
    )
  return _rotate(x, cos, sin, interpret)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _rotate(x, cos, sin, interpret):
  B, L, width = x.shape
  W = cos.shape[1]
  row = pl.BlockSpec((None, _TOKENS, W), lambda b, i, h: (b, i, h))
  line = pl.BlockSpec((_TOKENS, W), lambda b, i, h: (i, 0))
  return pl.pallas_call(
    _kernel,
    grid=(B, pl.cdiv(L, _TOKENS), width // W),
    in_specs=[row, line, line],
    out_specs=row,
    out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary")
    ),
    name="rotate_pairs",
    interpret=interpret,
  )(x, cos, sin)


def _forward(x, cos, sin, interpret):
  return _rotate(x, cos, sin, interpret), (cos, sin)


def _backward(interpret, saved, dy):
  cos, sin = saved
  return _rotate(dy, cos, -sin, interpret), None, None


_rotate.defvjp(_forward, _backward)


def _kernel(x, cos, sin, out):
  row = x[...].astype(jnp.float32)
  turned = row * cos[...] + _swapped(row) * sin[...]
  out[...] = turned.astype(out.dtype)


def _swapped(x):
  """Put each lane's neighbour in its pair in its place."""
  W = x.shape[1]
  even = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1) % 2 == 0
  return jnp.where(even, pltpu.roll(x, W - 1, 1), pltpu.roll(x, 1, 1))
