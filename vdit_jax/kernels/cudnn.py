"""Attention of one device by cuDNN's fused kernels, on NVIDIA GPUs.

`jax.nn.dot_product_attention` runs the same kernels, but keeps to itself what
its backward pass needs, which then no checkpoint policy can save: attention
would run a second time under `remat="attention"`. It also refuses to train on
odd lengths. So its primitives are called here, which jax does not promise to
keep: `setup.cfg` says with which releases they were tried.

A mask becomes a number of keys: attention does not ask in which order keys
come, so those that may be seen are moved to the front. cuDNN then skips the
others, where a mask of its own would be an array of logits.
"""

import dataclasses
import functools
import inspect
from typing import Any

import jax
import jax.numpy as jnp
from jax import ad_checkpoint
from jax._src.cudnn import fused_attention_stablehlo as fused

# That later releases ask for: a function of the logits, which has none here.
_LATER = dict.fromkeys(("score_mod_name", "score_mod_jaxpr"))
_PARAMETERS = inspect.signature(
  fused._dot_product_attention_fwd_cuda_lowering
).parameters
_DTYPES = ("bfloat16", "float16")
_MOST = 128  # dimensions of a head; backwards on every card that has kernels


def takes(q: jax.Array, k: jax.Array, v: jax.Array) -> bool:
  """Tell whether there is a kernel for queries, keys and values [B, *, N, K].

  They are of one 16-bit type, their heads of 8n dimensions and at most 128.
  """
  K = q.shape[-1]
  one_type = q.dtype == k.dtype == v.dtype and q.dtype.name in _DTYPES
  return one_type and K % 8 == 0 and K <= _MOST


def attend(
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  *,
  mask: jax.Array | None = None,
  saved: str | None,
) -> jax.Array:
  """Attend as `nn.attention.dot`, on one device.

  Args:
    q: queries [B, L, N, K].
    k: keys [B, S, N, K].
    v: values [B, S, N, K].
    mask: True where a key may be seen, [B, S]. A row with no key at all gives
      the mean of the values.
    saved: checkpoint name of what the backward pass needs beside q, k, v;
      None gives it none.

  Returns:
    [B, L, N, K] in v's dtype.

  Raises:
    ValueError: for what `takes` says no to.
  """
  if not takes(q, k, v):
    raise ValueError(
      f"kernel='cudnn' takes one of {_DTYPES} and heads of 8n dimensions, at "
      f"most {_MOST}, got q {q.dtype}{list(q.shape)}, k {k.dtype}"
      f"{list(k.shape)}, v {v.dtype}{list(v.shape)}; use kernel='auto'"
    )
  (B, L, _, K), S = q.shape, k.shape[1]
  seen = jnp.full(B, S, jnp.int32)
  if mask is not None:
    q, k, v, seen = _seen_first(q, k, v, mask)
  even = mask is None and L % 2 == 0 and S % 2 == 0
  lengths = None if even else (jnp.full(B, L, jnp.int32), seen)
  # The backward kernels want even lengths.
  q, k, v = (
    jnp.pad(x, [(0, 0), (0, x.shape[1] % 2), *_ASIS]) for x in (q, k, v)
  )
  y: Any = _attend(q, k, v, lengths, _Plan(K**-0.5, saved))
  return y[:, :L]


_ASIS = ((0, 0), (0, 0))


def _seen_first(q, k, v, mask):
  """Move the keys that may be seen to the front, and count them [B].

  Zero queries have the same logit for every key.
  """
  order = jnp.argsort(~mask, axis=1, stable=True)
  kept = jnp.take_along_axis(mask, order, axis=1)[..., None, None]
  seen = jnp.sum(mask, axis=1, dtype=jnp.int32)
  some = seen > 0
  q = jnp.where(some[:, None, None, None], q, 0)
  kept = kept | ~some[:, None, None, None]
  # What is not seen gets no gradient, whatever a kernel leaves there.
  k, v = (
    jnp.where(kept, jnp.take_along_axis(x, order[..., None, None], axis=1), 0)
    for x in (k, v)
  )
  return q, k, v, jnp.where(some, seen, mask.shape[1])


@dataclasses.dataclass(frozen=True)
class _Plan:
  """Scale of the logits; a checkpoint name."""

  scale: float
  saved: str | None


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q, k, v, lengths, plan: _Plan):
  """Attend [B, L, N, K]; lengths are of queries [B] and keys [B], or None."""
  args, how = _call(q, lengths, plan)
  return fused._dot_product_attention_fwd_p.bind(
    q, k, v, *args, is_training=False, **how
  )[0]


def _forward(q, k, v, lengths, plan):
  args, how = _call(q, lengths, plan)
  out, logsumexp = fused._dot_product_attention_fwd_p.bind(
    q, k, v, *args, is_training=True, **how
  )
  if plan.saved:
    out = ad_checkpoint.checkpoint_name(out, plan.saved)
    logsumexp = ad_checkpoint.checkpoint_name(logsumexp, plan.saved)
  return out, (q, k, v, lengths, out, logsumexp)


def _backward(plan, saved, do):
  q, k, v, lengths, out, logsumexp = saved
  args, how = _call(q, lengths, plan)
  dq, dk, dv = fused._dot_product_attention_bwd_p.bind(
    q, k, v, *args, logsumexp, out, do, **how
  )
  return dq, dk, dv, None


def _call(q, lengths, plan):
  """Arrays behind q, k, v of a primitive, and its parameters."""
  absent = jnp.zeros(0, q.dtype)
  of_queries, of_keys = lengths or (absent, absent)
  masks = fused.MaskType
  how = dict(
    scale=plan.scale,
    seed=0,
    dropout_rate=0.0,
    variadic_args=(False, False),  # a bias, its gradient
    mask_type=masks.PADDING if lengths else masks.NO_MASK,
    layout=fused.AttentionLayout.BTNH.value,
    sliding_window_length=None,
    **{k: v for k, v in _LATER.items() if k in _PARAMETERS},
  )
  # A bias, lengths, offsets of queries and keys, tables of pages.
  return (absent, of_queries, of_keys, *[absent] * 4), how


_attend.defvjp(_forward, _backward)
