"""Networks beside the autoencoder that given frames are encoded by.

  pipeline's folder, name -> network, Config, weights

An image encoder of image-to-video is one. They are not trained; a run names the
folder of the pipeline that has them, and their content.
"""

from collections.abc import Mapping
from typing import Any

import ml_collections
from etils import epath

from vdit_jax.models import families, networks
from vdit_jax.models import system as systems
from vdit_jax.weights import component, diffusers_folder


def names(places: Mapping[str, Any], system: systems.System) -> list[str]:
  """Name those among the networks of a pipeline, or the groups of a config."""
  return [
    name
    for name in system.places
    if name in places
    and name not in system.text
    and networks.kind_of(name) not in ("denoiser", "autoencoder")
  ]


def describe(
  path: epath.PathLike, name: str, dtype: str
) -> tuple[systems.Network, Any]:
  """Tell what a pipeline's network is; no weights are read."""
  folder = diffusers_folder.part(path, name)
  return component.describe(folder, networks.kind_of(name), dtype)


def fingerprint(path: epath.PathLike, name: str) -> str:
  """Name a pipeline's network by its content."""
  return component.fingerprint(diffusers_folder.part(path, name))


def load(path: epath.PathLike, name: str, dtype: str) -> dict[str, Any]:
  """Load a pipeline's network onto the mesh that is set."""
  folder = diffusers_folder.part(path, name)
  return component.load(folder, param_dtype=dtype, dtype=dtype).params


def load_all(config: ml_collections.ConfigDict) -> dict[str, Any]:
  """Load those of a run, by name; refuse others than it began with.

  Args:
    config: of the run, completed.
  """
  system, found = families.system(config.denoiser.name), {}
  folder = config.frame_encoder_dir
  for name in names(config, system):
    made_by, ours = config[f"{name}_fingerprint"], fingerprint(folder, name)
    if made_by != ours:
      raise ValueError(
        f"frame_encoder_dir must be of {name} {made_by}, but {folder} is "
        f"{ours}; put that one there, or write its folder as "
        "frame_encoder_dir in the run's config.json"
      )
    found[name] = load(folder, name, config[name].dtype)
  return found
