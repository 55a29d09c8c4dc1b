"""Cut a projection into heads on TPU: norm and rotary positions in one pass.

A projection leaves [B, L, N P K]: of each head P parts side by side, such as
query, key and value. Each part becomes an array [B, L, N K], where the kernels
of attention read it, and the first ones get a root-mean-square norm
(arXiv:1910.07467) and rotary positions (arXiv:2104.09864) on the way, as
`nn.norms.rms_norm` and `nn.positions.rotate` compute them, but in float32 from
the one to the other. XLA makes several passes over memory of it, and the
rotation's halves of a head shuffle lanes in each; here every number is read
once and written once, and a head is rolled by half.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vdit_jax.kernels import windows

_TOKENS = 512  # of a step of the grid


def cut(
  x: jax.Array,
  scales: tuple[jax.Array, ...],
  tables: tuple[jax.Array, ...],
  *,
  heads: int,
  parts: int,
  eps: float,
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, ...]:
  """Cut into parts, of which the first are normalised and rotated.

  Args:
    x: a projection [B, L, N P K], K a multiple of 128.
    scales: of the norms, float32 [K] each; of as many parts as they are.
    tables: what `tables` makes of angles, or () for no rotation.
    heads: N.
    parts: P.
    eps: added to the mean squares.
    interpret: run on the CPU.

  Returns:
    `parts` arrays [B, L, N K] in x's dtype. Differentiable in x and scales.
  """
  K = x.shape[2] // heads // parts
  if K % windows.LANES:
    raise ValueError(f"head dim must be 128n, got {K}; use nn.heads")
  return _cut(x, scales, tables, (heads, parts, eps, interpret))


def tables(angles: jax.Array) -> tuple[jax.Array, jax.Array]:
  """Turn angles [L, K / 2] into the factors of a head and of its rolled self.

  Returns:
    cos and signed sin, float32 [L, K]: x cos + roll(x, K / 2) sin is the
    rotation.
  """
  cos, sin = jnp.cos(angles), jnp.sin(angles)
  join = functools.partial(jnp.concatenate, axis=-1)
  return join([cos, cos]), join([-sin, sin])


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _cut(x, scales, tables, static):
  heads, parts, eps, interpret = static
  K, grid, wide, row, line, one = _layout(x, heads, parts)
  kernel = functools.partial(
    _forward_kernel, eps=eps, normed=len(scales), rotated=len(tables)
  )
  return tuple(
    pl.pallas_call(
      kernel,
      grid=grid,
      in_specs=[wide, *[one] * len(scales), *[line] * len(tables)],
      out_specs=[row] * parts,
      out_shape=[
        jax.ShapeDtypeStruct((*x.shape[:2], heads * K), x.dtype)
        for _ in range(parts)
      ],
      compiler_params=_params(),
      name="heads_cut",
      interpret=interpret,
    )(x, *(scale[None] for scale in scales), *tables)
  )


def _forward(x, scales, tables, static):
  return _cut(x, scales, tables, static), (x, scales, tables)


def _backward(static, saved, dys):
  x, scales, tables = saved
  heads, parts, eps, interpret = static
  K, grid, wide, row, line, one = _layout(x, heads, parts)
  kernel = functools.partial(
    _backward_kernel,
    eps=eps,
    tokens=x.shape[1],
    normed=len(scales),
    rotated=len(tables),
    parts=parts,
  )
  sums = pl.BlockSpec((None, None, 1, K), lambda b, i, h: (b, i, 0, 0))
  like = jax.ShapeDtypeStruct((*grid[:2], 1, K), jnp.float32)
  dx, *sums = pl.pallas_call(
    kernel,
    grid=grid,
    in_specs=[
      wide,
      *[row] * parts,
      *[one] * len(scales),
      *[line] * len(tables),
    ],  # fmt: skip
    out_specs=[wide, *[sums] * len(scales)],
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype), *[like] * len(scales)],
    compiler_params=_params(),
    name="heads_join",
    interpret=interpret,
  )(x, *dys, *(scale[None] for scale in scales), *tables)
  dscales = tuple(jnp.sum(total, axis=(0, 1, 2)) for total in sums)
  return dx, dscales, tuple(None for _ in tables)


_cut.defvjp(_forward, _backward)


def _layout(x, heads, parts):
  """Return K, the grid (batch, tokens, head), and windows.

  Those are of the projection, one part, the tables and a scale.
  """
  B, L, width = x.shape
  K = width // heads // parts
  grid = B, pl.cdiv(L, _TOKENS), heads
  wide = pl.BlockSpec((None, _TOKENS, parts * K), lambda b, i, h: (b, i, h))
  row = pl.BlockSpec((None, _TOKENS, K), lambda b, i, h: (b, i, h))
  line = pl.BlockSpec((_TOKENS, K), lambda b, i, h: (i, 0))
  one = pl.BlockSpec((1, K), lambda b, i, h: (0, 0))
  return K, grid, wide, row, line, one


def _params():
  return pltpu.CompilerParams(
    dimension_semantics=("parallel", "parallel", "arbitrary")
  )


def _forward_kernel(x, *refs, eps, normed, rotated):
  scales, turn, outs = _shared(refs, normed, rotated)
  K = outs[0].shape[1]
  for n, out in enumerate(outs):
    part = x[:, n * K : (n + 1) * K]
    if n < normed:
      unit, _ = _unit(part, eps)
      part = _turned(unit * scales[n][...], turn).astype(out.dtype)
    out[...] = part


def _backward_kernel(x, *refs, eps, tokens, normed, rotated, parts):
  dys, rest = refs[:parts], refs[parts:]
  scales, turn, (dx, *sums) = _shared(rest, normed, rotated)
  K = dys[0].shape[1]
  left = tokens - pl.program_id(1) * _TOKENS

  @pl.when(pl.program_id(2) == 0)
  def _start():
    for total in sums:
      total[...] = jnp.zeros_like(total)

  def step(careful: bool):
    for n, dy in enumerate(dys):
      part = slice(n * K, (n + 1) * K)
      if n >= normed:
        dx[:, part] = dy[...]
        continue
      unit, power = _unit(x[:, part], eps)
      turned_back = _turned_back(dy[...].astype(jnp.float32), turn)
      dscale = turned_back * unit
      if careful:
        known = windows.inside(dscale.shape, 0, left)
        dscale = jnp.where(known, dscale, 0)
      sums[n][...] += jnp.sum(dscale, axis=0, keepdims=True)
      dunit = turned_back * scales[n][...]
      along = jnp.mean(dunit * unit, axis=1, keepdims=True)
      dx[:, part] = (power * (dunit - unit * along)).astype(dx.dtype)

  windows.last_apart(step, 1, tokens % _TOKENS != 0)


def _shared(refs, normed, rotated):
  """Tell apart scales, tables and what comes behind them."""
  end = normed + rotated
  return refs[:normed], [t[...] for t in refs[normed:end]], refs[end:]


def _unit(x, eps):
  """Return x at unit mean square, and what it was multiplied by."""
  x = x.astype(jnp.float32)
  power = jax.lax.rsqrt(jnp.mean(x * x, axis=1, keepdims=True) + eps)
  return x * power, power


def _turned(x, turn):
  if not turn:
    return x
  cos, sin = turn
  return x * cos + _rolled(x) * sin


def _turned_back(dy, turn):
  if not turn:
    return dy
  cos, sin = turn
  return dy * cos + _rolled(dy * sin)


def _rolled(x):
  return pltpu.roll(x, x.shape[1] // 2, 1)
