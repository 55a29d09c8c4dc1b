"""Released weights in, and out again: one component of a pipeline at a time.

`load` reads a folder of diffusers or transformers, `save` writes one that they
read back, tensor for tensor the same; torch is not needed. `check` is the first
half of `load`, which reads no array. `save_orbax` writes
an Orbax checkpoint beside the same config.json, and `load` reads that too:
`python -m vdit_jax.convert SRC DST` goes from either to the other.

The class that config.json names is one of a family's: how to build the module,
and the table from checkpoint keys to params. `describe` tells which, and its
sizes.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath

from vdit_jax import schema, trees, writing
from vdit_jax.convert import (
  checkpoints,
  configs,
  files,
  folders,
  placement,
  rules,
)
from vdit_jax.models import families
from vdit_jax.models import system as systems

MAX_SHARD_BYTES = 5 * 10**9
_PARAMS = "params"  # the checkpoint's folder, beside config.json
_BLOCK, _STRIDE = 2**16, 2**24  # bytes; see `fingerprint`


@dataclasses.dataclass(frozen=True)
class Loaded:
  """A network with its weights.

  Attributes:
    module: linen; `module.apply({"params": params}, ...)`.
    params: nested dicts of arrays.
    config: what config.json says.
  """

  module: nn.Module
  params: dict[str, Any]
  config: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Checked:
  """A component that is whole, its weights not read yet.

  Attributes:
    module: the network.
    config: what config.json says.
    read: () -> params, onto the mesh that is set then, or the default device.
  """

  module: nn.Module
  config: dict[str, Any]
  read: Callable[[], dict[str, Any]]


def describe(
  path: epath.PathLike, kind: str, dtype: Any
) -> tuple[systems.Network, Any]:
  """Tell what a folder holds by its config.json; no weights are read.

  Args:
    path: folder of one component.
    kind: that it must be of: "denoiser", "autoencoder", "text_encoder", ...
    dtype: that it is to compute in.

  Returns:
    The kind of network that it is, and its Config.

  Raises:
    ValueError: if it is of another kind, or its class is not known.
  """
  folder = writing.absolute(path)
  config, where = folders.read_config(folder), str(folder / folders.CONFIG)
  name = folders.class_name(config, where)
  found = families.of_class(name)
  if found is None or found.kind != kind:
    raise ValueError(
      f"{folder} is of class {schema.quote(name)}, which is no known "
      f"{kind.replace('_', ' ')}; give the folder of one of "
      f"{', '.join(families.classes(kind))}"
    )
  return found, found.classes[name].describe(config, dtype, where)


def load(
  path: epath.PathLike, *, param_dtype: Any = None, dtype: Any = None
) -> Loaded:
  """Load one component onto the current mesh, or the default device.

  Args and errors are those of `check`; no array has been read then.
  """
  checked = check(path, param_dtype=param_dtype, dtype=dtype)
  return Loaded(checked.module, checked.read(), checked.config)


def check(
  path: epath.PathLike, *, param_dtype: Any = None, dtype: Any = None
) -> Checked:
  """Find one component and compare its files with what its config asks for.

  Args:
    path: folder with config.json and weights: safetensors or, if there are
      none, a torch state dict; in one file or in shards with an index. Or
      what `save_orbax` wrote.
    param_dtype: of the floating-point params; None is as stored.
    dtype: of computations; None is `param_dtype`, and if that is None too,
      the dtype that most of the weights are stored in.

  Raises:
    ValueError: if the folder is not of a known component, a file is damaged,
      or the weights are not just those that the config asks for: lists all
      that is missing, left over, of another shape or dtype.
  """
  folder = writing.absolute(path)
  config, where = folders.read_config(folder), str(folder / folders.CONFIG)
  component = _component(config, where)
  param_dtype = _float("param_dtype", param_dtype)
  given = configs.read(where, config, component.fields)
  stored = _stored(folder)
  configs.check_held(where, given, component.fields, stored)
  compute = _float("dtype", dtype)
  if compute is None:
    compute = _commonest(stored) if param_dtype is None else param_dtype
  module = component.build(config, compute, where)
  check_files = _check_checkpoint if is_orbax(folder) else _check_files
  read = check_files(folder, component, module, stored, param_dtype)
  return Checked(module, config, lambda: trees.unflatten(read()))


def stored_dtype(path: epath.PathLike) -> np.dtype:
  """Tell the floating-point dtype that most of a component is stored in."""
  return _commonest(_stored(writing.absolute(path)))


def save(
  loaded: Loaded,
  path: epath.PathLike,
  *,
  max_shard_bytes: int = MAX_SHARD_BYTES,
) -> None:
  """Write a folder that diffusers or transformers reads, whole or not at all.

  Args:
    loaded: what `load` gave, or the same with other params; they are written
      in the dtypes that they have.
    path: the folder to make.
    max_shard_bytes: more than this is written as several files.

  Raises:
    ValueError: if the path is not free or the params are not the module's.
  """
  component = _component(loaded.config, "loaded.config")
  params = _checked_params(component, loaded)
  slots = rules.keys(component.rules(loaded.module), params)
  stem = folders.stem(loaded.config)
  with folders.replacing(path) as folder, _bar("save", len(slots)) as bar:
    rows = files.aligned(
      {
        key: placement.Row(slot, params[slot.path], bar.update)
        for key, slot in slots.items()
      }
    )
    if jax.process_index() == 0:
      folders.write_tensors(folder, stem, rows, max_shard_bytes)
      folders.write_config(folder, _with_dtype(loaded.config, params))
    else:  # all processes gather, in one order, what is spread over them
      for row in rows.values():
        row.read()


def save_orbax(loaded: Loaded, path: epath.PathLike) -> None:
  """Write an Orbax checkpoint that `load` reads, whole or not at all.

  Args:
    loaded: as of `save`.
    path: the folder to make: config.json and `params/`.
  """
  component = _component(loaded.config, "loaded.config")
  params = _checked_params(component, loaded)
  with folders.replacing(path) as folder:
    checkpoints.write(folder / _PARAMS, loaded.params)
    if jax.process_index() == 0:
      folders.write_config(folder, _with_dtype(loaded.config, params))


def fingerprint(
  path: epath.PathLike, beside: Sequence[epath.PathLike] = ()
) -> str:
  """Name a component by its content.

  It is a SHA-256 of the files beside it, config.json and, of each file of
  weights, its size and the first 64 KiB of every 16 MiB. The whole of a text
  encoder, 10 to 19 GB, would take minutes to read from gs://; its matrices are
  of 32 MiB and more, so each of them is looked at.

  Args:
    path: its folder.
    beside: files that are part of it.
  """
  folder = writing.absolute(path)
  folders.read_config(folder)  # refuses a folder that is not there
  digest = hashlib.sha256()
  for file in (*beside, folder / folders.CONFIG):
    digest.update(hashlib.sha256(epath.Path(file).read_bytes()).digest())
  for file in _weights(folder):
    size = file.stat().length
    digest.update(size.to_bytes(8, "little"))
    with file.open("rb") as opened:
      for start in range(0, size, _STRIDE):
        opened.seek(start)
        digest.update(opened.read(_BLOCK))
  return digest.hexdigest()[:16]


def is_orbax(path: epath.PathLike) -> bool:
  """Whether a folder is what `save_orbax` wrote: it has `params/_METADATA`."""
  return checkpoints.is_one(writing.absolute(path) / _PARAMS)


def _stored(folder: epath.Path) -> Mapping[str, Any]:
  """Find what a component's weights are stored as, by key or path."""
  if is_orbax(folder):
    return checkpoints.stored(folder / _PARAMS)
  return folders.read_tensors(folder)


