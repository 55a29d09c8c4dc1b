"""A released pipeline's folder: which networks it has and how it samples.

  DIR/model_index.json                             {"_class_name": ..., ...}
  DIR/transformer, vae, text_encoder, tokenizer    a network or tokenizer each
  DIR/scheduler/scheduler_config.json              the sampler and its schedule

The layout is that of diffusers, whatever the family. The class says which
system it is of, and the system where its networks lie. A folder in a layout of
a family's own is one that `System.recognises`, and is read by `System.read`.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from vdit_jax import inputs, schema, writing
from vdit_jax.convert import folders, schedulers
from vdit_jax.models import families
from vdit_jax.models import system as systems

_SCHEDULER, _SCHEDULER_CONFIG = "scheduler", "scheduler_config.json"
_NAME = schema.Field(str, 1, 100)
_CLASS = schema.Field(list, 2, 2, each=_NAME)  # library and class
_PART = schema.Field(
  list, 2, 2, each=dataclasses.replace(_NAME, optional=True), optional=True
)
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def is_one(path: epath.PathLike) -> bool:
  """Whether a folder is a released pipeline's, in whichever layout.

  One of diffusers' has model_index.json.
  """
  folder = writing.absolute(path)
  return (folder / folders.PIPELINE).exists() or bool(_with_layout(folder))


def own(path: epath.PathLike) -> systems.Folder | None:
  """Read a folder in a layout of a family's own; None if it is none.

  Raises:
    ValueError: if it is one, but not whole.
  """
  folder = writing.absolute(path)
  system = _with_layout(folder)
  return system and system.read(folder)


def check_local(path: epath.PathLike) -> None:
  """Refuse what is no folder, with the command that downloads a model."""
  if writing.absolute(path).exists():
    return
  text = str(path)
  if _HUB_ID.fullmatch(text):
    name = text.partition("/")[2]
    raise ValueError(
      f"path {text} is no folder here; if it is a model of the hub, download "
      f"it with `hf download {text} --local-dir={name}` and give {name}"
    )
  raise ValueError(f"path {text} does not exist; give a folder with a model")


def part(path: epath.PathLike, name: str) -> epath.Path:
  """Return the folder of a pipeline's network, or a network's own folder.

  Args:
    path: of a pipeline, or of the network.
    name: of the network, as in `System.places`.
  """
  path = writing.absolute(path)
  if found := own(path):
    return found.networks[name]
  return path / system_of(path).places[name].folder if is_one(path) else path


def read(path: epath.PathLike) -> systems.Folder:
  """Read what a pipeline's folder has; its weights are not looked at.

  Raises:
    ValueError: if the class is unknown, or a part is missing.
  """
  folder = writing.absolute(path)
  if found := own(folder):
    return found
  system = system_of(folder)
  parts = ((p.folder, p.tokenizer) for p in system.places.values())
  index = _index(folder, [name for both in parts for name in both if name])
  # diffusers writes [null, null] for a part that is not there.
  places = system.present(lambda part: any(index.get(part) or ()))
  tokenizers = {k: p.tokenizer for k, p in places.items() if p.tokenizer}
  _check_whole(folder, places, tokenizers, index["_class_name"])
  file = folder / _SCHEDULER / _SCHEDULER_CONFIG
  scheduler = inputs.read_json(file)
  schema.check(str(file), scheduler, {"_class_name": _NAME})
  # diffusers makes the class that the index names, whoever wrote the config.
  scheduler["_class_name"] = index[_SCHEDULER][1]
  return systems.Folder(
    system=system,
    networks={k: folder / place.folder for k, place in places.items()},
    tokenizers={k: folder / part for k, part in tokenizers.items()},
    sampling=schedulers.recipe_fields(scheduler, system.schedulers, str(file)),
  )


def _with_layout(folder: epath.Path) -> systems.System | None:
  """Find the system that a folder is in a layout of; None if it is none's."""
  found = (s for s in families.SYSTEMS.values() if s.recognises(folder))
  return next(found, None)


def system_of(folder: epath.Path) -> systems.System:
  """Find the system of a pipeline's folder."""
  if found := _with_layout(folder):
    return found
  name = _index(folder)["_class_name"]
  found = families.of_pipeline(name)
  if found is None:
    known = [name for s in families.SYSTEMS.values() for name in s.pipelines]
    raise ValueError(
      f"{folder / folders.PIPELINE} is of class {schema.quote(name)}, which is "
      f"not known; known are {', '.join(sorted(known))}"
    )
  return found


def _index(folder: epath.Path, parts: Sequence[str] = ()) -> dict[str, Any]:
  """Read a pipeline's index, of which these parts are looked at.

  A part is named by its library and class.
  """
  file = folder / folders.PIPELINE
  index = inputs.read_json(file)
  for name in ("_class_name", *([_SCHEDULER] if parts else [])):
    if name not in index:
      raise ValueError(f"{file} names no {name}; download it again")
  fields = {"_class_name": _NAME, _SCHEDULER: _CLASS}
  fields |= dict.fromkeys(parts, _PART)
  schema.check(str(file), index, fields, "download it again")
  return index


def _check_whole(
  folder: epath.Path,
  places: Mapping[str, systems.Place],
  tokenizers: Mapping[str, str],
  class_name: str,
) -> None:
  """Refuse a folder that lacks a part."""
  files = [f"{p.folder}/{folders.CONFIG}" for p in places.values()]
  for name, part in tokenizers.items():
    config = folder / places[name].folder / folders.CONFIG
    if config.exists():
      said = folders.class_name(inputs.read_json(config), str(config))
      found = families.of_class(said)
      if found and not found.find_tokenizer(folder / part):
        files.append(f"{part}/{found.said_tokenizer_files}")
  files.append(f"{_SCHEDULER}/{_SCHEDULER_CONFIG}")
  if missing := [file for file in files if not (folder / file).exists()]:
    raise ValueError(
      f"path {folder} is a {class_name} without {', '.join(missing)}; download "
      "the whole of it again"
    )
