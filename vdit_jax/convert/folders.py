"""A component's folder: config.json, and its weights in one file or several.

The layout is that of diffusers (`diffusion_pytorch_model.safetensors`) and of
transformers (`model.safetensors`); shards come with an index, which says in
which file each tensor is.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from etils import epath
from jax.experimental import multihost_utils

from vdit_jax import inputs, schema, strict_json, trees, writing
from vdit_jax.convert import files, pickles

CONFIG = "config.json"
PIPELINE = "model_index.json"
_STEMS = "diffusion_pytorch_model|pytorch_model|model"
_SINGLE = re.compile(rf"(?:{_STEMS})(?:\.(\w+))?\.(safetensors|bin|pt|pth)")
_INDEX = re.compile(
  rf"(?:{_STEMS})\.(safetensors|bin)\.index(?:\.(\w+))?\.json"
)

# How a config.json says its class: the first of these that it has.
_NAME = schema.Field(str, 1, 100)
_CLASS = {
  "_class_name": _NAME,
  "architectures": schema.Field(list, 1, 1, each=_NAME),
  "model_type": _NAME,
}
_MOST_NAMED = 20  # files in a message


def read_config(folder: epath.Path) -> dict[str, Any]:
  """Read a component's config.json.

  Raises:
    ValueError: if it is not there: says what the folder is instead.
  """
  if (folder / CONFIG).exists():
    return inputs.read_json(folder / CONFIG)
  if not folder.exists():
    raise ValueError(
      f"path {folder} does not exist; a model of the hub is downloaded with "
      "`hf download NAME --local-dir=DIR`, and its component is a folder there"
    )
  names = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else []
  if PIPELINE in names:
    parts = [name for name in names if (folder / name / CONFIG).exists()]
    raise ValueError(
      f"path {folder} is a whole pipeline; give one of its components: "
      f"{_listed(parts)}"
    )
  raise ValueError(
    f"path {folder} has no {CONFIG}, it holds {_listed(names)}; "
    "give the folder of one component"
  )


def write_config(folder: epath.Path, config: Mapping[str, Any]) -> None:
  """Write a component's config.json."""
  writing.write(folder / CONFIG, strict_json.dumps(config, indent=2) + "\n")


def class_name(config: Mapping[str, Any], where: str = CONFIG) -> str:
  """Name of the class that a config.json is of.

  diffusers says it as `_class_name`, transformers as its one of
  `architectures`, others as `model_type` alone.
  """
  schema.check(where, config, _CLASS)
  if name := next((k for k in _CLASS if k in config), None):
    found = config[name]
    return found if isinstance(found, str) else found[0]
  raise ValueError(
    f"{where} has neither _class_name nor architectures; it is not of one "
    "component of diffusers or transformers"
  )


def is_component(config: Mapping[str, Any]) -> bool:
  """Whether a config.json is of a component, and not of a run of ours."""
  return any(name in config for name in _CLASS)


def holds_component(folder: epath.Path) -> bool:
  """Whether a folder is of a component, by its config.json."""
  config = folder / CONFIG
  return config.exists() and is_component(inputs.read_json(config))


def stem(config: Mapping[str, Any]) -> str:
  """What the weights' files of a config's library are called."""
  return "diffusion_pytorch_model" if "_class_name" in config else "model"


def read_tensors(folder: epath.Path) -> dict[str, files.Tensor]:
  """Find a component's tensors by key, whichever files they are in.

  Safetensors go before pickles, and files without a variant (`fp16`) before
  those with one.
  """
  path = _weights(folder)
  return _read_index(path) if path.suffix == ".json" else _read(path)