def _weights(folder: epath.Path) -> list[epath.Path]:
  """List the files of a component's weights, in whichever layout, in order."""
  if is_orbax(folder):
    return list(_files(folder / _PARAMS))
  return sorted({x.path for x in folders.read_tensors(folder).values()})


def _files(folder: epath.Path) -> Iterator[epath.Path]:
  for path in sorted(folder.iterdir()):
    yield from _files(path) if path.is_dir() else (path,)


def _component(config: Mapping[str, Any], where: str) -> rules.Component:
  name = folders.class_name(config, where)
  found = families.component(name)
  if found is None:
    raise ValueError(
      f"{where} is of class {schema.quote(name)}, which is not known; known "
      f"are {', '.join(families.classes())}"
    )
  return found


def _float(name: str, dtype: Any) -> np.dtype | None:
  if dtype is None:
    return None
  dtype = jnp.dtype(dtype)
  if not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f"{name} must be a floating-point type, got {dtype}")
  return dtype


def _commonest(stored: Mapping[str, Any]) -> np.dtype:
  """The floating-point dtype that most bytes are stored in."""
  sizes = collections.Counter()
  for tensor in stored.values():
    if jnp.issubdtype(tensor.dtype, jnp.floating):
      sizes[jnp.dtype(tensor.dtype)] += files.num_bytes(tensor)
  if not sizes:
    raise ValueError("none of the weights is of a floating-point dtype")
  return sizes.most_common(1)[0][0]


