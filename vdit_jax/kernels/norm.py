"""Adaptive layer norm on TPU, forwards and backwards in one pass each.

Between two layers a block has x and works on h = norm(x) (1 + scale) + shift,
in float32 (DiT, arXiv:2212.09748). Backwards x gets a gradient from the norm
and one from what is added to it later, and scale and shift are summed over all
tokens. XLA reads x, h and their gradients several times for that; here each is
read once and written once.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vdit_jax.kernels import windows

_NUMBERS = 2**17  # of a step of the grid: more would only be longer to compile


def modulate(
  x: jax.Array,
  shift: jax.Array,
  scale: jax.Array,
  *,
  eps: float,
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
  """Normalise tokens and modulate them.

  Args:
    x: tokens [B, L, D], D a multiple of 128.
    shift: float32 [B, 1, D].
    scale: float32 [B, 1, D].
    eps: added to the variance.
    interpret: run on the CPU.

  Returns:
    x, to be used in its place where something is added to it, so that its
    gradient is added up here; and the result [B, L, D] in x's dtype.
  """
  if x.shape[2] % windows.LANES:
    raise ValueError(f"width must be 128n, got {x.shape[2]}; use nn.norms")
  return _modulate(x, shift, scale, (eps, interpret))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _modulate(x, shift, scale, static):
  return _forward(x, shift, scale, static)[0]


def _forward(x, shift, scale, static):
  eps, interpret = static
  grid, tokens, one, _ = _layout(x)
  h = pl.pallas_call(
    functools.partial(_forward_kernel, eps=eps),
    grid=grid,
    in_specs=[tokens, one, one],
    out_specs=tokens,
    out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    compiler_params=_params(),
    name="norm_modulate",
    interpret=interpret,
  )(x, shift, scale)
  return (x, h), (x, scale)


def _backward(static, saved, gradients):
  (x, scale), (dx, dh) = saved, gradients
  eps, interpret = static
  grid, tokens, one, part = _layout(x)
  B, blocks = grid
  sums = jax.ShapeDtypeStruct((B, blocks, 1, x.shape[2]), jnp.float32)
  dx, dshift, dscale = pl.pallas_call(
    functools.partial(_backward_kernel, eps=eps, tokens=x.shape[1]),
    grid=grid,
    in_specs=[tokens, one, tokens, tokens],
    out_specs=[tokens, part, part],
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), sums, sums],
    compiler_params=_params(),
    name="norm_gradient",
    interpret=interpret,
  )(x, scale, dx, dh)
  return dx, jnp.sum(dshift, axis=1), jnp.sum(dscale, axis=1)


_modulate.defvjp(_forward, _backward)


def _layout(x):
  """Return the grid (batch, tokens), and windows.

  Those are of the tokens, of a vector, and of a step's own sums.
  """
  B, L, D = x.shape
  block = max(_NUMBERS // D // 16, 1) * 16
  return (
    (B, pl.cdiv(L, block)),
    pl.BlockSpec((None, block, D), lambda b, i: (b, i, 0)),
    pl.BlockSpec((None, 1, D), lambda b, i: (b, 0, 0)),
    pl.BlockSpec((None, None, 1, D), lambda b, i: (b, i, 0, 0)),
  )


def _params():
  return pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel"),
    vmem_limit_bytes=64 * 2**20,
  )


def _forward_kernel(x, shift, scale, h, *, eps):
  unit, _ = _unit(x[...], eps)
  h[...] = (unit * (1 + scale[...]) + shift[...]).astype(h.dtype)


def _backward_kernel(x, scale, dx_in, dh, dx, dshift, dscale, *, eps, tokens):
  left = tokens - pl.program_id(1) * x.shape[0]

  def step(careful: bool):
    unit, power = _unit(x[...], eps)
    dy = dh[...].astype(jnp.float32)
    along = dy * unit
    if careful:
      known = windows.inside(dy.shape, 0, left)
      dy, along = jnp.where(known, dy, 0), jnp.where(known, along, 0)
    dshift[...] = jnp.sum(dy, axis=0, keepdims=True)
    dscale[...] = jnp.sum(along, axis=0, keepdims=True)
    dunit = dy * (1 + scale[...])
    mean = functools.partial(jnp.mean, axis=1, keepdims=True)
    dunit = dunit - mean(dunit) - unit * mean(dunit * unit)
    dx[...] = (dx_in[...].astype(jnp.float32) + power * dunit).astype(dx.dtype)

  windows.last_apart(step, 1, tokens % x.shape[0] != 0)


def _unit(x, eps):
  """Return x at zero mean and unit variance, and what it was scaled by."""
  x = x.astype(jnp.float32)
  x = x - jnp.mean(x, axis=1, keepdims=True)
  power = jax.lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + eps)
  return x * power, power