def write_tensors(
  folder: epath.Path,
  stem: str,
  tensors: Mapping[str, files.Readable],
  max_shard_bytes: int,
) -> None:
  """Write tensors as one safetensors file, or as shards with an index.

  Args:
    folder: where to.
    stem: of the files' names, "diffusion_pytorch_model" or "model".
    tensors: by key.
    max_shard_bytes: a file holds at most as much, or one tensor.
  """
  shards: list[dict[str, files.Readable]] = []
  left = -1
  for key, tensor in tensors.items():
    size = files.num_bytes(tensor)
    if size > left:
      shards.append({})
      left = max_shard_bytes
    shards[-1][key] = tensor
    left -= size
  if len(shards) == 1:
    files.write(folder / f"{stem}.safetensors", shards[0])
    return
  place = {}
  for i, shard in enumerate(shards):
    name = f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors"
    files.write(folder / name, shard)
    place.update(dict.fromkeys(shard, name))
  total = sum(files.num_bytes(tensor) for tensor in tensors.values())
  index = {"metadata": {"total_size": total}, "weight_map": place}
  text = strict_json.dumps(index, indent=2, sort_keys=True) + "\n"
  writing.write(folder / f"{stem}.safetensors.index.json", text)


@contextlib.contextmanager
def replacing(path: epath.PathLike) -> Iterator[epath.Path]:
  """Give a folder to write to, which becomes `path` if all goes well.

  With several processes all enter; the first makes the folder and renames it.
  """
  first = jax.process_index() == 0
  with writing.folder(path, first=first, wait=_wait) as folder:
    yield folder


def _wait(name: str) -> None:
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"convert_folder_{name}")


def _weights(folder: epath.Path) -> epath.Path:
  """Choose the file, or the index of files, that holds the weights."""
  names = sorted(p.name for p in folder.iterdir())
  ranks: dict[tuple[bool, bool], list[str]] = {}
  for name in names:
    if found := _SINGLE.fullmatch(name):
      variant, kind = found.groups()
    elif found := _INDEX.fullmatch(name):
      kind, variant = found.groups()
    else:
      continue
    rank = (kind != "safetensors", variant is not None)
    ranks.setdefault(rank, []).append(name)
  if not ranks:
    raise ValueError(
      f"path {folder} holds no weights and no index of them, only "
      f"{_listed(names)}; download it again"
    )
  best = ranks[min(ranks)]
  if len(best) > 1:
    raise ValueError(
      f"path {folder} holds weights more than once: {_listed(best)}; keep "
      "the one that is meant"
    )
  return folder / best[0]


def _read(path: epath.Path) -> dict[str, files.Tensor]:
  return (files if path.suffix == ".safetensors" else pickles).read(path)


def _read_index(path: epath.Path) -> dict[str, files.Tensor]:
  """Find the tensors of all files of an index; they must be just those."""
  index = inputs.read_json(path)
  place = index["weight_map"] if "weight_map" in index else None
  if not isinstance(place, dict) or not all(map(_plain, place.values())):
    raise inputs.damaged(path, "its weight_map is not a file name for each key")
  names = sorted(set(place.values()))
  if absent := [n for n in names if not (path.parent / n).exists()]:
    raise ValueError(
      f"{path} names files that are missing: {_listed(absent)}; download them"
    )
  tensors: dict[str, files.Tensor] = {}
  problems = []
  for name in names:
    found = _read(path.parent / name)
    wanted = {key for key in place if place[key] == name}
    problems += [f"not in {name}: {k}" for k in sorted(wanted - found.keys())]
    problems += [f"only in {name}: {k}" for k in sorted(found.keys() - wanted)]
    tensors |= found
  if problems:
    what = f"{path} and its files differ; download them again:"
    trees.raise_listed(what, problems)
  return tensors


def _listed(names: Sequence[str]) -> str:
  """Name files, the first of them if they are many."""
  more = [f"and {len(names) - _MOST_NAMED} more"] * (len(names) > _MOST_NAMED)
  shown = [schema.quote(name) for name in names[:_MOST_NAMED]]
  return ", ".join([*shown, *more]) or "nothing"


def _plain(name: Any) -> bool:
  """Whether a file's name stays in its folder and tells what it is."""
  if not isinstance(name, str) or "/" in name or "\\" in name:
    return False
  return name.endswith((".safetensors", ".bin"))
