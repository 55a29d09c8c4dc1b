"""Backward pass of attention on TPU: gradients of queries, keys and values.

FlashAttention-2 (arXiv:2307.08691, algorithm 2) without a causal mask. With
`p = exp(q k^T - logsumexp)` made again tile by tile, `dv = p^T do`,
`ds = p * (do v^T - delta)`, `dq = ds k` and `dk = ds^T q`. `dq` and `dkv` are
two passes of seven matmuls a tile in all; `dqkv` is one pass of five.

A grid is (batch x heads, blocks that are written, blocks that are summed), of
which the first two are "parallel" and the sums lie in the memory of the core
that walks the last, so that a chip of two cores shares the work. In `dqkv` the
queries' sum runs over the second axis too: a core takes whole heads. The
splash attention of `jax.experimental.pallas` marks every axis of its backward
kernels "arbitrary", and so they run on one core.

Arrays are laid out as `windows` says. What the compiler says (libtpu
0.0.42.1; nothing here ran on a TPU), at 17,550 tokens, 8 heads of 128,
bfloat16. Bundles of the body per 512 x 512 tile and head; about 150 more for
each step of the grid.

  kernel  blocks          v5e   library, blocks of 512
  dqkv    640, 640, 640   2269  2001 (dkv) + 1498 (dq)
  dqkv    768, 768, 768   2372

A v5e or v5p core's four 128 x 128 multipliers need 1536, 2048 and 2560 cycles
for the matmuls of a tile of `dq`, `dkv` and `dqkv` at the published peak,
whatever the bundles: an estimate charges the greater. On v5p each core walks
half of a grid's steps; the library's dq and dkv lie in a region of the primary
core, which walks all of theirs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vdit_jax.kernels import windows

# Windows, sums over keys and the tiles between the matmuls of `dqkv`.
_WORKING_BYTES = 16 * 2**20
_DELTA = 2048  # tokens of a step of `delta`


def dq(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  do: jax.Array,
  logsumexp: jax.Array,
  delta: jax.Array,
  mask: jax.Array | None,
  *,
  heads: int,
  blocks: windows.Blocks,
  scale: float | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
  """Return the gradient of the queries.

  Args:
    q: queries [B, L, N K]; logits are scale q k^T.
    k: keys [B, S, N K].
    v: values [B, S, N K].
    do: gradient of the output [B, L, N K].
    logsumexp: of each row of masked logits, to the base of 2, float32
      [B N, 1, L].
    delta: sum over K of do * output, float32 [B N, 1, L].
    mask: 1 where a key may be seen, else 0, int32 [B / b, 1, S], each row for
      b rows of the others; None: every key.
    heads: N; 1 where K is not 128.
    blocks: sizes, multiples of 128.
    scale: of the logits; K ** -0.5 when not given.
    interpret: run on the CPU, as Pallas' TPU interpreter does.

  Returns:
    [B, L, N K] in q's dtype; 0 for a query that sees no key.
  """
  sizes = windows.sizes(q, k, mask, heads, scale, blocks)
  operands, (row, key, stat, seen), rows = _arguments(
    q, k, v, do, logsumexp, delta, mask, heads, blocks, keys_first=False
  )
  K = q.shape[2] // heads
  return pl.pallas_call(
    functools.partial(_dq_kernel, sizes=sizes),
    grid=(rows, *sizes.grid),
    in_specs=[row, key, key, row, stat, stat, seen],
    out_specs=row,
    out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    scratch_shapes=[
      pltpu.VMEM((blocks.queries, K), q.dtype),
      pltpu.VMEM((blocks.queries, K), jnp.float32),
      pltpu.VMEM((blocks.queries, windows.LANES), jnp.float32),
      pltpu.VMEM((blocks.queries, windows.LANES), jnp.float32),
    ],
    compiler_params=windows.params("parallel"),
    name="attention_dq",
    metadata=windows.noted(blocks, heads),
    interpret=interpret,
  )(*operands)


def dkv(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  do: jax.Array,
  logsumexp: jax.Array,
  delta: jax.Array,
  mask: jax.Array | None,
  *,
  heads: int,
  blocks: windows.Blocks,
  scale: float | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
  """Return the gradients of keys and values; `dq` describes the arguments.

  Returns:
    dk and dv [B, S, N K] in the dtypes of k and v; 0 where not seen.
  """
  sizes = windows.sizes(q, k, mask, heads, scale, blocks)
  operands, (row, key, stat, seen), rows = _arguments(
    q, k, v, do, logsumexp, delta, mask, heads, blocks, keys_first=True
  )
  block = blocks.keys, q.shape[2] // heads
  return pl.pallas_call(
    functools.partial(_dkv_kernel, sizes=sizes),
    grid=(rows, *sizes.grid[::-1]),
    in_specs=[row, key, key, row, stat, stat, seen],
    out_specs=[key, key],
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (k, v)],
    scratch_shapes=[
      pltpu.VMEM(block, jnp.float32),
      pltpu.VMEM(block, jnp.float32),
      pltpu.VMEM(block, k.dtype),
      pltpu.VMEM(block, v.dtype),
    ],
    compiler_params=windows.params("parallel"),
    name="attention_dkv",
    metadata=windows.noted(blocks, heads),
    interpret=interpret,
  )(*operands)


def dqkv(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  do: jax.Array,
  logsumexp: jax.Array,
  delta: jax.Array,
  mask: jax.Array | None,
  *,
  heads: int,
  blocks: windows.Blocks,
  scale: float | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return all three gradients; `dq` describes the arguments.

  Five matmuls a tile where `dq` and `dkv` take seven. The gradient of a
  head's queries stays in the core's memory while the keys pass by, so that
  `fused_bytes` must fit there, and heads alone are spread over cores.

  Returns:
    dq, dk and dv in the shapes and dtypes of q, k and v.
  """
  sizes = windows.sizes(q, k, mask, heads, scale, blocks)
  operands, (row, key, stat, seen), rows = _arguments(
    q, k, v, do, logsumexp, delta, mask, heads, blocks, keys_first=True
  )
  K = q.shape[2] // heads
  block, tokens = (blocks.keys, K), sizes.grid[0] * blocks.queries
  return pl.pallas_call(
    functools.partial(_dqkv_kernel, sizes=sizes),
    grid=(rows, *sizes.grid[::-1]),
    in_specs=[row, key, key, row, stat, stat, seen],
    out_specs=[_last_pass(row, sizes.grid[1]), key, key],
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)],
    scratch_shapes=[
      pltpu.VMEM((tokens, K), jnp.float32),
      pltpu.VMEM(block, jnp.float32),
      pltpu.VMEM(block, jnp.float32),
      pltpu.VMEM(block, k.dtype),
      pltpu.VMEM(block, v.dtype),
    ],
    compiler_params=windows.params("arbitrary", fused_bytes(tokens)),
    name="attention_dqkv",
    metadata=windows.noted(blocks, heads),
    interpret=interpret,
  )(*operands)


