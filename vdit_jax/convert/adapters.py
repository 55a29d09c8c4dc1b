"""Low-rank adapters in files: those that people have, and ours for diffusers.

A file has two factors a layer, a [r, in] and b [out, r], named after a layer
of a network (`adapter_keys`) and counting what it says (`adapter_scales`). A
family's table of released keys says where they go. What we write is
`pytorch_lora_weights.safetensors`, which diffusers reads: it counts once, with
alpha / r in b, and says of which networks it is.
"""

import dataclasses
import functools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from vdit_jax import schema, trees, writing
from vdit_jax.convert import (
  adapter_keys,
  adapter_scales,
  files,
  folders,
  pickles,
  placement,
  rules,
)
from vdit_jax.nn import lora

FILE = "pytorch_lora_weights.safetensors"
_PEFT_FILE = "adapter_model.safetensors"
_OURS = "vdit_jax"  # entry of the file's metadata: of which networks it is
_PICKLES = ".bin", ".ckpt", ".pt", ".pth"
_MOST_LINES = 20  # of one error
_SAID = {"base": schema.Field(dict), "weights": schema.Field(str, 0, 100)}


@dataclasses.dataclass(frozen=True)
class Base:
  """A network that adapters may be of.

  Attributes:
    component: what is known of its class.
    config: what its config.json says.
    where: it is, for errors.
    weights: tells the fingerprint of its weights.
    prefixes: of its keys in files, the one that is written first; see
      `adapter_keys.places`.
    spellings: how other layouts call its layers.
  """

  component: rules.Component
  config: dict[str, Any]
  where: str
  weights: Callable[[], str]
  prefixes: tuple[str, ...]
  spellings: tuple[Mapping[str, str], ...] = ()

  @functools.cached_property
  def shapes(self) -> dict[str, Any]:
    """Shapes of its params by path."""
    boxed = self.component.abstract(self._module)
    return trees.flatten(placement.unboxed(boxed))

  @functools.cached_property
  def layers(self) -> dict[str, rules.Slot]:
    """Slots of its dense layers' kernels, by their released names."""
    table = self.component.rules(self._module)
    return {
      key.removesuffix(".weight"): slot
      for key, slot in rules.keys(table, self.shapes).items()
      if slot.path.endswith("/kernel") and slot.transform is rules.LINEAR
    }

  @property
  def folder(self) -> str:
    """What pipelines call its folder."""
    return self.prefixes[0].rstrip(".")

  @functools.cached_property
  def _module(self) -> Any:
    return self.component.build(self.config, np.dtype(np.float32))


@dataclasses.dataclass(frozen=True)
class _Array:
  """Values that are there, as `files.write` takes them."""

  values: np.ndarray

  @property
  def dtype(self) -> np.dtype:
    return self.values.dtype

  @property
  def shape(self) -> tuple[int, ...]:
    return self.values.shape

  def read(self) -> np.ndarray:
    return self.values


def write(
  path: epath.PathLike, bases: Mapping[str, Base], adapters: Mapping[str, Any]
) -> None:
  """Write a folder with `FILE`, whole or not at all.

  Args:
    path: the folder to make.
    bases: the networks that they are of, by name.
    adapters: a tree of `nn.lora` for each of them, arrays of one process whose
      product counts once.
  """
  tensors, said = {}, {}
  for name, tree in adapters.items():
    base = bases[name]
    lora.check(trees.unflatten(base.shapes), tree, f"adapters of {name}")
    tensors |= _tensors(base, tree)
    said[base.folder] = {"base": base.config, "weights": base.weights()}
  with folders.replacing(path) as folder:
    files.write(folder / FILE, tensors, {_OURS: json.dumps(said)})


def read(path: epath.PathLike, bases: Mapping[str, Base]) -> dict[str, Any]:
  """Read adapters of networks.

  Layers or blocks that the file leaves out get factors of zero, and so does
  what a layer's rank is less than that of its stack.

  Args:
    path: the file, or a folder that has one.
    bases: the networks that they may be of, by name.

  Returns:
    The adapters of each network that has some, float32 numpy, whose product
    counts once.

  Raises:
    ValueError: if they are of other networks, or the file has what is not
      plain adapters; lists all that is wrong.
  """
  path = _find(path)
  if path.suffix in _PICKLES:
    tensors, metadata = pickles.read(path), {}
  else:
    tensors, metadata = files.read(path), files.metadata(path)
  _check_same(path, bases, metadata)
  scale = adapter_scales.said_by(path, metadata)
  bases = {
    name: base
    for name, base in bases.items()
    if adapter_keys.may_be_of(tensors, base.prefixes)
  } or bases
  known = [
    named
    for name, base in bases.items()
    for named in adapter_keys.places(
      name, base.layers, base.prefixes, base.spellings
    )
  ]
  found, problems = adapter_keys.gather(tensors, known)
  if not found and not problems:
    problems.append("it has no factors")
  _raise(path, bases, problems)
  rows, adapters = _rows(path, bases, found, scale), {}
  for name in {row.place.network: None for row in rows}:
    own = [row for row in rows if row.place.network == name]
    adapters[name] = _stack(bases[name].shapes, own)
  return adapters


