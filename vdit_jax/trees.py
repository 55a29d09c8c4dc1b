"""Trees of arrays by name: flat and nested, compared, counted.

A leaf's name is its path joined by "/": "blocks/attention/kernel". Whatever
reads weights from outside (a checkpoint, a release, files of another project)
compares its names with the names that are wanted here, so that one error
lists everything that is missing, left over or of another shape.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vdit_jax import schema

_MOST_LINES, _LONGEST_LINE = 200, 300  # of one error
_DEEPEST = 50  # dicts within dicts
_BLOCK = 2**20  # elements looked at together


def flatten(tree: Any) -> dict[str, Any]:
  """Name every leaf: {"a": {"b": x}} becomes {"a/b": x}.

  Any pytree has names: a field of a dataclass goes by its name, an entry of
  a tuple by its index. None and an empty dict hold no leaf and get no name.
  `unflatten` is the inverse for nested dicts.

  Raises:
    ValueError: if a dict's key is not a string or has a "/" in it.
  """
  paths, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {_name(path): leaf for path, leaf in paths}


def unflatten(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Nest named leaves: {"a/b": x} becomes {"a": {"b": x}}.

  Raises:
    ValueError: if one name lies below another one, such as "a" and "a/b".
  """
  tree: dict[str, Any] = {}
  for name, leaf in flat.items():
    *folders, last = name.split("/", _DEEPEST)
    node = tree
    for folder in folders:
      node = node.setdefault(folder, {})
      if not isinstance(node, dict):
        break
    if not isinstance(node, dict) or last in node or "/" in last:
      raise ValueError(
        f"{schema.quote(name)} lies below a leaf, above one, or too deep; "
        "rename it"
      )
    node[last] = leaf
  return tree


def compare(
  expected: Any, found: Any, *, check_dtype: bool = True
) -> list[str]:
  """List how the leaves of `found` differ from those of `expected`.

  Only names, shapes and dtypes are looked at, so a leaf may be an array, a
  jax.ShapeDtypeStruct or a checkpoint's metadata.

  Args:
    expected: tree of what is wanted.
    found: tree of what there is.
    check_dtype: whether another dtype is a difference too.

  Returns:
    A line for each difference, by name: the missing, the left over, and those
    of another shape or dtype. Empty if the trees match.
  """
  want, have = flatten(expected), flatten(found)
  missing = [
    f"missing: {name} {_spec(want[name])}"
    for name in sorted(want.keys() - have.keys())
  ]
  extra = [
    f"left over: {name} {_spec(have[name])}"
    for name in sorted(have.keys() - want.keys())
  ]
  other = [
    f"differs: {name} expected {_spec(want[name])}, found {_spec(have[name])}"
    for name in sorted(want.keys() & have.keys())
    if not _alike(want[name], have[name], check_dtype)
  ]
  return missing + extra + other


def check_match(
  expected: Any,
  found: Any,
  what: str,
  *,
  check_dtype: bool = True,
  remedy: str = "",
) -> None:
  """Raise one ValueError that lists every difference of two trees.

  Args:
    expected: tree of what is wanted.
    found: tree of what there is.
    what: what `found` is and where it is from, the subject of the message.
    check_dtype: whether another dtype is a difference too.
    remedy: what to do about it, the end of the message.
  """
  lines = compare(expected, found, check_dtype=check_dtype)
  raise_listed(f"{what} does not match", lines, remedy)


def raise_listed(what: str, lines: Sequence[str], remedy: str = "") -> None:
  """Raise one ValueError that lists what is wrong, if anything is.

  Args:
    what: the beginning of the message.
    lines: one for each thing; long ones are cut, and so is a long list.
    remedy: what to do about it, the end of the message.
  """
  if not lines:
    return
  shown = [line[:_LONGEST_LINE] for line in lines[:_MOST_LINES]]
  if len(lines) > _MOST_LINES:
    shown.append(f"and {len(lines) - _MOST_LINES} more")
  head = f"{what}, in {len(lines)} places:"
  raise ValueError("\n  ".join([head, *shown, *([remedy] if remedy else [])]))


def refuse_not_finite(what: str, flat: Mapping[str, np.ndarray]) -> None:
  """Raise one ValueError that names the arrays with a NaN or an infinity."""
  names = [name for name, x in flat.items() if not is_finite(x)]
  raise_not_finite(what, names)


def raise_not_finite(what: str, names: Sequence[str]) -> None:
  """Raise one ValueError that names these arrays, if there are any."""
  remedy = "fetch it again; of a run, take an earlier step"
  raise_listed(f"{what} has weights that are NaN or infinite", names, remedy)


def is_finite(x: np.ndarray) -> bool:
  """Tell whether an array holds finite numbers alone.

  The bits are looked at, some MB at a time: as fast as memory is read.
  """
  x = np.asarray(x)
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return True
  if x.dtype.itemsize == 1:  # float8: few have an infinity, at other bits
    return bool(np.isfinite(x).all())
  width = jnp.finfo(x.dtype).nexp
  exponent = ((1 << width) - 1) << jnp.finfo(x.dtype).nmant
  bits = np.ravel(x, order="K").view(f"u{x.dtype.itemsize}")
  exponent = bits.dtype.type(exponent)
  return not any(
    bool(((bits[i : i + _BLOCK] & exponent) == exponent).any())
    for i in range(0, bits.size, _BLOCK)
  )


def count(params: Any) -> int:
  """Return the number of scalars in a tree."""
  return sum(math.prod(_array(x).shape) for x in jax.tree.leaves(params))


def num_bytes(params: Any) -> int:
  """Return the bytes that a tree takes, were every leaf held once."""
  leaves = [_array(x) for x in jax.tree.leaves(params)]
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


def _name(path: tuple[Any, ...]) -> str:
  for entry in path:
    key = entry.key if isinstance(entry, jax.tree_util.DictKey) else ""
    if not isinstance(key, str) or "/" in key:
      raise ValueError(
        "a key of a tree must be a string without '/', got "
        f"{schema.quote(key)}; rename it"
      )
  return jax.tree_util.keystr(path, simple=True, separator="/")


def _array(leaf: Any) -> Any:
  """Give a Python scalar a shape and a dtype; leave arrays as they are."""
  return leaf if hasattr(leaf, "shape") else jnp.asarray(leaf)


def _spec(leaf: Any) -> str:
  leaf = _array(leaf)
  return f"{leaf.dtype}[{','.join(str(n) for n in leaf.shape)}]"


def _alike(a: Any, b: Any, check_dtype: bool) -> bool:
  a, b = _array(a), _array(b)
  same_dtype = a.dtype == b.dtype or not check_dtype
  return tuple(a.shape) == tuple(b.shape) and same_dtype