def delta(
  out: jax.Array,
  do: jax.Array,
  *,
  heads: int,
  interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
  """Sum out * do over each head, [B, L, N K] twice -> float32 [B N, 1, L]."""
  B, L, width = out.shape
  K = width // heads
  whole = pl.BlockSpec(
    (None, _DELTA, K),
    lambda h, i: (jax.lax.div(h, heads), i, jax.lax.rem(h, heads)),
  )
  return pl.pallas_call(
    _delta_kernel,
    grid=(B * heads, pl.cdiv(L, _DELTA)),
    in_specs=[whole, whole],
    out_specs=pl.BlockSpec((None, 1, _DELTA), lambda h, i: (h, 0, i)),
    out_shape=jax.ShapeDtypeStruct((B * heads, 1, L), jnp.float32),
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel")
    ),
    name="attention_delta",
    interpret=interpret,
  )(out, do)


def fused_bytes(tokens: int) -> int:
  """Return what `dqkv` asks of a core's memory for so many queries."""
  return _WORKING_BYTES + 4 * tokens * windows.LANES


def _arguments(q, k, v, do, logsumexp, delta, mask, heads, blocks, keys_first):
  """Return the operands of a kernel, their windows, and batch x heads."""
  rows, S, K = q.shape[0] * heads, k.shape[1], q.shape[2] // heads
  if mask is None:
    mask = jnp.ones((1, 1, S), jnp.int32)
  shared = rows // mask.shape[0]
  specs = windows.specs(heads, K, shared, blocks, keys_first)
  return (q, k, v, do, logsumexp, delta, mask), specs, rows


