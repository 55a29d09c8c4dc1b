"""Every field of a run's config: what it must be, asked before anything else.

  config --check--> refused, or read by train, batching and aot

Most groups are dataclasses, which say of what kind their fields are; ranges
stand beside them. A network's fields are those of its family's Config. What is
read by name alone is listed here.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import ml_collections

from vdit_jax import schema, sharding, types
from vdit_jax.convert import configs
from vdit_jax.data import buckets, examples
from vdit_jax.diffusion import guidance, schedules, shifts
from vdit_jax.models import families, networks
from vdit_jax.nn import lora
from vdit_jax.schema import Field
from vdit_jax.training import (
  denoiser,
  given,
  guards,
  learner,
  optim,
  resume,
)
from vdit_jax.weights import run_config

LIST = "docs/fields.md"  # lists all of them

_MOST = 10**7  # of anything that is counted
_SIDE = 2**16  # of pixels, frames or tokens

_DTYPES = ("float32", "bfloat16", "float16")

_EVERY = Field(int, 0, optim.MOST_STEPS)
_SHARE = Field(float, 0, 1)
_SCALE = Field(float, -1000, 1000)  # of guidance
_SHIFT = Field(float, 1e-6, 1e6)
_TEXT, _NAME = Field(str), Field(str, 1)
_TASK = Field(str, choices=learner.TASKS)


@dataclasses.dataclass(frozen=True)
class Group:
  """Fields, by name, and groups of them.

  Attributes:
    fields: what each must be.
    optional: those that need not be there.
  """

  fields: Mapping[str, "Field | Group | Either"]
  optional: frozenset[str] = frozenset()

  def beside(self, **more: "Field | Group | Either") -> "Group":
    """Return the group with more fields, which must be there."""
    return Group({**self.fields, **more}, self.optional - more.keys())


@dataclasses.dataclass(frozen=True)
class Either:
  """A field that may be a group in its place."""

  field: Field
  group: Group

  def __str__(self) -> str:
    return f"{self.field}, or a group of fields"


def check(config: Mapping[str, Any] | ml_collections.ConfigDict) -> None:
  """Refuse a config with a field that is wrong, missing or unknown.

  Args:
    config: of a run; one of an earlier version is brought up to date first.

  Raises:
    ValueError: names the field, and what it is and must be.
  """
  if isinstance(config, ml_collections.ConfigDict):
    config = config.copy_and_resolve_references().to_dict()
  config = run_config.upgrade(config)
  _check("", config, of(config))


def of(config: Mapping[str, Any]) -> Group:
  """Return what the fields of a config must be, by its task and networks."""
  if "task" not in config:
    return Group(_RUN)
  _check_field("task", config["task"], _TASK)
  kinds = {network.kind for network in families.networks()}
  names = {n for n in config if networks.kind_of(n) in kinds} | {"autoencoder"}
  if config["task"] == "autoencoder":
    fields = _RUN | _OF_AUTOENCODER
  else:
    fields = _RUN | _OF_DENOISER
    own = _name(config, "denoiser")
    names |= {"denoiser", *(families.system(own).text if own else ())}
  for name in names:
    fields[name] = _network(name, _name(config, name))
    fields[f"{name}_fingerprint"] = _TEXT
  optional = {name for name in fields if name.endswith("_fingerprint")}
  return Group(fields, frozenset(optional | _MAYBE))


def table() -> str:
  """List all fields in Markdown, as docs/fields.md has them."""
  lines = ["| field | must be | may change on resuming |", "|---|---|---|"]
  for name, field in _listed(Group(_RUN | _OF_AUTOENCODER | _OF_DENOISER)):
    may = resume.rule_of(name).may_change
    lines.append(f"| `{name}` | {field} | {'yes' if may else 'no'} |")
  return "\n".join(lines)


def _listed(
  group: Group, above: str = ""
) -> Iterator[tuple[str, Field | Either]]:
  """Go through all fields of a group by their dotted names."""
  for name, field in sorted(group.fields.items()):
    if isinstance(field, Group):
      yield from _listed(field, f"{above}{name}.")
    else:
      yield f"{above}{name}", field


def _check(above: str, values: Mapping[str, Any], group: Group) -> None:
  """Check a group whose fields' names begin with `above`."""
  where = f"config.{above}".rstrip(".")
  lacking = group.fields.keys() - values.keys() - group.optional
  if lacking:
    raise ValueError(f"{where} lacks {', '.join(sorted(lacking))}; see {LIST}")
  for name in values:
    if name not in group.fields:
      raise ValueError(
        f"{where} has no field {schema.quote(name)}, "
        f"{schema.near(name, sorted(group.fields))}; see {LIST}"
      )
  for name, value in values.items():
    field, full = group.fields[name], f"{above}{name}"
    if isinstance(field, Either):
      field = field.group if isinstance(value, Mapping) else field.field
    if isinstance(field, Group):
      if not isinstance(value, Mapping):
        raise ValueError(
          f"config.{full} must be a group of fields, got {schema.quote(value)}"
        )
      _check(f"{full}.", value, field)
    else:
      _check_field(full, value, field)


