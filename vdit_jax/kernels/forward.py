"""Forward pass of attention on TPU, on the arrays that projections leave.

FlashAttention-2 (arXiv:2307.08691, algorithm 1) without a causal mask, as the
splash attention of `jax.experimental.pallas` does it, but for where it reads
and writes: queries, keys and values [B, L, N K], see `windows`. Theirs are
heads first and padded to blocks, which costs a network copies of all four
arrays, forwards, backwards and once more where it computes again.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from vdit_jax.kernels import windows


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array | None,
  *,
  heads: int,
  blocks: windows.Blocks,
  scale: float | None = None,
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
  """Return softmax(scale q k^T) v, and what the backward pass needs with it.

  Args:
    q: queries [B, L, N K].
    k: keys [B, S, N K].
    v: values [B, S, N K].
    mask: 1 where a key may be seen, else 0, int32 [B / b, 1, S], each row for
      b rows of the others; None: every key.
    heads: N; 1 where K is not 128.
    blocks: sizes, multiples of 128.
    scale: of the logits; K ** -0.5 when not given.
    interpret: run on the CPU.

  Returns:
    [B, L, N K] in v's dtype, and the log-sum-exp of each query's logits, to
    the base of 2, float32 [B N, 1, L]. A query that sees no key gets something
    finite.
  """
  sizes = windows.sizes(q, k, mask, heads, scale, blocks)
  rows, K = q.shape[0] * heads, q.shape[2] // heads
  shared = rows // (1 if mask is None else mask.shape[0])
  row, key, stat, seen = windows.specs(heads, K, shared, blocks)
  return pl.pallas_call(
    functools.partial(_kernel, sizes=sizes),
    grid=(rows, *sizes.grid),
    in_specs=[row, key, key, *([seen] if sizes.masked else [])],
    out_specs=[row, stat],
    out_shape=[
      jax.ShapeDtypeStruct(q.shape, v.dtype),
      jax.ShapeDtypeStruct((rows, 1, sizes.queries), jnp.float32),
    ],
    scratch_shapes=[
      pltpu.VMEM((blocks.queries, K), q.dtype),
      pltpu.VMEM((blocks.queries, windows.LANES), jnp.float32),
      pltpu.VMEM((blocks.queries, windows.LANES), jnp.float32),
      pltpu.VMEM((blocks.queries, K), jnp.float32),
    ],
    compiler_params=windows.params("parallel"),
    name="attention_forward",
    metadata=windows.noted(blocks, heads),
    interpret=interpret,
  )(q, k, v, *([mask] if sizes.masked else []))


def _kernel(q, k, v, *rest, sizes):
  *masks, out, logsumexp, scaled, most, total, summed = rest
  j = pl.program_id(2)

  @pl.when(j == 0)
  def _start():
    scaled[...] = windows.scaled(q[...], sizes.binary_scale)
    most[...] = jnp.full_like(most, windows.LOWEST)
    total[...] = jnp.zeros_like(total)
    summed[...] = jnp.zeros_like(summed)

  def step(careful: bool):
    for part in sizes.parts:
      logits = windows.times_transposed(scaled[...], k[part, :])
      values = v[part, :]
      if careful:
        left = sizes.keys - j * sizes.blocks.keys - part.start
        seen = windows.inside(logits.shape, 1, left)
        for mask in masks:
          seen = seen & (mask[:, part] > 0)
        logits = jnp.where(seen, logits, windows.LOWEST)
        known = windows.inside(values.shape, 0, left)
        values = jnp.where(known, values, jnp.zeros_like(values))
      _add(logits, values, most, total, summed)

  garbage = sizes.keys % sizes.blocks.keys != 0
  windows.last_apart(step, 2, garbage, always=sizes.masked)

  @pl.when(j == pl.num_programs(2) - 1)
  def _end():
    n = jnp.sum(total[...], axis=1, keepdims=True)
    n = jnp.broadcast_to(n, total.shape)
    out[...] = (summed[...] / n[:, : out.shape[1]]).astype(out.dtype)
    logsumexp[...] = windows.row(most[...] + jnp.log2(n))


def _add(logits, values, most, total, summed):
  """Add a tile's keys; `total` keeps a sum for each lane."""
  before = most[...]
  now = jnp.maximum(before, jnp.max(logits, axis=1, keepdims=True))
  p = jnp.exp2(logits - windows.spread(now, logits.shape[1]))
  fade = jnp.exp2(before - now)
  lanes = range(0, logits.shape[1], windows.LANES)
  total[...] = fade * total[...] + sum(
    p[:, n : n + windows.LANES] for n in lanes
  )
  values = windows.times(p.astype(values.dtype), values)
  summed[...] = fade[:, : summed.shape[1]] * summed[...] + values
  most[...] = now
