"""The one list of families, and what is found in it.

A system is a folder here with a `system.SYSTEM`; encoders that systems share
have folders of their own. Nothing else names a family.
"""

from collections.abc import Iterator

import flax.linen as nn

from vdit_jax import schema
from vdit_jax.convert import rules
from vdit_jax.models import system as systems
from vdit_jax.models.clip import system as clip
from vdit_jax.models.cogvideox import system as cogvideox
from vdit_jax.models.t5 import system as t5
from vdit_jax.models.vdit import system as vdit
from vdit_jax.models.wan import system as wan

OURS = vdit.SYSTEM  # what is trained here from nothing

SYSTEMS: dict[str, systems.System] = {
  s.name: s for s in (OURS, cogvideox.SYSTEM, wan.SYSTEM)
}
ENCODERS: dict[str, systems.Network] = {
  n.family: n for n in (t5.NETWORK, clip.NETWORK)
}


def networks() -> Iterator[systems.Network]:
  """Go through all kinds of network."""
  for known in SYSTEMS.values():
    yield from known.networks
  yield from ENCODERS.values()


def network(name: str, kind: str) -> systems.Network:
  """Find the network of a config's group by its name and kind."""
  found = [n for n in networks() if n.kind == kind]
  for known in found:
    if name in (known.family, *known.former_names):
      return known
  names = sorted(n.family for n in found)
  raise ValueError(
    f"{kind}.name must be one of {names}, got {schema.quote(name)}"
  )


def network_of(module: nn.Module) -> systems.Network:
  """Find what a module is one of."""
  found = next((n for n in networks() if isinstance(module, n.module)), None)
  if found is None:
    names = sorted({n.family for n in networks()})
    raise ValueError(f"{type(module).__name__} is of no family of {names}")
  return found


def system(name: str) -> systems.System:
  """Find the system whose denoiser, or autoencoder, a config names so."""
  if not isinstance(name, str) or name not in SYSTEMS:
    known = sorted(SYSTEMS)
    raise ValueError(f"name must be one of {known}, got {schema.quote(name)}")
  return SYSTEMS[name]


def of_class(class_name: str) -> systems.Network | None:
  """Find the network that a released config.json is of; None if unknown."""
  return next((n for n in networks() if class_name in n.classes), None)


def component(class_name: str) -> rules.Component | None:
  """Find how a released class is stored; None if it is unknown."""
  found = of_class(class_name)
  return found and found.classes[class_name]


def of_pipeline(class_name: str) -> systems.System | None:
  """Find the system of a model_index.json's class; None if unknown."""
  found = (s for s in SYSTEMS.values() if class_name in s.pipelines)
  return next(found, None)


def classes(kind: str | None = None) -> list[str]:
  """List the released classes that are known, of all kinds or one."""
  return sorted(
    name
    for known in networks()
    if kind in (None, known.kind)
    for name in known.classes
  )