def _check_field(name: str, value: Any, field: Field) -> None:
  if not field.fits(value):
    raise ValueError(
      f"{name} must be {field}, got {schema.quote(value)}; see {LIST}"
    )


def _of(
  cls: type, ranges: Mapping[str, Field | Either | Group] | None = None
) -> Group:
  """Return the fields of a dataclass.

  Args:
    cls: of the group.
    ranges: of some fields; of the others see `configs.of`.
  """
  table = configs.of(cls, **(ranges or {}))
  return Group(table.fields, frozenset(table.defaults))


def _network(name: str, family: str) -> Group:
  """Return the fields of a network, by its name and its family's."""
  if not family:
    return Group({"name": _NAME})  # refused, as that is lacking
  network = families.network(family, networks.kind_of(name))
  ranges = {"dtype": Field(str, choices=_DTYPES)}
  return _of(network.config, ranges).beside(name=_NAME)


def _name(config: Mapping[str, Any], network: str) -> str:
  """Return the family of a network; "" where the config says none."""
  group = config.get(network)
  found = group.get("name") if isinstance(group, Mapping) else None
  return found if isinstance(found, str) else ""


_SIZE_SHIFT = _of(shifts.SizeShift)


def _recipe() -> Group:
  """Return a recipe's fields as a run has them; see `run_config.recipe`."""
  fields = _of(types.Recipe, _RECIPE).beside(guidance=_SCALE)
  kept = fields.fields.keys() - {"objective", "schedule"}
  return Group(
    {k: fields.fields[k] for k in kept}, fields.optional | {"experts"}
  )


_RECIPE = {
  "experts": Field(list, 0, 100, each=Field(list, 4, 4)),
  "image_guidance": _SCALE,
  "steps": Field(int, 1, 10_000),
  "shift": Either(_SHIFT, _SIZE_SHIFT),
  "num_frames": Field(int, 1, _SIDE),
  "height": Field(int, 1, _SIDE),
  "width": Field(int, 1, _SIDE),
  "fps": Field(float, 1e-3, 1e4),
  "rescale": _SHARE,
  "guidance_kind": Field(str, choices=guidance.KINDS),
}
_VALIDATION = Group(
  {"split": _NAME, "every": _EVERY, "clips": Field(int, 1, _MOST)}
)
_RUN: dict[str, Field | Group] = {
  "task": _TASK,
  "seed": Field(int, 0, 4 * 10**9),
  "batch_size": Field(int, 1, _MOST),
  "accumulate": Field(int, 1, _MOST),
  "steps_a_call": Field(int, 1, optim.MOST_STEPS),
  "ema_decay": _SHARE,
  "log_every": _EVERY,
  "data": _of(examples.Options, examples.FIELDS).beside(
    name=_NAME,
    split=_NAME,
    data_dir=Field(str, optional=True),
    max_length=Field(int, 1, _SIDE),
    shape=Field(list, 0, 3, each=Field(int, 1, _SIDE)),
    workers=Field(int, 0, 2**10),
    threads=Field(int, 1, 2**10),
    buckets=_of(buckets.Options, buckets.FIELDS),
  ),
  "mesh": _of(
    sharding.MeshShape,
    dict.fromkeys(sharding.MESH_AXES, Field(int, -1, _MOST)),
  ),
  "optim": _of(optim.Optim, optim.FIELDS),
  "guard": _of(guards.Guard, guards.FIELDS),
  "checkpoint": Group(
    {"every": _EVERY, "keep": Field(int, 1, _MOST), "keep_every": _EVERY}
  ),
  "profile": Group({"steps": _TEXT}),
  "validation": _VALIDATION,
}
_OF_AUTOENCODER: dict[str, Field | Group] = {
  "l2_weight": Field(float, 0),
  "kl_weight": Field(float, 0),
}
_OF_DENOISER: dict[str, Field | Group] = {
  "autoencoder_workdir": _TEXT,
  "text_encoder_dir": _TEXT,
  "frame_encoder_dir": _TEXT,
  "network": _NAME,
  "init_from": _TEXT,
  "init_fingerprint": _TEXT,
  "validation": _VALIDATION.beside(levels=Field(list, 1, 1000, each=_SHARE)),
  "objective": _of(
    denoiser.Objective,
    {
      **denoiser.FIELDS,
      "shift": Either(dataclasses.replace(_SHIFT, optional=True), _SIZE_SHIFT),
      "schedule": _of(schedules.Schedule, denoiser.SCHEDULE_FIELDS),
    },
  ),
  "samples": Group(
    {"every": _EVERY, "prompts": Field(list, 0, 1000, each=_TEXT)}
  ),
  "sampling": _recipe(),
  "lora": _of(lora.Lora, lora.FIELDS),
  "image": _of(types.Image, denoiser.IMAGE_FIELDS),
  "given": _of(given.Shares, given.FIELDS),
}
_MAYBE = {"lora", "image", "given"}
