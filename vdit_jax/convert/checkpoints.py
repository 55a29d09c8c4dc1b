"""Params as an Orbax checkpoint, read and written without doubling them."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from etils import epath

from vdit_jax import trees

# Orbax holds copies of what it has under way: 0.4 GB with these, 1 GB with
# twice as much and compression, of which weights gain little. Whole arrays
# would go without copies, but a device that wants a part would read them all.
_CHUNK_BYTES = 16 * 10**6
_FILE_BYTES = 32 * 10**6


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
  path: epath.Path, like: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.Array]:
  """Read arrays by path, cast and placed as `like` says.

  Orbax reads each device's part of an array whole before it places it, and
  holds it twice meanwhile.
  """
  default = jnp.zeros(()).sharding
  item = trees.unflatten(
    {
      name: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=x.sharding or default
      )
      for name, x in like.items()
    }
  )
  args = ocp.args.PyTreeRestore(
    item, restore_args=ocp.checkpoint_utils.construct_restore_args(item)
  )
  try:
    return trees.flatten(_handler(like).restore(path, args=args))
  except Exception as error:
    raise _unreadable(path, error) from error


def write(path: epath.Path, params: dict[str, Any]) -> None:
  """Write nested params."""
  chunks = ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES)
  args = ocp.args.PyTreeSave(
    params,
    save_args=jax.tree.map(lambda _: chunks, params),
    ocdbt_target_data_file_size=_FILE_BYTES,
  )
  with ocp.Checkpointer(_handler(trees.flatten(params))) as checkpointer:
    checkpointer.save(path, args=args)


def _handler(arrays: Mapping[str, Any]) -> ocp.PyTreeCheckpointHandler:
  """A handler that has as much under way as the largest array needs."""
  largest = max(math.prod(x.shape) * x.dtype.itemsize for x in arrays.values())
  gigabytes = 1 + largest // 10**9
  return ocp.PyTreeCheckpointHandler(
    save_concurrent_gb=gigabytes,
    restore_concurrent_gb=gigabytes,
    use_compression=False,
  )


def _unreadable(path: epath.Path, error: Exception) -> ValueError:
  reason = (str(error).splitlines() or [""])[0][:200]
  return ValueError(
    f"{path} cannot be read ({type(error).__name__}: {reason}); convert again"
  )
