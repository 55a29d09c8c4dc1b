"""The networks of a run, without weights: built, initialised, changed."""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections

from vdit_jax import inputs, schema
from vdit_jax.convert import configs
from vdit_jax.models import families
from vdit_jax.models.system import Modules, Network
from vdit_jax.nn import compute


def kind_of(name: str) -> str:
  """Return the kind of a network of a name: "text_encoder_2" is the second."""
  return re.sub(r"_\d+$", "", name)


def gather(networks: Mapping[str, nn.Module]) -> Modules:
  """Join networks, of which the denoiser, or the autoencoder, says the system.

  Args:
    networks: by name; see `System.places`.
  """
  first = networks.get("denoiser") or networks["autoencoder"]
  family = families.network_of(first).family
  return Modules(families.system(family), dict(networks))


def build(config: ml_collections.ConfigDict) -> Modules:
  """Build the networks that a run's config describes."""
  system = families.system(config.denoiser.name)
  names = ["autoencoder", *system.text, "denoiser"]
  # What given frames are encoded by, where there is such.
  names += [n for n in system.places if n in config and n not in names]
  networks = {name: build_module(config[name], kind_of(name)) for name in names}
  return Modules(system, networks)


def build_module(group: Mapping[str, Any], kind: str) -> nn.Module:
  """Build one network: `name` is its family, the other fields its Config's."""
  network, cfg = read_group(group, kind)
  return network.module(cfg)


def read_group(
  group: Mapping[str, Any], kind: str, where: str = "config"
) -> tuple[Network, Any]:
  """Read a network's group of a config: which one it is, and its Config.

  Args:
    group: `name` is its family, the other fields its Config's.
    kind: of network, which is the group's name too.
    where: that the config is from, for errors.

  Raises:
    ValueError: names the field that is unknown or not as it must be.
  """
  fields = dict(group)
  with inputs.naming(where):
    network = families.network(fields.pop("name", None), kind)
  dtype = schema.Field(str, choices=compute.DTYPES)
  given = configs.read(
    where, fields, configs.of(network.config, dtype=dtype), f"{kind}."
  )
  with inputs.naming(where):
    return network, network.config(**given)


def with_dtype(modules: Modules, dtype: Any) -> Modules:
  """Let networks compute in another dtype; None leaves theirs."""
  if dtype is None:
    return modules
  name = jnp.dtype(dtype).name
  changed = {
    k: m.clone(cfg=dataclasses.replace(m.cfg, dtype=name))
    for k, m in modules.networks.items()
  }
  return dataclasses.replace(modules, networks=changed)


def tiled(modules: Modules) -> Modules:
  """Let an autoencoder run in overlapping tiles; refuse one without."""
  tiles = {"autoencoder": modules.autoencoder.in_tiles()}
  return dataclasses.replace(modules, networks=modules.networks | tiles)


def init_denoiser(modules: Modules, key: jax.Array) -> dict[str, Any]:
  """Initialise the trained networks, boxed with their logical axes."""
  names = *modules.text_encoders, "denoiser"
  keys = jax.random.split(key, len(names))
  return {
    name: init(modules[name], key)
    for name, key in zip(names, keys, strict=True)
  }


def init(module: nn.Module, key: jax.Array) -> Any:
  """Initialise a network, boxed with its logical axes."""
  return families.network_of(module).init(module, key)
