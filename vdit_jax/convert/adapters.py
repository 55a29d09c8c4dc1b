"""Low-rank adapters as the file that diffusers reads and writes.

`pytorch_lora_weights.safetensors` has two tensors a layer, `PREFIX.LAYER.
lora_A.weight` [r, in] and `lora_B.weight` [out, r], named after the keys of a
released network; so a family's table says where they go, and its system what
the prefix is. What we write counts
once (alpha / r is in B), whoever reads it, and says of which network it is.
"""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from vdit_jax import trees, writing
from vdit_jax.convert import files, folders, placement, rules
from vdit_jax.nn import lora

FILE = "pytorch_lora_weights.safetensors"
_KEY = r"(.+)\.lora_([AB])\.weight"  # behind the prefix
_OURS = "vdit_jax"  # entry of the file's metadata: of which network it is
_THEIRS = "lora_adapter_metadata"  # diffusers': peft's LoraConfig, as JSON
# Fields of it that change what the tensors mean, with what they must be.
_PLAIN = dict(
  alpha_pattern={},
  rank_pattern={},
  use_rslora=False,
  use_dora=False,
  bias="none",
)


@dataclasses.dataclass(frozen=True)
class Base:
  """The network that adapters are of.

  Attributes:
    component: what is known of its class.
    config: what its config.json says.
    name: where it is, for errors.
    weights: fingerprint of its weights.
    prefix: of the keys.
  """

  component: rules.Component
  config: dict[str, Any]
  name: str
  weights: str
  prefix: str


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
  path: epath.PathLike, base: Base, adapters: Any, scale: float
) -> None:
  """Write a folder with `FILE`, whole or not at all.

  Args:
    path: the folder to make.
    base: the network that they are of.
    adapters: a tree of `vdit_jax.nn.lora`, arrays of one process.
    scale: what the product of the factors counts.
  """
  _, shapes = _network(base)
  lora.check(trees.unflatten(shapes), adapters, "adapters")
  factors = trees.flatten(lora.scaled(adapters, scale))
  tensors = {}
  for stem, slot in _stems(base).items():
    layer = slot.path.removesuffix("/kernel")
    if f"{layer}/a" not in factors:
      continue
    for name, factor in (("A", "a"), ("B", "b")):
      x = np.asarray(factors[f"{layer}/{factor}"])
      x = x if slot.row is None else x[slot.row]
      key = f"{base.prefix}{stem}.lora_{name}.weight"
      tensors[key] = _Array(np.ascontiguousarray(x.T, np.float32))
  missing = set(lora.paths(adapters)) - {
    slot.path.removesuffix("/kernel") for slot in _stems(base).values()
  }
  if missing:
    raise ValueError(
      f"{sorted(missing)} have no place in {FILE}: they are no dense layers of "
      f"a {folders.class_name(base.config)}; merge the adapters instead"
    )
  said = json.dumps({"base": base.config, "weights": base.weights})
  with folders.replacing(path) as folder:
    files.write(folder / FILE, tensors, {_OURS: said})


def read(path: epath.PathLike, base: Base) -> dict[str, Any]:
  """Read adapters of a network.

  Layers or blocks that the file leaves out get factors of zero.

  Args:
    path: the file, or a folder with `FILE`.
    base: the network that they are to be of.

  Returns:
    The adapters, float32 numpy, whose product counts once.

  Raises:
    ValueError: if they are of another network: names both; or the file is
      not one of plain adapters.
  """
  path = writing.absolute(path)
  path = path / FILE if path.is_dir() else path
  if not path.exists():
    raise ValueError(f"lora {path} does not exist; give the file or its folder")
  tensors, said = files.read(path), files.metadata(path)
  if _OURS in said:
    _check_same(path, base, json.loads(said[_OURS]))
  pairs = _pairs(path, base, tensors)
  return _stack(path, base, pairs, _scale(path, base, said))


def _network(base: Base) -> tuple[Any, dict[str, Any]]:
  """Module, and the shapes of its params by path."""
  module = base.component.build(base.config, np.dtype(np.float32))
  boxed = base.component.abstract(module)
  return module, trees.flatten(placement.unboxed(boxed))


def _stems(base: Base) -> dict[str, rules.Slot]:
  """Slots of the dense layers' kernels by their keys, without `.weight`."""
  module, shapes = _network(base)
  return {
    key.removesuffix(".weight"): slot
    for key, slot in rules.keys(base.component.rules(module), shapes).items()
    if slot.path.endswith("/kernel") and slot.transform is rules.LINEAR
  }


