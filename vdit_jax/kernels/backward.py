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

What the compiler says (libtpu 0.0.42.1; nothing here ran on a TPU), at 17,920
tokens, 8 heads of 128, bfloat16. Bundles of the body per 512 x 512 tile and
head; about 150 more for each step of the grid.

  kernel  blocks          v5e   v5p   v6e   library, blocks of 512: v5e   v5p
  dq      1280, 640, 640  1468  1433                                1498  1465
  dkv     1280, 640, 640  1843  1867                                2001  1916
  dqkv    1280, 512, 512  2284  2302  1348

A v5e or v5p core's four 128 x 128 multipliers need 1536, 2048 and 2560 cycles
for a tile's matmuls at the published peak, whatever the bundles: an estimate
charges the greater. On v5p each core walks 1,960 of the 3,920 grid steps of
`dqkv`; the library's dq and dkv lie in a region of the primary core, which
walks all of theirs. `dqkv` compiles at 75,776 tokens on v5e and v5p, where
it may take 53 of the 128 and 64 MiB of a core.
"""

import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128
# Windows, sums over keys and the tiles between the matmuls of `dqkv`.
_WORKING_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Blocks:
  """Tokens of one grid step, and the part of the keys worked on at once."""

  queries: int = 1024
  keys: int = 1024
  compute: int = 512


def dq(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  do: jax.Array,
  logsumexp: jax.Array,
  delta: jax.Array,
  mask: jax.Array,
  *,
  blocks: Blocks,
  interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
  """Return the gradient of the queries.

  Args:
    q: scaled queries [B, N, L, K]; logits are q k^T.
    k: keys [B, N, S, K].
    v: values [B, N, S, K].
    do: gradient of the output [B, N, L, K].
    logsumexp: of each row of masked logits, float32 [B, N, L].
    delta: sum over K of do * output, float32 [B, N, L].
    mask: True, or not 0, where a key may be seen, [B, S].
    blocks: sizes that divide L and S.
    interpret: run on the CPU, as Pallas' TPU interpreter does.

  Returns:
    [B, N, L, K] in q's dtype; 0 for a query that sees no key.
  """
  _check(q, k, blocks)
  heads, L, K = q.shape[0] * q.shape[1], *q.shape[2:]
  grid = heads, L // blocks.queries, k.shape[2] // blocks.keys
  row, key, stat, seen = _specs(q, blocks, keys_first=False)
  out = pl.pallas_call(
    functools.partial(_dq_kernel, compute=blocks.compute),
    grid=grid,
    in_specs=[row, key, key, row, stat, stat, seen],
    out_specs=row,
    out_shape=jax.ShapeDtypeStruct((heads, L, K), q.dtype),
    scratch_shapes=[
      pltpu.VMEM((blocks.queries, K), jnp.float32),
      pltpu.VMEM((blocks.queries, LANES), jnp.float32),
      pltpu.VMEM((blocks.queries, LANES), jnp.float32),
    ],
    compiler_params=_params("parallel"),
    name="attention_dq",
    metadata=_noted(blocks),
    interpret=interpret,
  )(*_operands(q, k, v, do, logsumexp, delta, mask))
  return out.reshape(q.shape)


def dkv(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  do: jax.Array,
  logsumexp: jax.Array,
  delta: jax.Array,
  mask: jax.Array,
  *,
  blocks: Blocks,
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array]:
  """Return the gradients of keys and values; `dq` describes the arguments.

  Returns:
    dk and dv [B, N, S, K] in the dtypes of k and v; 0 where not seen.
  """
  _check(q, k, blocks)
  heads, S, K = k.shape[0] * k.shape[1], *k.shape[2:]
  grid = heads, S // blocks.keys, q.shape[2] // blocks.queries
  row, key, stat, seen = _specs(q, blocks, keys_first=True)
  dk, dv = pl.pallas_call(
    functools.partial(_dkv_kernel, compute=blocks.compute),
    grid=grid,
    in_specs=[row, key, key, row, stat, stat, seen],
    out_specs=[key, key],
    out_shape=[jax.ShapeDtypeStruct((heads, S, K), x.dtype) for x in (k, v)],
    scratch_shapes=[pltpu.VMEM((blocks.keys, K), jnp.float32)] * 2,
    compiler_params=_params("parallel"),
    name="attention_dkv",
    metadata=_noted(blocks),
    interpret=interpret,
  )(*_operands(q, k, v, do, logsumexp, delta, mask))
  return dk.reshape(k.shape), dv.reshape(v.shape)


def dqkv(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  do: jax.Array,
  logsumexp: jax.Array,
  delta: jax.Array,
  mask: jax.Array,
  *,
  blocks: Blocks,
  interpret: bool | pltpu.InterpretParams = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Return all three gradients; `dq` describes the arguments.

  Five matmuls a tile where `dq` and `dkv` take seven. The gradient of a
  head's queries stays in the core's memory while the keys pass by, so that
  `fused_bytes` must fit there, and heads alone are spread over cores.

  Returns:
    dq, dk and dv in the shapes and dtypes of q, k and v.
  """
  _check(q, k, blocks)
  heads, L, K = q.shape[0] * q.shape[1], *q.shape[2:]
  grid = heads, k.shape[2] // blocks.keys, L // blocks.queries
  row, key, stat, seen = _specs(q, blocks, keys_first=True)
  grads = pl.pallas_call(
    functools.partial(_dqkv_kernel, compute=blocks.compute),
    grid=grid,
    in_specs=[row, key, key, row, stat, stat, seen],
    out_specs=[_last_pass(row, grid[1]), key, key],
    out_shape=[
      jax.ShapeDtypeStruct((heads, *x.shape[2:]), x.dtype) for x in (q, k, v)
    ],
    scratch_shapes=[
      pltpu.VMEM((L, K), jnp.float32),
      pltpu.VMEM((blocks.keys, K), jnp.float32),
      pltpu.VMEM((blocks.keys, K), jnp.float32),
      pltpu.VMEM((blocks.keys, K), k.dtype),
    ],
    compiler_params=_params("arbitrary", fused_bytes(L)),
    name="attention_dqkv",
    metadata=_noted(blocks),
    interpret=interpret,
  )(*_operands(q, k, v, do, logsumexp, delta, mask))
  return tuple(
    g.reshape(x.shape) for g, x in zip(grads, (q, k, v), strict=True)
  )


