"""Attention of a sequence that is split over devices.

Outside of attention a token needs no other, so every layer works on a part of
the sequence. Inside, a device gets what it lacks in one of two ways:

- "ulysses" (DeepSpeed Ulysses, arXiv:2309.14509): an all-to-all gives each
  device the whole sequence of some of the heads, another gives it back;
- "gather": keys and values are all-gathered, queries stay (as Llama 3 did,
  arXiv:2407.21783, section 3.3.2). Any number of heads; more is sent.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

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
  check_heads(N, method)
  parts, S = sharding.mesh_size("sequence"), k.shape[1]
  if method is not None and S % parts:
    mask = jnp.ones((B, S), bool) if mask is None else mask
  along = None if method is None else "sequence"
  q = _fill(q, ["batch", "sequence"])
  k, v = _fill(k, ["batch", along]), _fill(v, ["batch", along])
  mask = None if mask is None else _fill(mask, ["batch", along])
  split = sharding.spec(["batch", "sequence", "act_heads", None])
  keys = sharding.spec(["batch", along, "act_heads", None])
  body = _METHODS[method if parts > 1 else None]
  run = jax.shard_map(
    functools.partial(body, local, sharding.RULES["sequence"]),
    in_specs=(split, keys, keys, PartitionSpec(split[0])),
    out_specs=split,
    check_vma=False,  # a Pallas call does not say over what it varies
  )
  return run(q, k, v, mask)[:B, :L]


def each(
  run: Callable[..., Any],
  arrays: Sequence[jax.Array],
  names: Sequence[Sequence[str | None]],
  out: Sequence[str | None],
) -> Any:
  """Run a kernel on what each device of the current mesh has of arrays.

  What does not divide over the devices is padded, as in `attend`.

  Args:
    run: of the arrays; what it sees of them is one device's.
    arrays: any number.
    names: logical axes of each.
    out: logical axes of each result; batch and sequence are cropped to those
      of the first array.
  """
  if jax.sharding.get_abstract_mesh().empty:
    return run(*arrays)
  found = jax.shard_map(
    run,
    in_specs=tuple(map(sharding.spec, names)),
    out_specs=sharding.spec(out),
    check_vma=False,  # a Pallas call does not say over what it varies
  )(*map(_fill, arrays, names))
  B, L = arrays[0].shape[:2]
  return jax.tree.map(lambda x: x[:B, :L], found)


def check_heads(heads: int, method: str | None = None) -> None:
  """Refuse heads that do not divide over the current mesh."""
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


def _fill(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
  """Pad the axes so named to multiples with zeros, which is False."""
  sizes = [sharding.mesh_size(name) if name else 1 for name in names]
  sizes += [1] * (x.ndim - len(sizes))
  return jnp.pad(
    x, [(0, -n % size) for n, size in zip(x.shape, sizes, strict=True)]
  )


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