def _check_same(path: epath.Path, base: Base, said: Mapping[str, Any]) -> None:
  """Refuse adapters of another shape of network; warn of other weights."""
  names = [folders.class_name(c) for c in (said["base"], base.config)]
  found = names[:1], names[1:]
  if names[0] == names[1]:
    cfgs = [
      dataclasses.asdict(base.component.build(c, np.dtype(np.float32)).cfg)
      for c in (said["base"], base.config)
    ]
    other = [k for k in cfgs[0] if cfgs[0][k] != cfgs[1][k]]
    found = tuple([f"{k}={cfg[k]!r}" for k in other] for cfg in cfgs)
  if found[0] != found[1]:
    theirs, ours = (", ".join(some) for some in found)
    raise ValueError(
      f"lora {path} is of another model: it is of one with {theirs}, but "
      f"{base.name} has {ours}; take the model that it was trained on"
    )
  if said["weights"] != base.weights:
    logging.warning(
      "%s was trained on weights %s, and %s has weights %s of the same shape",
      path,
      said["weights"],
      base.name,
      base.weights,
    )


def _scale(path: epath.Path, base: Base, said: Mapping[str, str]) -> float:
  """What the product counts by the file's own word; once, if it has none."""
  if _THEIRS not in said:
    return 1.0
  config = {
    key.removeprefix(base.prefix): value
    for key, value in json.loads(said[_THEIRS]).items()
  }
  other = [
    f"{name}={config[name]!r}"
    for name, plain in _PLAIN.items()
    if name in config and config[name] != plain
  ]
  if other:
    raise ValueError(
      f"lora {path} has {', '.join(other)}, which is not done here; merge it "
      "with peft and give the merged model"
    )
  return config["lora_alpha"] / config["r"]


def _pairs(
  path: epath.Path, base: Base, tensors: Mapping[str, files.Tensor]
) -> dict[str, list[tuple[rules.Slot, np.ndarray, np.ndarray]]]:
  """Gather a and b of each param's rows; refuse what is no pair of a layer."""
  stems, found, problems = _stems(base), {}, []
  for key, tensor in tensors.items():
    name = re.fullmatch(re.escape(base.prefix) + _KEY, key)
    if name is None or name[1] not in stems:
      problems.append(f"no such layer: {key} {tuple(tensor.shape)}")
    else:
      found.setdefault(name[1], {})[name[2]] = tensor
  _, shapes = _network(base)
  pairs = {}
  for stem, pair in found.items():
    slot = stems[stem]
    fan_in, out = shapes[slot.path].shape[-2:]
    if set(pair) != {"A", "B"}:
      problems.append(f"half a pair: {stem} has lora_{'and'.join(pair)} alone")
      continue
    a, b = pair["A"].shape, pair["B"].shape
    if len(a) != 2 or (a[1:], b) != ((fan_in,), (out, a[0])):
      problems.append(
        f"differs: {stem} A {a}, B {b}; the layer is {fan_in} to {out}"
      )
      continue
    factors = (np.asarray(pair[n].read(), np.float32).T for n in "AB")
    pairs.setdefault(slot.path, []).append((slot, *factors))
  _raise(path, base, problems)
  return pairs


def _stack(path, base: Base, pairs, scale: float) -> dict[str, Any]:
  """Stack the rows of each param."""
  _, shapes = _network(base)
  flat, problems = {}, []
  for param, rows in pairs.items():
    layer, shape = param.removesuffix("/kernel"), shapes[param].shape
    ranks = {a.shape[1] for _, a, _ in rows}
    if len(ranks) > 1:
      problems.append(f"several ranks: {layer} {sorted(ranks)}")
      continue
    rank = ranks.pop()
    a = np.zeros((*shape[:-1], rank), np.float32)
    b = np.zeros((*shape[:-2], rank, shape[-1]), np.float32)
    for slot, row_a, row_b in rows:
      at = ... if slot.row is None else slot.row
      a[at], b[at] = row_a, scale * row_b
    flat |= {f"{layer}/a": a, f"{layer}/b": b}
  _raise(path, base, problems)
  return trees.unflatten(flat)


def _raise(path: epath.Path, base: Base, problems: Sequence[str]) -> None:
  if problems:
    shown = [*problems[:20], *(["..."] if len(problems) > 20 else [])]
    head = f"lora {path} is not of {base.name}, in {len(problems)} places:"
    raise ValueError("\n  ".join([head, *shown]))
