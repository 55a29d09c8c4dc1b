"""The released denoiser that a run begins from.

`config.init_from` is a released pipeline's folder, or that of its denoiser
alone; of a pipeline with several `config.network` names the one. Full
fine-tuning begins from its weights; adapters (`nn.lora`) are trained beside
them and need them ever after.
"""

import dataclasses
from typing import Any

import jax
import ml_collections
from etils import epath

from vdit_jax import schema, writing
from vdit_jax.convert import folders
from vdit_jax.models import families, networks
from vdit_jax.nn import compute, lora
from vdit_jax.weights import adapters, component, diffusers_folder

_NAME = "denoiser"  # that a run trains, whichever of a pipeline's it is


def is_released(config: ml_collections.ConfigDict) -> bool:
  """Tell whether a run begins from a released denoiser, and not one of ours."""
  if not config.init_from:
    return False
  path = writing.absolute(config.init_from)
  if not path.exists():  # refused where it is read; only others release some
    return bool(families.system(config.denoiser.name).pipelines)
  return diffusers_folder.is_one(path) or folders.holds_component(path)


def folder_of(path: epath.PathLike, name: str = _NAME) -> epath.Path:
  """Return a denoiser's folder of a pipeline, or the folder itself.

  Args:
    path: of a pipeline or of the denoiser.
    name: of which of a pipeline's.
  """
  try:
    if networks.kind_of(name) == _NAME:
      return diffusers_folder.part(path, name)
  except KeyError:
    pass
  raise ValueError(
    f"network must be a denoiser of {path}, denoiser or denoiser_2 where it "
    f"has two, got {schema.quote(name)}"
  )


def describe(path: epath.PathLike, dtype: str, name: str = _NAME) -> Any:
  """Read what a released denoiser is: (network, Config); reads no weights.

  Args:
    path: of a pipeline or of the denoiser.
    dtype: that it is to compute in.
    name: of which of a pipeline's.
  """
  return component.describe(folder_of(path, name), _NAME, dtype)


def times(config: ml_collections.ConfigDict) -> tuple[float, float]:
  """Say at which times a run's denoiser denoises: those of its recipe's rows.

  All of them, but for one of a released pipeline's several.
  """
  if not (is_released(config) and diffusers_folder.is_one(config.init_from)):
    return 0.0, 1.0
  folder = writing.absolute(config.init_from)
  _, cfg = describe(folder, "float32", config.network)
  rows = families.system(config.denoiser.name).recipe(cfg, folder).experts
  own = [row for row in rows if row.network == config.network]
  if not own:
    raise ValueError(
      f"network must be one that denoises in the recipe of {folder}, "
      f"{[row.network for row in rows]}, got {config.network!r}"
    )
  return min(row.t_low for row in own), max(row.t_high for row in own)


def check(config: ml_collections.ConfigDict, begins: bool = True) -> str:
  """Name the weights that a run begins from; refuse those of another shape.

  Args:
    config: of the run.
    begins: whether adapters are still to be read; a run that has begun holds
      its own.

  Returns:
    Their fingerprint; "" for a run that begins from none of a release.
  """
  if not is_released(config):
    if lora.of(config).rank:
      raise ValueError(
        f"config.lora.rank={config.lora.rank} needs a released denoiser to "
        "adapt; set config.init_from to its folder, or config.lora.rank=0"
      )
    return ""
  network, cfg = describe(config.init_from, "float32", config.network)
  found = {"name": network.family, **dataclasses.asdict(cfg)}
  other = [
    f"{k}={schema.quote(config.denoiser.get(k))}, there it is {found[k]!r}"
    for k in sorted(found)
    if k not in compute.FIELDS and config.denoiser.get(k) != found[k]
  ]
  if other:
    raise ValueError(
      f"init_from={config.init_from!r} is of another denoiser than the "
      f"config's: {'; '.join(other)}; take --config=configs/"
      f"{network.family}.py:{config.init_from}"
    )
  _check_adapters(config, begins)
  return component.fingerprint(folder_of(config.init_from, config.network))


def load(config: ml_collections.ConfigDict, dtype: Any) -> dict[str, Any]:
  """Load the weights that a run begins from onto the mesh that is set.

  Args:
    config: of the run, resolved.
    dtype: of the weights.
  """
  folder = folder_of(config.init_from, config.network)
  found = component.fingerprint(folder)
  if found != config.init_fingerprint:
    raise ValueError(
      f"init_from={config.init_from!r} is of weights {found}, but the run "
      f"began from {config.init_fingerprint}; put those there, or write their "
      "folder as init_from in the run's config.json"
    )
  return component.load(folder, param_dtype=dtype).params


def load_adapters(config: ml_collections.ConfigDict) -> Any:
  """Read the adapters that a run's begin from: a tree of `nn.lora`."""
  cfg, name = lora.of(config), config.network
  system = families.system(config.denoiser.name)
  folder = folder_of(config.init_from, name)
  return adapters.read(cfg.init_from, system, {name: folder})[name]


def trained(
  config: ml_collections.ConfigDict, params: dict[str, Any], dtype: Any
) -> Any:
  """Return the weights of the denoiser that a run trained.

  Args:
    config: of the run, resolved.
    params: that it trained.
    dtype: of the weights that adapters are merged with; see `lora.merge`.
  """
  if lora.PARAMS not in params:
    return params[_NAME]
  weights, scale = load(config, dtype), lora.of(config).scale
  return lora.merge(weights, params[lora.PARAMS], scale, jax.random.key(0))


def _check_adapters(config: ml_collections.ConfigDict, begins: bool) -> None:
  """Refuse adapters that the denoiser cannot have, or not begin from."""
  cfg = lora.of(config)
  if not cfg.rank:
    return
  folder = folder_of(config.init_from, config.network)
  system = families.system(config.denoiser.name)
  (base,) = adapters.bases(system, {config.network: folder}).values()
  kernels = [path for path in base.shapes if path.endswith("/kernel")]
  lora.check_targets([path.removesuffix("/kernel") for path in kernels], cfg)
  if cfg.init_from and begins:
    lora.check_begin(load_adapters(config), cfg)