def _last_pass(row, passes):
  """Hold block 0, which is thus not written out, until the last pass."""

  def index(h, j, i):
    row_index, block, lane = row.index_map(h, j, i)
    return row_index, jnp.where(j == passes - 1, block, 0), lane

  return pl.BlockSpec(row.block_shape, index)


def _dq_kernel(
  q, k, v, do, logsumexp, delta, mask, out, scaled, total, lse, dlt, *, sizes
):
  j = pl.program_id(2)

  @pl.when(j == 0)
  def _start():
    scaled[...] = windows.scaled(q[...], sizes.binary_scale)
    total[...] = jnp.zeros_like(total)
    lse[...] = windows.column(logsumexp[...])
    dlt[...] = windows.column(delta[...])

  def step(careful: bool):
    for part in sizes.parts:
      keys, values = k[part, :], v[part, :]
      if careful:
        left = sizes.keys - j * sizes.blocks.keys - part.start
        known = windows.inside(keys.shape, 0, left)
        keys, values = _zero_unless(known, keys, values)
      logits = windows.times_transposed(scaled[...], keys)
      width = logits.shape[1]
      p = _probability(logits, windows.spread(lse[...], width))
      dp = windows.times_transposed(do[...], values)
      ds = p * (dp - windows.spread(dlt[...], width))
      if careful:
        seen = windows.inside(ds.shape, 1, left) & (mask[:, part] > 0)
        ds = jnp.where(seen, ds, 0)
      total[...] += windows.times(ds.astype(keys.dtype), keys)

  garbage = sizes.keys % sizes.blocks.keys != 0
  windows.last_apart(step, 2, garbage, always=sizes.masked)

  @pl.when(j == pl.num_programs(2) - 1)
  def _end():
    out[...] = (total[...] * sizes.scale).astype(out.dtype)


def _dkv_kernel(
  q, k, v, do, logsumexp, delta, mask,
  dk, dv, dk_sum, dv_sum, seen_k, seen_v, *, sizes,
):  # fmt: skip
  keys_left, left = _keys_left(sizes), _queries_left(sizes)

  @pl.when(pl.program_id(2) == 0)
  def _start():
    _start_keys(k, v, mask, dk_sum, dv_sum, seen_k, seen_v, sizes, keys_left)

  def step(careful: bool):
    rows = _rows(q, do, logsumexp, delta, left if careful else None)
    for part in sizes.parts:
      _add_keys(*rows, seen_k, seen_v, dk_sum, dv_sum, part)

  windows.last_apart(step, 2, _garbage_rows(sizes))
  _write_keys(mask, dk, dv, dk_sum, dv_sum, sizes, keys_left)


def _dqkv_kernel(
  q, k, v, do, logsumexp, delta, mask,
  dq, dk, dv, dq_sum, dk_sum, dv_sum, seen_k, seen_v, *, sizes,
):  # fmt: skip
  j, i = pl.program_id(1), pl.program_id(2)
  keys_left, left = _keys_left(sizes), _queries_left(sizes)
  block = sizes.blocks.queries
  here = pl.ds(pl.multiple_of(i * block, windows.LANES), block)

  @pl.when(i == 0)
  def _start():
    _start_keys(k, v, mask, dk_sum, dv_sum, seen_k, seen_v, sizes, keys_left)

  @pl.when(j == 0)
  def _start_queries():
    dq_sum[here, :] = jnp.zeros(q.shape, jnp.float32)

  def step(careful: bool):
    rows = _rows(q, do, logsumexp, delta, left if careful else None)
    for part in sizes.parts:
      ds = _add_keys(*rows, seen_k, seen_v, dk_sum, dv_sum, part)
      dq_sum[here, :] += windows.transposed_times(ds, seen_k[part, :])

  windows.last_apart(step, 2, _garbage_rows(sizes))

  @pl.when(j == pl.num_programs(1) - 1)
  def _end():
    dq[...] = (dq_sum[here, :] / windows.LOG2_E).astype(dq.dtype)

  _write_keys(mask, dk, dv, dk_sum, dv_sum, sizes, keys_left)