@dataclasses.dataclass(frozen=True)
class _Row:
  """Factors of a layer, a [in, r] and b [r, out], whose product counts once."""

  place: adapter_keys.Place
  a: np.ndarray
  b: np.ndarray


def _tensors(base: Base, adapters: Any) -> dict[str, _Array]:
  """Name the factors of a network as diffusers does."""
  factors, layers = trees.flatten(adapters), base.layers
  paths = {slot.path.removesuffix("/kernel") for slot in layers.values()}
  if missing := sorted(set(lora.paths(adapters)) - paths):
    raise ValueError(
      f"{', '.join(missing)} have no place in {FILE}: they are no dense layers "
      f"of a {folders.class_name(base.config)}; merge the adapters instead"
    )
  tensors = {}
  for stem, slot in layers.items():
    path = slot.path.removesuffix("/kernel")
    for name, factor in (("A", "a"), ("B", "b")):
      if f"{path}/{factor}" in factors:
        x = np.asarray(factors[f"{path}/{factor}"])
        x = (x if slot.row is None else x[slot.row]).T
        key = f"{base.prefixes[0]}{stem}.lora_{name}.weight"
        tensors[key] = _Array(np.ascontiguousarray(x, np.float32))
  return tensors


def _find(path: epath.PathLike) -> epath.Path:
  """Find the file of adapters that a path means."""
  path = writing.absolute(path)
  if not path.exists():
    raise ValueError(f"lora {path} does not exist; give the file or its folder")
  if not path.is_dir():
    return path
  names = sorted(p.name for p in path.iterdir())
  for own in (FILE, _PEFT_FILE):
    if own in names:
      return path / own
  found = [name for name in names if name.endswith(".safetensors")]
  if len(found) != 1:
    raise ValueError(
      f"lora {path} must have {FILE}, {_PEFT_FILE} or one other file of "
      f"safetensors, but has {schema.quote(names)}; give the file"
    )
  return path / found[0]


def _check_same(
  path: epath.Path, bases: Mapping[str, Base], metadata: Mapping[str, str]
) -> None:
  """Refuse adapters of another shape of network; warn of other weights."""
  if _OURS not in metadata:
    return
  where = f"lora {path}: {_OURS}"
  said = adapter_scales.parse(where, metadata[_OURS])
  if "base" in said:  # of a denoiser, before there were those of others
    said = {"": said}
  for base in bases.values():
    for folder in {x.rstrip(".") for x in base.prefixes} & set(said):
      schema.check(where, said, {folder: schema.Field(dict)})
      entry = said[folder]
      if missing := sorted(set(_SAID) - set(entry)):
        raise ValueError(f"{where} must say {missing}; {adapter_scales.AGAIN}")
      schema.check(where, entry, _SAID, adapter_scales.AGAIN)
      _check_base(path, base, entry)


def _check_base(path: epath.Path, base: Base, said: Mapping[str, Any]) -> None:
  if said["base"] != base.config:
    theirs, ours = _differences(base, said["base"])
    if theirs != ours:
      raise ValueError(
        f"lora {path} is of another model: it is of one with {theirs}, but "
        f"{base.where} has {ours}; take the model that it was trained on"
      )
  if said["weights"] != (weights := base.weights()):
    logging.warning(
      "%s was trained on weights %s, and %s has weights %s of the same shape",
      path,
      said["weights"],
      base.where,
      weights,
    )


def _differences(base: Base, config: dict[str, Any]) -> tuple[str, str]:
  """Say in what a network differs from another by its config.json."""
  names = [folders.class_name(c) for c in (config, base.config)]
  if names[0] != names[1]:
    return schema.quote(names[0]), schema.quote(names[1])
  cfgs = [
    dataclasses.asdict(base.component.build(c, np.dtype(np.float32)).cfg)
    for c in (config, base.config)
  ]
  other = [k for k in cfgs[0] if cfgs[0][k] != cfgs[1][k]]
  theirs, ours = (
    ", ".join(f"{k}={schema.quote(cfg[k])}" for k in other) for cfg in cfgs
  )
  return theirs, ours


