"""Attention of a sequence that is split over devices.

Outside of attention a token needs no other, so every layer works on a part of
the sequence. Inside, a device gets what it lacks in one of two ways:

- "ulysses" (DeepSpeed Ulysses, arXiv:2309.14509): an all-to-all gives each
  device the whole sequence of some of the heads, another gives it back;
- "gather": keys and values are all-gathered, queries stay (as Llama 3 did,
  arXiv:2407.21783, section 3.3.2). Any number of heads; more is sent.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from vdit_jax import sharding

METHODS = ("ulysses", "gather")

# (q, k, v, mask) -> [B, L, N, K]: attention on what one device has.
Local = Callable[..., jax.Array]


def attend(
  local: Local,
  q: jax.Array,
  k: jax.Array,
  v: jax.Array,
  mask: jax.Array | None,
  method: str | None,
) -> jax.Array:
  """Attend on every device of the current mesh.

  Lengths and batches that do not divide over the devices are padded, as jit
  pads arrays that do not: this moves no data.

  Args:
    local: attention of one device's arrays.
    q: queries [B, L, N, K], split over batch, sequence and heads.
    k: keys [B, S, N, K].
    v: values [B, S, N, K].
    mask: True where a key may be seen, [B, S].
    method: one of `METHODS` when the keys are split as the queries are; None
      when every device has all of them, as those of a text.

  Returns:
    [B, L, N, K], split as the queries.
  """
  B, L, N, _ = q.shape
  _check(N, method)
  rows, parts = sharding.mesh_size("batch"), sharding.mesh_size("sequence")
  S = k.shape[1]
  if method is not None and S % parts:
    mask = jnp.ones((B, S), bool) if mask is None else mask
  key_parts = 1 if method is None else parts
  q = _fill(q, rows, parts)
  k, v = _fill(k, rows, key_parts), _fill(v, rows, key_parts)
  mask = None if mask is None else _fill(mask, rows, key_parts)
  names = ["batch", "sequence", "act_heads", None]
  split = sharding.spec(names)
  whole = sharding.spec(["batch", None, "act_heads", None])
  keys = whole if method is None else split
  body = _METHODS[method if parts > 1 else None]
  run = jax.shard_map(
    functools.partial(body, local, sharding.RULES["sequence"]),
    in_specs=(split, keys, keys, PartitionSpec(split[0])),
    out_specs=split,
    check_vma=False,  # a Pallas call does not say over what it varies
  )
  return run(q, k, v, mask)[:B, :L]


def _check(heads: int, method: str | None) -> None:
  tensor = sharding.mesh_size("act_heads")
  parts = sharding.mesh_size("sequence")
  if heads % tensor:
    raise ValueError(
      f"{heads} heads do not divide over mesh.tensor={tensor}; one that "
      f"divides them is {_divisor(heads, tensor)}"
    )
  if method == "ulysses" and heads // tensor % parts:
    raise ValueError(
      f"{heads} heads over mesh.tensor={tensor} are {heads // tensor} a "
      f"device, which do not divide over mesh.context={parts}; use "
      f"context='gather', or mesh.context={_divisor(heads // tensor, parts)}"
    )


def _divisor(n: int, most: int) -> int:
  return max(d for d in range(1, most + 1) if n % d == 0)


def _fill(x: jax.Array, rows: int, parts: int) -> jax.Array:
  """Pad the first two axes of x to multiples with zeros, which is False."""
  B, L = x.shape[:2]
  rest = ((0, 0),) * (x.ndim - 2)
  return jnp.pad(x, ((0, -B % rows), (0, -L % parts), *rest))


def _alone(local, axis, q, k, v, mask):
  return local(q, k, v, mask)


def _ulysses(local, axis, q, k, v, mask):
  swap = functools.partial(jax.lax.all_to_all, axis_name=axis, tiled=True)
  q, k, v = (swap(x, split_axis=2, concat_axis=1) for x in (q, k, v))
  return swap(local(q, k, v, mask), split_axis=1, concat_axis=2)


def _gather(local, axis, q, k, v, mask):
  k, v = (jax.lax.all_gather(x, axis, axis=1, tiled=True) for x in (k, v))
  return local(q, k, v, mask)


_METHODS = {None: _alone, "ulysses": _ulysses, "gather": _gather}
