"""A released pipeline's folder: which components it has and how it samples.

  DIR/model_index.json            {"_class_name": "CogVideoXPipeline", ...}
  DIR/transformer, vae, text_encoder, tokenizer    a component each
  DIR/scheduler/scheduler_config.json              the sampler and its schedule

The layout is that of diffusers, whatever the family. The class has a row in
`PIPELINES`: what the family makes of the scheduler's config.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

from etils import epath

from vdit_jax.convert import folders
from vdit_jax.models.cogvideox import keys as cogvideox

PIPELINES: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
  **cogvideox.PIPELINES,
}

# What we call the networks, and their folders.
NETWORKS = {
  "autoencoder": "vae",
  "text_encoder": "text_encoder",
  "denoiser": "transformer",
}
_TOKENIZER, _SCHEDULER = "tokenizer", "scheduler"
_SCHEDULER_CONFIG = "scheduler_config.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclasses.dataclass(frozen=True)
class Released:
  """A pipeline's folder that has all its parts.

  Attributes:
    class_name: of the pipeline.
    networks: folder of each of `NETWORKS`.
    tokenizer: its folder.
    sampling: fields of `types.Recipe` that the scheduler's config settles.
  """

  class_name: str
  networks: dict[str, epath.Path]
  tokenizer: epath.Path
  sampling: dict[str, Any]


def is_one(path: epath.PathLike) -> bool:
  """Whether a folder is a released pipeline's: it has model_index.json."""
  return (folders.absolute(path) / folders.PIPELINE).exists()


def check_local(path: epath.PathLike) -> None:
  """Refuse what is no folder, with the command that downloads a model."""
  if folders.absolute(path).exists():
    return
  text = str(path)
  if _HUB_ID.fullmatch(text):
    name = text.partition("/")[2]
    raise ValueError(
      f"path {text} is no folder here; if it is a model of the hub, download "
      f"it with `hf download {text} --local-dir={name}` and give {name}"
    )
  raise ValueError(f"path {text} does not exist; give a folder with a model")


def read(path: epath.PathLike) -> Released:
  """Read a pipeline's index; its weights are not looked at.

  Raises:
    ValueError: if the class is unknown, or a part is missing.
  """
  folder = folders.absolute(path)
  index = folders.read_json(folder / folders.PIPELINE)
  name = index.get("_class_name")
  if name not in PIPELINES:
    raise ValueError(
      f"{folder / folders.PIPELINE} is of class {name!r}, which is not known; "
      f"known are {', '.join(sorted(PIPELINES))}"
    )
  if not isinstance(index.get(_SCHEDULER), list):
    raise ValueError(f"{folder / folders.PIPELINE} names no {_SCHEDULER}")
  files = {part: folders.CONFIG for part in NETWORKS.values()}
  files |= {_TOKENIZER: "spiece.model", _SCHEDULER: _SCHEDULER_CONFIG}
  missing = [
    f"{part}/{file}"
    for part, file in files.items()
    if not (folder / part / file).exists()
  ]
  if missing:
    raise ValueError(
      f"path {folder} is a {name} without {', '.join(missing)}; download the "
      "whole of it again"
    )
  scheduler = folders.read_json(folder / _SCHEDULER / _SCHEDULER_CONFIG)
  # diffusers makes the class that the index names, whoever wrote the config.
  scheduler["_class_name"] = index[_SCHEDULER][1]
  return Released(
    class_name=name,
    networks={ours: folder / part for ours, part in NETWORKS.items()},
    tokenizer=folder / _TOKENIZER,
    sampling=PIPELINES[name](scheduler),
  )