def _check_files(
  folder: epath.Path,
  component: rules.Component,
  module: nn.Module,
  stored: Mapping[str, files.Tensor],
  param_dtype: np.dtype | None,
) -> Callable[[], dict[str, jax.Array]]:
  """Refuse files of other weights; return what reads them."""
  if component.prefix and all(k.startswith(component.prefix) for k in stored):
    stored = {k.removeprefix(component.prefix): v for k, v in stored.items()}
  for copy, key in component.copies.items():
    if copy in stored and key not in stored:
      stored = {key if k == copy else k: v for k, v in stored.items()}
  boxed = _abstract(component, module, folder)
  slots = rules.check(
    component.rules(module),
    trees.flatten(placement.unboxed(boxed)),
    stored,
    ignored=component.ignored,
    mixed=param_dtype is not None,
    what=f"path {folder}",
  )
  found = {slot.path: stored[key] for key, slot in slots.items()}

  def read():
    like = placement.like(boxed, found, param_dtype)
    bad: list[str] = []
    with _bar("load", len(slots)) as bar:
      params = {
        path: placement.fill(group, stored, like[path], bad, bar.update)
        for path, group in rules.by_path(slots).items()
      }
    trees.raise_not_finite(f"path {folder}", list(dict.fromkeys(bad)))
    return params

  return read


def _check_checkpoint(
  folder: epath.Path,
  component: rules.Component,
  module: nn.Module,
  stored: Mapping[str, Any],
  param_dtype: np.dtype | None,
) -> Callable[[], dict[str, jax.Array]]:
  """Refuse a checkpoint of other weights; return what reads it."""
  boxed = _abstract(component, module, folder)
  trees.check_match(
    placement.unboxed(boxed),
    trees.unflatten(stored),
    f"checkpoint {folder / _PARAMS}",
    check_dtype=False,
    remedy="it is not of this config.json; convert again",
  )

  def read():
    like = placement.like(boxed, stored, param_dtype)
    with _bar("load", len(like)) as bar:
      return checkpoints.read(folder / _PARAMS, like, bar.update)

  return read


def _abstract(
  component: rules.Component, module: nn.Module, folder: epath.Path
) -> Any:
  """Shapes of a network's params; refuse a config that gives it none."""
  try:
    return component.abstract(module)
  # Sizes that do not go together show up as errors of any type.
  except Exception as error:
    reason = f"{type(error).__name__}: {str(error)[:200]}"
    raise ValueError(
      f"{folder / folders.CONFIG} describes no network ({reason}); download it "
      "again"
    ) from error


def _checked_params(
  component: rules.Component, loaded: Loaded
) -> dict[str, Any]:
  """Return the params by path, if they are just the module's."""
  trees.check_match(
    placement.unboxed(component.abstract(loaded.module)),
    loaded.params,
    "loaded.params",
    check_dtype=False,
    remedy="give the params of loaded.module",
  )
  return trees.flatten(loaded.params)


def _with_dtype(
  config: Mapping[str, Any], params: Mapping[str, Any]
) -> dict[str, Any]:
  """Let a config that names the weights' dtype name the one they have."""
  dtypes = {str(x.dtype) for x in params.values()}
  names = [k for k in ("torch_dtype", "dtype") if k in config]
  if len(dtypes) != 1:
    return dict(config)
  return {**config, **dict.fromkeys(names, *dtypes)}


def _bar(what: str, total: int) -> tqdm.tqdm:
  return tqdm.tqdm(total=total, desc=what, unit="tensor", mininterval=1)
