"""Files of low-rank adapters, and the networks of a pipeline that they are of.

  FILE:0.8, FILE:1/256, FILE:transformer_2  --read-->  factors by network

Several files are summed, each with its scale. Factors stay beside the weights
that they are of (`nn.lora.attach`), which may be bfloat16.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath
from jax.sharding import NamedSharding, PartitionSpec

from vdit_jax import schema, trees, writing
from vdit_jax.convert import adapters, folders
from vdit_jax.models import families, networks
from vdit_jax.models import system as systems
from vdit_jax.nn import lora
from vdit_jax.weights import component

FILE = adapters.FILE
# What programs that know of one denoiser put before its layers.
_DENOISER = ("", "diffusion_model.", "model.diffusion_model.", "lora_unet_")


@dataclasses.dataclass(frozen=True)
class File:
  """A file of adapters, and what it counts.

  Attributes:
    path: of the file, or of its folder.
    scale: what its product counts beside what the file says.
    network: folder of the network that it is for, such as "transformer_2";
      "" is as its keys say.
  """

  path: epath.PathLike
  scale: float = 1.0
  network: str = ""

  def __post_init__(self):
    schema.check(
      f"lora {self.path}", vars(self), {"scale": schema.Field(float)}
    )


Given = epath.PathLike | File | Sequence[epath.PathLike | File]


def parse(given: Given) -> list[File]:
  """Read which files are meant: paths, each perhaps with ":SCALE", ":NETWORK".

  A text may be several, with commas between.
  """
  if isinstance(given, File):
    return [given]
  if isinstance(given, str) and not _is_here(given):
    return [_parse(text) for text in given.split(",")]
  if isinstance(given, Sequence) and not isinstance(given, str):
    return [file for one in given for file in parse(one)]
  return [File(given)]


def read(
  given: Given, system: systems.System, folder_of: Mapping[str, epath.Path]
) -> dict[str, Any]:
  """Read files of adapters and add them up.

  Args:
    given: see `parse`.
    system: of the networks.
    folder_of: the networks that there are, by name.

  Returns:
    Trees of `nn.lora` by network, float32 numpy, whose product counts once.

  Raises:
    ValueError: for a file that is not of these networks; see
      `convert.adapters.read`.
  """
  total: dict[str, Any] = {}
  for file in parse(given):
    found = adapters.read(file.path, bases(system, folder_of, file.network))
    for name, tree in found.items():
      tree = lora.scaled(tree, file.scale)
      _log(file, name, tree)
      total[name] = lora.add(total[name], tree) if name in total else tree
  return total


def write(
  path: epath.PathLike,
  system: systems.System,
  folder_of: Mapping[str, epath.Path],
  factors: Mapping[str, Any],
  trained_on: Mapping[str, str] | None = None,
) -> None:
  """Write a folder that diffusers loads as LoRA, whole or not at all.

  Args:
    path: the folder to make, with `FILE`.
    system: of the networks.
    folder_of: the networks that they are of, by name.
    factors: of each of them, a tree of `nn.lora` whose product counts once.
    trained_on: fingerprints of their weights, by name; None reads them.
  """
  found = bases(system, folder_of)
  for name, weights in (trained_on or {}).items():
    known = functools.partial(str, weights)
    found[name] = dataclasses.replace(found[name], weights=known)
  adapters.write(path, found, factors)


def bases(
  system: systems.System, folder_of: Mapping[str, epath.Path], only: str = ""
) -> dict[str, adapters.Base]:
  """Describe the networks that adapters may be of, by name.

  Args:
    system: of the networks.
    folder_of: the networks that there are, by name.
    only: folder of the one that they are for, "" for any: keys that programs
      write of the first denoiser are then of that.
  """
  if system.adapters is None:
    raise ValueError(f"lora must be left out: {system.name} takes no adapters")
  places = {
    name: system.places[name].folder
    for name in folder_of
    if networks.kind_of(name) in ("denoiser", "text_encoder")
  }
  if only and only not in places.values():
    raise ValueError(
      f"lora must be FILE, FILE:SCALE or FILE:SCALE:NETWORK, but "
      f"{schema.quote(only)} is no number and no network; "
      f"{schema.near(only, places.values())}"
    )
  return {
    name: _base(system, name, folder_of[name], only)
    for name, folder in places.items()
    if only in ("", folder)
  }


def attach(params: Any, factors: Any) -> Any:
  """Put adapters beside the kernels of loaded params, placed as those are."""
  kernels = trees.flatten(params)
  placed = {
    path: _place(x, path, kernels[f"{path[:-2]}/kernel"])
    for path, x in trees.flatten(factors).items()
  }
  return lora.attach(params, trees.unflatten(placed))


def _parse(text: str) -> File:
  """Read PATH, PATH:SCALE, PATH:NETWORK or PATH:SCALE:NETWORK."""
  path, scale, network = text.strip(), 1.0, ""
  for _ in range(2):
    head, colon, tail = path.rpartition(":")
    if not colon or tail.startswith("//") or _is_here(path):
      break
    number = _number(tail)
    if number is not None:
      path, scale = head, number
    elif tail.isidentifier():
      path, network = head, tail
    else:
      break
  if not path or path.endswith(":"):
    raise ValueError(
      f"lora must be FILE, FILE:SCALE or FILE:SCALE:NETWORK, got "
      f"{schema.quote(text)}"
    )
  return File(path, scale, network)


def _is_here(path: str) -> bool:
  """Whether a whole text is the path of a local file, whatever is in it."""
  local = bool(path) and not writing.is_remote(path)
  return local and writing.absolute(path).exists()


def _number(text: str) -> float | None:
  """Read 0.8 or 1/256; None for what is no number."""
  try:
    above, _, below = text.partition("/")
    return float(above) / float(below or 1)
  except ZeroDivisionError:
    return math.inf
  except ValueError:
    return None


def _base(
  system: systems.System, name: str, folder: epath.Path, only: str
) -> adapters.Base:
  """Describe one network and what its keys begin with."""
  config = folders.read_config(folder)
  known = families.component(folders.class_name(config))
  if known is None:
    raise ValueError(f"{folder} is of a class that is not known")
  kind, own = networks.kind_of(name), system.places[name].folder
  prefixes = [f"{own}.", f"lora_{own}_"]
  if kind == "denoiser" or only:
    first = system.places["denoiser"].folder
    prefixes += _DENOISER + ((f"{first}.", f"lora_{first}_") if only else ())
  if kind == "text_encoder":
    number = list(system.text).index(name) + 1
    prefixes += [f"lora_te{number}_"] + ["lora_te_"] * (number == 1)
  return adapters.Base(
    known,
    config,
    str(folder),
    functools.partial(component.fingerprint, folder),
    tuple(dict.fromkeys(prefixes)),
    system.adapters.spellings if kind == "denoiser" else (),
  )


def _place(factor: Any, path: str, kernel: jax.Array) -> jax.Array:
  """Put a factor where its kernel is, the rank whole on each device."""
  where = kernel.sharding
  if not isinstance(where, NamedSharding):
    return jnp.asarray(factor)
  names = list(where.spec) + [None] * (kernel.ndim - len(where.spec))
  names[-1 if path.endswith("/a") else -2] = None
  placed = NamedSharding(where.mesh, PartitionSpec(*names))
  return jax.device_put(factor, placed)


def _log(file: File, name: str, tree: Any) -> None:
  paths = lora.paths(tree)
  ranks = {x.shape[-1] for k, x in trees.flatten(tree).items() if k[-1] == "a"}
  logging.info(
    "lora %s: %d layers of %s, rank %s, scale %g",
    *(file.path, len(paths), name, max(ranks), file.scale),
  )
