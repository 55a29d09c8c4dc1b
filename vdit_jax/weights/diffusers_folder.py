"""A released pipeline's folder: which networks it has and how it samples.

  DIR/model_index.json                             {"_class_name": ..., ...}
  DIR/transformer, vae, text_encoder, tokenizer    a network or tokenizer each
  DIR/scheduler/scheduler_config.json              the sampler and its schedule

The layout is that of diffusers, whatever the family. The class says which
system it is of, and the system where its networks lie. A folder in a layout of
a family's own is one that `System.recognises`, and is read by `System.read`.
"""

import re
from collections.abc import Mapping

from etils import epath

from vdit_jax import writing
from vdit_jax.convert import folders, schedulers
from vdit_jax.models import families
from vdit_jax.models import system as systems

_SCHEDULER, _SCHEDULER_CONFIG = "scheduler", "scheduler_config.json"
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
  return path / _system(path).places[name].folder if is_one(path) else path


def read(path: epath.PathLike) -> systems.Folder:
  """Read what a pipeline's folder has; its weights are not looked at.

  Raises:
    ValueError: if the class is unknown, or a part is missing.
  """
  folder = writing.absolute(path)
  if found := own(folder):
    return found
  system = _system(folder)
  index = folders.read_json(folder / folders.PIPELINE)
  if not isinstance(index.get(_SCHEDULER), list):
    raise ValueError(f"{folder / folders.PIPELINE} names no {_SCHEDULER}")
  # diffusers writes [null, null] for a part that is not there.
  places = system.present(lambda part: any(index.get(part) or ()))
  tokenizers = {k: p.tokenizer for k, p in places.items() if p.tokenizer}
  _check_whole(folder, places, tokenizers, index["_class_name"])
  scheduler = folders.read_json(folder / _SCHEDULER / _SCHEDULER_CONFIG)
  # diffusers makes the class that the index names, whoever wrote the config.
  scheduler["_class_name"] = index[_SCHEDULER][1]
  return systems.Folder(
    system=system,
    networks={k: folder / place.folder for k, place in places.items()},
    tokenizers={k: folder / part for k, part in tokenizers.items()},
    sampling=schedulers.recipe_fields(scheduler, system.schedulers),
  )


def _with_layout(folder: epath.Path) -> systems.System | None:
  """Find the system that a folder is in a layout of; None if it is none's."""
  found = (s for s in families.SYSTEMS.values() if s.recognises(folder))
  return next(found, None)


def _system(folder: epath.Path) -> systems.System:
  """Find the system of a pipeline's index."""
  index = folders.read_json(folder / folders.PIPELINE)
  found = families.of_pipeline(index.get("_class_name"))
  if found is None:
    known = [name for s in families.SYSTEMS.values() for name in s.pipelines]
    raise ValueError(
      f"{folder / folders.PIPELINE} is of class {index.get('_class_name')!r}, "
      f"which is not known; known are {', '.join(sorted(known))}"
    )
  return found


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
      found = families.of_class(folders.class_name(folders.read_json(config)))
      files += [f"{part}/{found.tokenizer_file}"] if found else []
  files.append(f"{_SCHEDULER}/{_SCHEDULER_CONFIG}")
  if missing := [file for file in files if not (folder / file).exists()]:
    raise ValueError(
      f"path {folder} is a {class_name} without {', '.join(missing)}; download "
      "the whole of it again"
    )
