"""Params as an Orbax checkpoint, read and written without doubling them.

Orbax writes. It would read an array whole and hold it twice meanwhile, so the
arrays, which are zarr in an OCDBT store, are read by TensorStore: some rows
at a time, and of those what this process's devices want.
"""

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from vdit_jax import trees
from vdit_jax.convert import placement, rules

# Orbax holds copies of what it has under way: 0.4 GB with these, 1 GB with
# twice as much and compression, of which weights gain little. Whole arrays
# would go without copies, but a device that wants a part would read them all.
_CHUNK_BYTES = 16 * 10**6
_FILE_BYTES = 32 * 10**6
_BLOCK_BYTES = 64 * 10**6  # of rows read at a time: several chunks at once
_TREE_BYTES = 100 * 10**6  # of the store's index, kept while it is read


def is_one(path: epath.Path) -> bool:
  """Whether a folder is a checkpoint."""
  return (path / "_METADATA").exists()


def stored(path: epath.Path) -> dict[str, Any]:
  """Return the shapes and dtypes of a checkpoint's arrays, by path."""
  try:
    return trees.flatten(ocp.PyTreeCheckpointHandler().metadata(path).tree)
  except Exception as error:  # lost bytes show up as errors of any type
    raise _unreadable(path, error) from error


def read(
  path: epath.Path,
  like: Mapping[str, jax.ShapeDtypeStruct],
  done: Callable[[], Any] = lambda: None,
) -> dict[str, jax.Array]:
  """Read arrays by path, cast and placed as `like` says.

  Args:
    path: the checkpoint.
    like: shapes, dtypes and shardings by path; without a sharding an array
      goes to the default device.
    done: called for each array.

  Raises:
    ValueError: if the checkpoint has lost bytes, a number is not finite, or
      one that is is too large for the dtype.
  """
  default = jnp.zeros(()).sharding
  context = ts.Context({"cache_pool#tree": {"total_bytes_limit": _TREE_BYTES}})
  arrays: dict[str, jax.Array] = {}
  bad: list[str] = []
  for name, x in like.items():
    place = x.sharding or default
    wanted = jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    arrays[name] = _fill(name, _open(path, name, context), wanted, bad)
    done()
  trees.raise_not_finite(f"path {path}", list(dict.fromkeys(bad)))
  return arrays


def write(path: epath.Path, params: dict[str, Any]) -> None:
  """Write nested params."""
  largest = max(_num_bytes(x) for x in jax.tree.leaves(params))
  handler = ocp.PyTreeCheckpointHandler(
    save_concurrent_gb=1 + largest // 10**9, use_compression=False
  )
  args = ocp.args.PyTreeSave(
    params,
    save_args=jax.tree.map(_chunks, params),
    ocdbt_target_data_file_size=_FILE_BYTES,
  )
  with ocp.Checkpointer(handler) as checkpointer:
    checkpointer.save(path, args=args)


class _Array:
  """A stored array. Its values are itself: what is indexed is read.

  So `placement.fill`, given a sharding, reads what devices here want.
  """

  def __init__(self, path: epath.Path, store: ts.TensorStore):
    self._path, self._store = path, store
    self.shape, self.dtype = store.shape, store.dtype.numpy_dtype

  def read(self) -> "_Array":
    return self

  def __getitem__(self, index: Any) -> np.ndarray:
    try:
      return self._store[index].read().result()
    except Exception as error:
      raise _unreadable(self._path, error) from error

  def rows(self, start: int, stop: int) -> "_Array":
    part = self._store[start : min(stop, self.shape[0])]
    return _Array(self._path, part[ts.d[0].translate_to[0]])

  def rows_at_once(self) -> int:
    """Whole chunks of rows, since a part of one is read as all of it."""
    if not self.shape:
      return 1
    chunk = self._store.chunk_layout.read_chunk.shape[0]
    size = chunk * math.prod(self.shape[1:]) * self.dtype.itemsize
    return chunk * max(_BLOCK_BYTES // max(size, 1), 1)


def _open(path: epath.Path, name: str, context: ts.Context) -> _Array:
  base = f"{path}/"
  spec = {
    "driver": "zarr",
    "kvstore": {
      "driver": "ocdbt",
      "base": base if "://" in base else {"driver": "file", "path": base},
      "path": name.replace("/", "."),
      "cache_pool": "cache_pool#tree",
    },
    "fill_missing_data_reads": False,  # refuse them: they are not zeros
  }
  try:
    return _Array(path, ts.open(spec, read=True, context=context).result())
  except Exception as error:
    raise _unreadable(path, error) from error


def _fill(
  name: str, array: _Array, like: jax.ShapeDtypeStruct, bad: list[str]
) -> jax.Array:
  """Make one array, of blocks of rows if its devices have all of them."""
  slots = [rules.Slot(name, name, None, rules.SAME)]
  n, step = (*like.shape, 1)[0], array.rows_at_once()
  split = like.sharding.shard_shape(like.shape)[:1] != like.shape[:1]
  if split or step >= n:
    return placement.fill(slots, {name: array}, like, bad)
  whole = jnp.zeros(like.shape, like.dtype, device=like.sharding)
  for start in range(0, n, step):
    rows = array.rows(start, start + step)
    block = like.update(shape=rows.shape)
    rows = placement.fill(slots, {name: rows}, block, bad)
    # The block's host memory is free again only when it has been copied.
    whole = _set_rows(whole, rows, start).block_until_ready()
  return whole


@functools.partial(jax.jit, donate_argnums=0)
def _set_rows(whole: jax.Array, rows: jax.Array, start: int) -> jax.Array:
  return jax.lax.dynamic_update_slice_in_dim(whole, rows, start, 0)


def _chunks(x: Any) -> ocp.SaveArgs:
  """Chunks of an array; of one row or less if rows are not far smaller."""
  large = bool(x.shape) and _num_bytes(x) // x.shape[0] >= _CHUNK_BYTES // 16
  axes = (0,) if large else ()
  return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=axes)


def _num_bytes(x: Any) -> int:
  return math.prod(x.shape) * x.dtype.itemsize


def _unreadable(path: epath.Path, error: Exception) -> ValueError:
  reason = (str(error).splitlines() or [""])[0][:200]
  return ValueError(
    f"{path} cannot be read ({type(error).__name__}: {reason}); convert again"
  )
