"""Attention of one device on a CPU: blocks of logits that its cache holds.

Written out, attention moves every logit to memory and back for each of its
passes, and a CPU's memory is slow: so blocks of queries of some heads at a
time, in a loop, and none of it kept. The backward pass makes the weights again
from the log-sum-exp of the logits (FlashAttention-2, arXiv:2307.08691,
algorithm 2; here a block has all keys).
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import ad_checkpoint

# Of a block: 4 MiB in float32, thrice that going backwards. With 32 MiB of
# cache half as many and twice as many are within a tenth of it, four times as
# many take up to half as long again.
LOGITS = 2**20
# On a GPU, whose memory is fast, a block fills the card: 512 MiB in float32.
GPU_LOGITS = 2**27
_FEWEST = 64  # queries of a block, so that its matmuls stay matmuls


def count(q: jax.Array, k: jax.Array) -> int:
  """Count the logits of queries [B, L, N, K] and keys [B, S, N, K]."""
  return math.prod(q.shape[:3]) * k.shape[1]


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  mask: jax.Array | None = None,
  logits: int,
  saved: str | None,
) -> jax.Array:
  """Attend as `nn.attention.dot`, on one device.

  Args:
    q: queries [B, L, N, K].
    k: keys [B, S, N, K].
    v: values [B, S, N, K].
    mask: True where a key may be seen, [B, S]. A row with no key at all gives
      the mean of the values, with gradients of no meaning: the caller must see
      that it is not used.
    logits: about how many a block may have.
    saved: checkpoint name of what the backward pass needs beside q, k, v;
      None gives it none.

  Returns:
    [B, L, N, K] in v's dtype.
  """
  B, L, N, K = q.shape
  plan = _plan(B * N, L, k.shape[1], logits, saved)
  # Heads first, as in `dot`.
  q, k, v = (
    jnp.swapaxes(x, 1, 2).reshape(B * N, -1, K) for x in (q * K**-0.5, k, v)
  )
  if mask is not None:
    mask = jnp.repeat(mask, N, axis=0)[:, None]  # [B N, 1, S]
  return jnp.swapaxes(_attend(q, k, v, mask, plan).reshape(B, N, L, K), 1, 2)  # pyright: ignore[reportAttributeAccessIssue]


@dataclasses.dataclass(frozen=True)
class _Plan:
  """How the work is cut: heads and queries of a block; a checkpoint name."""

  heads: int
  queries: int
  saved: str | None


def _plan(heads: int, L: int, S: int, logits: int, saved: str | None) -> _Plan:
  """Take all queries of as many heads as fit, or some queries of one head."""
  together = max(1, min(heads, logits // (L * S)))
  together = max(n for n in range(1, together + 1) if heads % n == 0)
  fewest = min(_FEWEST, L)
  blocks = -(-L // max(fewest, min(L, logits // S)))
  return _Plan(together, -(-L // blocks), saved)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, mask, plan: _Plan) -> Any:
  return _forward(q, k, v, mask, plan)[0]


def _forward(q, k, v, mask, plan):
  def heads(args):
    q, *keys = args
    return jax.lax.map(lambda q: _block(q, *keys), q)

  keys = (_cut_heads(x, plan) for x in (k, v, mask))
  found = jax.lax.map(heads, (_cut(q, plan), *keys))
  out, logsumexp = (_join(x, q.shape[1]) for x in found)
  if plan.saved:
    out = ad_checkpoint.checkpoint_name(out, plan.saved)
    logsumexp = ad_checkpoint.checkpoint_name(logsumexp, plan.saved)
  return out.astype(v.dtype), (q, k, v, mask, out, logsumexp)


def _block(q, k, v, mask):
  """Queries [n, R, K] of n heads: output, log-sum-exp [n, R, 1], float32."""
  s = _logits(q, k, mask)
  highest = jnp.max(s, axis=-1, keepdims=True)
  p = jnp.exp(s - highest)
  total = jnp.sum(p, axis=-1, keepdims=True)
  out = _matmul(p.astype(v.dtype), v) / total
  return out, highest + jnp.log(total)


def _backward(plan, saved, do):
  q, k, v, mask, out, logsumexp = saved
  delta = jnp.sum(out * do.astype(jnp.float32), axis=-1, keepdims=True)

  def heads(args):
    rows, keys = args
    zeros = tuple(jnp.zeros(x.shape, jnp.float32) for x in keys[:2])

    def step(total, row):
      dq, *dkv = _block_gradients(*row, *keys)
      return tuple(a + b for a, b in zip(total, dkv, strict=True)), dq

    return jax.lax.scan(step, zeros, rows)

  rows = tuple(_cut(x, plan) for x in (q, do, logsumexp, delta))
  keys = tuple(_cut_heads(x, plan) for x in (k, v, mask))
  (dk, dv), dq = jax.lax.map(heads, (rows, keys))
  dk, dv = dk.reshape(k.shape), dv.reshape(v.shape)
  return _join(dq, q.shape[1]), dk.astype(k.dtype), dv.astype(v.dtype), None


def _block_gradients(q, do, logsumexp, delta, k, v, mask):
  """Gradients of q, and what these queries add to those of k and v."""
  p = jnp.exp(_logits(q, k, mask) - logsumexp)
  ds = p * (_matmul(do, _turn(v)) - delta)
  # Turned is the small side: up to twice as fast as turning p and ds.
  dk, dv = (_turn(_matmul(_turn(a), b)) for a, b in ((q, ds), (do, p)))
  return _matmul(ds, k).astype(q.dtype), dk, dv


def _logits(q, k, mask):
  s = _matmul(q, _turn(k))
  return s if mask is None else jnp.where(mask, s, jnp.finfo(s.dtype).min)


def _matmul(a, b):
  return jnp.matmul(a, b, preferred_element_type=jnp.float32)


def _turn(x):
  return jnp.swapaxes(x, -1, -2)


def _cut_heads(x, plan):
  """Cut [H, ...] to [H / n, n, ...]."""
  return x if x is None else x.reshape(-1, plan.heads, *x.shape[1:])


def _cut(x, plan):
  """Cut [H, L, ...] to [H / n, blocks, n, queries, ...], zeros behind."""
  shape = plan.queries, x.shape[-1]
  x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % plan.queries), (0, 0)))
  x = x.reshape(-1, plan.heads, x.shape[1] // plan.queries, *shape)
  return jnp.swapaxes(x, 1, 2)


def _join(x, L):
  """Invert `_cut`."""
  x = jnp.swapaxes(x, 1, 2)
  return x.reshape(x.shape[0] * x.shape[1], -1, x.shape[-1])[:, :L]


_attend.defvjp(_forward, _backward)