def fused_bytes(tokens: int) -> int:
  """Return what `dqkv` asks of a core's memory for so many queries."""
  return _WORKING_BYTES + 4 * tokens * LANES


def _check(q: jax.Array, k: jax.Array, blocks: Blocks) -> None:
  """Refuse what the grid cannot cover."""
  L, S, K = q.shape[2], k.shape[2], q.shape[3]
  if K not in (64, 128):
    raise ValueError(f"head dim must be 64 or 128, got {K}; use nn.attention")
  for name, tokens, block in (
    ("queries", L, blocks.queries),
    ("keys", S, blocks.keys),
  ):
    if tokens % block:
      raise ValueError(
        f"{name} must be a multiple of blocks.{name}, got {tokens} and"
        f" {block}; pad them to {-(-tokens // block) * block}"
      )
    if block % LANES:
      raise ValueError(f"blocks.{name} must be 128n, got {block}")
  if blocks.keys % blocks.compute or blocks.compute % LANES:
    raise ValueError(
      f"blocks.compute must be 128n and divide blocks.keys {blocks.keys}, got"
      f" {blocks.compute}; try {LANES}"
    )


def _noted(blocks: Blocks) -> dict[str, str]:
  """Note the blocks in the compiled text, as the library's kernels do."""
  noted = {"block_q": blocks.queries, "block_kv": blocks.keys}
  return {"xprof_metadata": json.dumps(noted)}


def _params(outer: str, vmem: int | None = None) -> pltpu.CompilerParams:
  return pltpu.CompilerParams(
    dimension_semantics=("parallel", outer, "arbitrary"),
    vmem_limit_bytes=vmem,
  )


def _specs(q, blocks, keys_first):
  """Return the windows of queries, keys, statistics and mask in a grid.

  The grid is (head, query block, key block), or the last two the other way
  round for `keys_first`.
  """
  N, K = q.shape[1], q.shape[3]

  def window(shape, index):
    if keys_first:
      return pl.BlockSpec(shape, lambda h, j, i: index(h, i, j))
    return pl.BlockSpec(shape, index)

  return (
    window((None, blocks.queries, K), lambda h, i, j: (h, i, 0)),
    window((None, blocks.keys, K), lambda h, i, j: (h, j, 0)),
    window((None, 1, blocks.queries), lambda h, i, j: (h, 0, i)),
    # lax.div: `//` asks for the kind of chip, which a compile without one
    # does not know.
    window((None, 1, blocks.keys), lambda h, i, j: (jax.lax.div(h, N), 0, j)),
  )


def _last_pass(row, passes):
  """Hold block 0, which is thus not written out, until the last pass."""
  return pl.BlockSpec(
    row.block_shape,
    lambda h, j, i: (h, jnp.where(j == passes - 1, i, 0), 0),
  )


def _operands(q, k, v, do, logsumexp, delta, mask):
  """Merge batch and heads; statistics and mask become rows of lanes."""
  # Of a query without keys it may be -inf, and -inf - -inf is NaN.
  logsumexp = jnp.maximum(logsumexp, jnp.finfo(jnp.float32).min)
  heads = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v, do)]
  stats = [x.reshape(-1, 1, x.shape[-1]) for x in (logsumexp, delta)]
  bias = jnp.where(mask.astype(bool), 0.0, -jnp.inf).astype(jnp.float32)
  return *heads, *stats, bias[:, None, :]