def _rows(
  path: epath.Path,
  bases: Mapping[str, Base],
  found: Sequence[adapter_keys.Found],
  scale: adapter_scales.Scale,
) -> list[_Row]:
  """Check and read the factors of all layers."""
  shapes = {name: base.shapes for name, base in bases.items()}
  checked = [
    (layer, _misfit(layer, shapes[layer.place.network][layer.place.slot.path]))
    for layer in found
  ]
  _raise(path, bases, [line for _, line in checked if line])
  rows, problems = [], []
  for layer in found:
    place, rank = layer.place, layer.tensors["a"].shape[0]
    a, b, *alpha = (
      _float32(layer.tensors[part])
      for part in ("a", "b", "alpha")
      if part in layer.tensors
    )
    said = [adapter_scales.of_alpha(x, rank) for x in alpha]
    said += [scale(place.prefix, place.layer, rank)]
    said = [x for x in said if x is not None] or [1.0]
    with np.errstate(over="ignore", invalid="ignore"):
      row = _Row(place, a.T, b.T * said[0])
    problems += _wrong(row, said)
    rows.append(row)
  _raise(path, bases, problems)
  return rows


def _misfit(layer: adapter_keys.Found, kernel: Any) -> str:
  """Say why tensors are no factors of a layer; "" if they are."""
  place, tensors = layer.place, layer.tensors
  name = f"{place.prefix}{place.layer}"
  if missing := {"a", "b"} - set(tensors):
    return f"half a pair: {name} has no {' and no '.join(sorted(missing))}"
  a, b = tensors["a"], tensors["b"]
  fan_in, out = kernel.shape[-2:]
  if len(a.shape) != 2 or (a.shape[1:], b.shape) != (
    (fan_in,),
    (out, a.shape[0]),
  ):
    return (
      f"differs: {name} A {schema.quote(tuple(a.shape))}, B "
      f"{schema.quote(tuple(b.shape))}; the layer is {fan_in} to {out}"
    )
  if not 1 <= a.shape[0] <= lora.MOST_RANK:
    return f"rank {a.shape[0]} of {name} is not from 1 to {lora.MOST_RANK}"
  floats = {a.dtype.kind, b.dtype.kind} <= {"f", "V"}  # V is bfloat16's
  return "" if floats else f"not of floats: {name} {a.dtype}, {b.dtype}"


def _float32(tensor: files.Readable) -> np.ndarray:
  """Read a tensor; what is too large for float32 is not finite."""
  with np.errstate(over="ignore"):
    return np.asarray(tensor.read(), np.float32)


def _wrong(row: _Row, counts: Sequence[float]) -> Iterator[str]:
  """Say what is wrong with the numbers of a layer's factors."""
  name = f"{row.place.prefix}{row.place.layer}"
  if not all(math.isfinite(x) and x > 0 for x in counts):
    yield f"alpha of {name} is no positive number"
  elif not math.isclose(min(counts), max(counts), rel_tol=1e-3):
    said = " and ".join(f"{x:g}" for x in counts)
    yield f"{name} counts {said} times, by alpha and by metadata"
  for factor, x in (("A", row.a), ("B", row.b)):
    if not np.isfinite(x).all():
      yield f"not finite: {factor} of {name}"


def _stack(shapes: Mapping[str, Any], rows: Sequence[_Row]) -> dict[str, Any]:
  """Stack a network's factors as its kernels are."""
  by_path: dict[str, list[_Row]] = {}
  for row in rows:
    by_path.setdefault(row.place.slot.path, []).append(row)
  flat = {}
  for path, own in by_path.items():
    *stack, fan_in, out = shapes[path].shape
    rank = max(row.a.shape[1] for row in own)
    a = np.zeros((*stack, fan_in, rank), np.float32)
    b = np.zeros((*stack, rank, out), np.float32)
    for row in own:
      at = () if row.place.slot.row is None else row.place.slot.row
      a[at][..., : row.a.shape[1]] = row.a
      b[at][..., : row.b.shape[0], :] = row.b
    layer = path.removesuffix("/kernel")
    flat |= {f"{layer}/a": a, f"{layer}/b": b}
  return trees.unflatten(flat)


def _raise(
  path: epath.Path, bases: Mapping[str, Base], problems: Sequence[str]
) -> None:
  if problems:
    shown = [*problems[:_MOST_LINES]]
    if len(problems) > len(shown):
      shown.append(f"and {len(problems) - len(shown)} more")
    names = " and ".join(base.where for base in bases.values())
    head = f"lora {path} does not fit {names}, in {len(problems)} places:"
    raise ValueError("\n  ".join([head, *shown]))