def _zero_unless(known, *arrays):
  return [jnp.where(known, x, jnp.zeros_like(x)) for x in arrays]


def _garbage_rows(sizes) -> bool:
  return sizes.queries % sizes.blocks.queries != 0


def _keys_left(sizes) -> jax.Array:
  """Keys from the second axis' block on; read before any condition."""
  return sizes.keys - pl.program_id(1) * sizes.blocks.keys


def _queries_left(sizes) -> jax.Array:
  """Queries from the third axis' block on; read before any condition."""
  return sizes.queries - pl.program_id(2) * sizes.blocks.queries


def _start_keys(k, v, mask, dk_sum, dv_sum, seen_k, seen_v, sizes, left):
  """Clear the sums; keep scaled keys, and values, 0 where none is seen."""
  dk_sum[...] = jnp.zeros_like(dk_sum)
  dv_sum[...] = jnp.zeros_like(dv_sum)
  seen = _seen(mask, k.shape, left)
  keys, values = _zero_unless(seen, k[...], v[...])
  seen_k[...] = windows.scaled(keys, sizes.binary_scale)
  seen_v[...] = values


def _rows(q, do, logsumexp, delta, left) -> tuple[Any, Any, Any, Any]:
  """Read the queries of a step, 0 for those that are not `left`."""
  rows = q[...], do[...], logsumexp[...], delta[...]
  if left is None:
    return rows
  q, do = _zero_unless(windows.inside(q.shape, 0, left), *rows[:2])
  known = windows.inside(logsumexp.shape, 1, left)
  logsumexp, delta = _zero_unless(known, *rows[2:])
  return q, do, logsumexp, delta


def _add_keys(q, do, logsumexp, delta, keys, values, dk_sum, dv_sum, part):
  """Add one tile to the sums; return its `ds` [keys, queries].

  Keys lie along sublanes here, so that statistics are rows and nothing is
  transposed. A key that may not be seen spoils its own row only, and that is
  cleared when it is written.
  """
  p = _probability(windows.times_transposed(keys[part, :], q), logsumexp)
  dv_sum[part, :] += windows.times(p.astype(do.dtype), do)
  dp = windows.times_transposed(values[part, :], do)
  ds = (p * (dp - delta)).astype(q.dtype)
  dk_sum[part, :] += windows.times(ds, q)
  return ds


def _write_keys(mask, dk, dv, dk_sum, dv_sum, sizes, left):
  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _end():
    seen = _seen(mask, dk.shape, left)
    dk[...] = jnp.where(seen, dk_sum[...] * sizes.scale, 0).astype(dk.dtype)
    dv[...] = jnp.where(seen, dv_sum[...], 0).astype(dv.dtype)


def _probability(logits, logsumexp):
  # At most 1: a query that is padding, or a key that is not seen, has any
  # logsumexp, and infinity times a gradient of 0 would be NaN.
  return jnp.exp2(jnp.minimum(logits - logsumexp, 0))


def _seen(mask, shape, left):
  """Return which keys of a block may be seen [keys, K]."""
  seen = windows.column(mask[...].astype(jnp.float32))[:, : shape[1]] > 0
  return seen & windows.inside(shape, 0, left)


def _delta_kernel(out, do, sums):
  products = out[...].astype(jnp.float32) * do[...].astype(jnp.float32)
  total = jnp.sum(products, axis=1, keepdims=True)
  total = jnp.broadcast_to(total, (total.shape[0], windows.LANES))
  sums[...] = windows.row(total)
