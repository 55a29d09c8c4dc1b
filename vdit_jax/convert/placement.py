"""Between tensors and the params' arrays, one tensor at a time.

A param that stacks layers is made whole on its devices, and its rows are set
in place as they are read; so memory stays near the params and one tensor.
Rows are read back in the same way.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from vdit_jax import sharding, trees
from vdit_jax.convert import files, rules


def unboxed(boxed: Any) -> Any:
  """Take the logical axes off; flax's own would ask the mesh about shapes."""
  is_box = lambda x: isinstance(x, nn.meta.AxisMetadata)
  return jax.tree.map(
    lambda x: x.value if is_box(x) else x, boxed, is_leaf=is_box
  )


def like(
  boxed: Any, stored: Mapping[str, Any], param_dtype: np.dtype | None
) -> dict[str, jax.ShapeDtypeStruct]:
  """Say how each param is to be made, by path.

  Args:
    boxed: abstract params with their logical axes.
    stored: what has the dtype that a param is stored in, by path.
    param_dtype: of the floating-point params; None is as stored.

  Returns:
    Shapes, dtypes and, if a mesh is set, shardings.
  """
  mesh = jax.sharding.get_mesh()
  wanted = trees.flatten(unboxed(boxed))
  placed = dict.fromkeys(wanted)
  if not mesh.empty:
    placed = trees.flatten(sharding.shardings(mesh, boxed))
  found = {}
  for path, x in wanted.items():
    cast = param_dtype is not None and jnp.issubdtype(x.dtype, jnp.floating)
    dtype = jnp.dtype(param_dtype if cast else stored[path].dtype)
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
      raise ValueError(
        f"{path} is stored as {dtype}, which jax is not set to hold; give "
        "param_dtype=float32, or set jax_enable_x64"
      )
    found[path] = jax.ShapeDtypeStruct(x.shape, dtype, sharding=placed[path])
  return found


def fill(
  slots: Sequence[rules.Slot],
  tensors: Mapping[str, files.Readable],
  like: jax.ShapeDtypeStruct,
  bad: list[str],
  done: Callable[[], Any] = lambda: None,
) -> jax.Array:
  """Make one param of its tensors.

  Args:
    slots: all of the param's.
    tensors: by key.
    like: shape, dtype and sharding of the param; without a sharding it goes
      to the default device.
    bad: to which keys of tensors that hold a NaN or an infinity are added.
    done: called for each tensor.

  Raises:
    ValueError: if a finite number is too large for the dtype.
  """
  if slots[0].row is None:
    done()
    tensor = tensors[slots[0].key]
    return _put(slots[0], tensor, like.dtype, like.sharding, bad)
  stack = jnp.zeros(like.shape, like.dtype, device=like.sharding)
  rows = _of_rows(like.sharding)
  for slot in slots:
    row = _put(slot, tensors[slot.key], like.dtype, rows, bad)
    # The row's host memory is free again only when it has been copied.
    stack = _set_row(stack, row, slot.row).block_until_ready()
    done()
  return stack


class Row:
  """The tensor of a slot, read from the param that has it."""

  def __init__(
    self, slot: rules.Slot, param: Any, done: Callable[[], Any] = lambda: None
  ):
    """Take a slot, the whole param (jax or numpy), and what a reading calls."""
    self._slot, self._param, self._done = slot, param, done
    ours = tuple(param.shape if slot.row is None else param.shape[1:])
    self.shape = rules.shape(slot.transform.inverse, ours)
    self.dtype = np.dtype(param.dtype)

  def read(self) -> np.ndarray:
    """Return the values as torch has them."""
    self._done()
    return self._slot.transform.inverse(_to_host(self._param, self._slot.row))


@functools.partial(jax.jit, donate_argnums=0)
def _set_row(stack: jax.Array, row: jax.Array, index: int) -> jax.Array:
  return jax.lax.dynamic_update_index_in_dim(stack, row, index, 0)


def _put(
  slot: rules.Slot,
  tensor: files.Readable,
  dtype: np.dtype,
  place: Any,
  bad: list[str],
) -> jax.Array:
  """Place one tensor; each device gets its part, read once."""
  values = slot.transform.forward(tensor.read())

  def own(values):
    found = _own(slot.key, values, dtype)
    if not trees.is_finite(found):
      bad.append(slot.key)
    return found

  if place is None:
    return jnp.asarray(own(values))
  parts: dict[str, np.ndarray] = {}

  def part(index):
    name = str(index)
    if name not in parts:
      parts[name] = own(values[index])
    return parts[name]

  return jax.make_array_from_callback(values.shape, place, part)


def _own(key: str, values: np.ndarray, dtype: np.dtype) -> np.ndarray:
  """Copy out of the file, in C order, and cast."""
  if values.dtype == dtype:
    return np.array(values, order="C")
  with np.errstate(over="ignore"):
    own = np.asarray(values.astype(dtype, order="C"))
  if not jnp.issubdtype(dtype, jnp.floating):
    return own
  largest = float(jnp.finfo(dtype).max)
  if largest < float(jnp.finfo(values.dtype).max):
    lost = np.isfinite(values) & ~np.isfinite(own)
    if lost.any():
      raise ValueError(
        f"{key} has {float(values[lost][0]):g}, {dtype} ends at {largest:g}; "
        "use param_dtype=bfloat16 or float32"
      )
  return own


def _of_rows(stack: NamedSharding | None) -> NamedSharding | None:
  """Sharding of a stacked param's row."""
  if stack is None:
    return None
  return NamedSharding(stack.mesh, PartitionSpec(*stack.spec[1:]))


def _to_host(param: Any, row: int | None) -> np.ndarray:
  if not isinstance(param, jax.Array):
    return np.asarray(param if row is None else param[row])
  # A new array, since one that has been looked at keeps its host copy.
  if row is None:
    x = param.copy()
  else:
    x = jax.lax.dynamic_index_in_dim(param, row, keepdims=False)
  if not x.is_fully_addressable:
    return multihost_utils.process_allgather(x, tiled=True)
  return np.asarray(x)