def _dq_kernel(
  q, k, v, do, logsumexp, delta, bias, out, total, lse, dlt, *, compute
):
  @pl.when(pl.program_id(2) == 0)
  def _start():
    total[...] = jnp.zeros_like(total)
    lse[...] = _column(logsumexp[...])
    dlt[...] = _column(delta[...])

  repeats = compute // LANES
  for start in range(0, k.shape[0], compute):
    part = slice(start, start + compute)
    logits = _times_transposed(q[...], k[part, :]) + bias[:, part]
    p = _probability(logits, jnp.tile(lse[...], (1, repeats)))
    dp = _times_transposed(do[...], v[part, :])
    ds = p * (dp - jnp.tile(dlt[...], (1, repeats)))
    total[...] += _times(ds.astype(k.dtype), k[part, :])

  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _end():
    out[...] = total[...].astype(out.dtype)


def _dkv_kernel(
  q, k, v, do, logsumexp, delta, bias, dk, dv, dk_sum, dv_sum, *, compute
):
  @pl.when(pl.program_id(2) == 0)
  def _start():
    dk_sum[...] = jnp.zeros_like(dk_sum)
    dv_sum[...] = jnp.zeros_like(dv_sum)

  for start in range(0, k.shape[0], compute):
    part = slice(start, start + compute)
    _add_keys(q, k, v, do, logsumexp, delta, dk_sum, dv_sum, part)

  _write_keys(bias, dk, dv, dk_sum, dv_sum)


def _dqkv_kernel(
  q, k, v, do, logsumexp, delta, bias,
  dq, dk, dv, dq_sum, dk_sum, dv_sum, seen_k, *, compute,
):  # fmt: skip
  j, i = pl.program_id(1), pl.program_id(2)
  rows = pl.ds(pl.multiple_of(i * q.shape[0], LANES), q.shape[0])

  @pl.when(i == 0)
  def _start():
    dk_sum[...] = jnp.zeros_like(dk_sum)
    dv_sum[...] = jnp.zeros_like(dv_sum)
    seen_k[...] = jnp.where(_seen(bias, k), k[...], 0)

  @pl.when(j == 0)
  def _start_queries():
    dq_sum[rows, :] = jnp.zeros(q.shape, jnp.float32)

  for start in range(0, k.shape[0], compute):
    part = slice(start, start + compute)
    ds = _add_keys(q, k, v, do, logsumexp, delta, dk_sum, dv_sum, part)
    dq_sum[rows, :] += _transposed_times(ds, seen_k[part, :])

  @pl.when(j == pl.num_programs(1) - 1)
  def _end():
    dq[...] = dq_sum[rows, :].astype(dq.dtype)

  _write_keys(bias, dk, dv, dk_sum, dv_sum)


def _add_keys(q, k, v, do, logsumexp, delta, dk_sum, dv_sum, part):
  """Add one tile to the sums; return its `ds` [keys, queries].

  Keys lie along sublanes here, so that statistics are rows and nothing is
  transposed. A key that may not be seen spoils its own row only, and that is
  cleared when it is written.
  """
  p = _probability(_times_transposed(k[part, :], q[...]), logsumexp[...])
  dv_sum[part, :] += _times(p.astype(do.dtype), do[...])
  dp = _times_transposed(v[part, :], do[...])
  ds = (p * (dp - delta[...])).astype(q.dtype)
  dk_sum[part, :] += _times(ds, q[...])
  return ds


def _write_keys(bias, dk, dv, dk_sum, dv_sum):
  @pl.when(pl.program_id(2) == pl.num_programs(2) - 1)
  def _end():
    seen = _seen(bias, dk)
    dk[...] = jnp.where(seen, dk_sum[...], 0).astype(dk.dtype)
    dv[...] = jnp.where(seen, dv_sum[...], 0).astype(dv.dtype)


def _probability(logits, logsumexp):
  # At most 1: a query that is padding, or a key that is not seen, has any
  # logsumexp, and infinity times a gradient of 0 would be NaN.
  return jnp.exp(jnp.minimum(logits - logsumexp, 0))


def _seen(bias, keys):
  """Return which keys may be seen, as a mask of their block."""
  return _column(bias[...])[:, : keys.shape[1]] == 0


def _column(row):
  """Turn [1, n] into [n, LANES], all lanes equal."""
  return jnp.broadcast_to(row, (LANES, row.shape[1])).T


def _matmul(a, b, a_dim, b_dim):
  # A float32 operand would otherwise be rounded to bfloat16 by the MXU.
  highest = a.dtype == jnp.float32
  return jax.lax.dot_general(
    a,
    b,
    (((a_dim,), (b_dim,)), ((), ())),
    precision=jax.lax.Precision.HIGHEST if highest else None,
    preferred_element_type=jnp.float32,
  )


_times = functools.partial(_matmul, a_dim=1, b_dim=0)
_times_transposed = functools.partial(_matmul, a_dim=1, b_dim=1)
_transposed_times = functools.partial(_matmul, a_dim=0, b_dim=0)
