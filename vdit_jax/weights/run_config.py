"""A run's config: read where it was left, an older one brought up to date."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import ml_collections
from etils import epath

from vdit_jax import checkpoint, inputs, schema, types
from vdit_jax.convert import configs, folders
from vdit_jax.data import buckets, reading
from vdit_jax.diffusion import schedules, shifts
from vdit_jax.models import families, networks
from vdit_jax.models import system as systems

# What runs from before these keys did.
_SINCE: dict[str, dict[str, Any]] = {
  "data": {
    "split": "train",
    "shape": (),
    **vars(reading.Options()),
    "buckets": vars(buckets.Options()),
  },
  "objective": {"cond_dropout": 0.1, "t_low": 0.0, "t_high": 1.0},
  "lora": {"init_from": ""},
}

# What is read here of a config, beside its networks.
_GROUP = schema.Field(dict)
_FIELDS = {
  **dict.fromkeys(("autoencoder", "sampling", "objective", "data"), _GROUP),
  **dict.fromkeys(
    ("text_encoder_dir", "init_from", "autoencoder_workdir"), schema.Field(str)
  ),
}
_EXPERT = configs.of(types.Expert)
_SCHEDULE = configs.of(schedules.Schedule)
_SIZE_SHIFT = configs.of(shifts.SizeShift)
_SHIFTS = schema.Field(float, 1e-3, 1e3)  # or a `_SIZE_SHIFT`
_ROWS = schema.Field(list, 0, 8, each=schema.Field(list, 1, len(_EXPERT.rows)))
_SAMPLING = {
  **configs.of(types.Recipe, experts=_ROWS, shift=_SHIFTS).rows,
  "experts": configs.Row((), _ROWS),
  "guidance": _EXPERT.rows["guidance"],
}
_TABLES = {
  "sampling": configs.Table(
    {k: v for k, v in _SAMPLING.items() if k not in ("objective", "schedule")},
    remedy=f"there are {', '.join(_SAMPLING)}",
  ),
  "objective": configs.Table(
    {k: _SAMPLING[k] for k in ("objective", "schedule")}, strict=False
  ),
  "data": configs.Table({"max_length": configs.whole()}, strict=False),
}


def read(path: epath.PathLike) -> ml_collections.ConfigDict:
  """Read the config of a workdir, or of a release of ours, as of today.

  Raises:
    ValueError: if it is not whole; names the field that is not as it must be.
  """
  where = str(epath.Path(path) / folders.CONFIG)
  config = checkpoint.read_config(path).to_dict()
  with inputs.naming(where):
    config = upgrade(config)
  check(where, config)
  return ml_collections.ConfigDict(config)


def check(where: str, config: Mapping[str, Any]) -> None:
  """Refuse what describes no networks, or not how to sample.

  Args:
    where: that the config is from, for errors.
    config: as `upgrade` gives it.
  """
  groups = ("autoencoder", "sampling", "objective", "data")
  missing = [name for name in groups if name not in config]
  if "denoiser" in config and missing:
    raise ValueError(
      f"{where}: {', '.join(missing)} must be there; fetch the file again"
    )
  schema.check(where, config, _FIELDS)
  kinds = {network.kind for network in families.networks()}
  for name, group in config.items():
    if (kind := networks.kind_of(name)) in kinds:
      schema.check(where, config, {name: schema.Field(dict)})
      networks.read_group(group, kind, where)
  sampling = config.get("sampling", {})
  if isinstance(shift := sampling.get("shift"), Mapping):
    configs.read(where, shift, _SIZE_SHIFT, "sampling.shift.")
    config = {**config, "sampling": {**sampling, "shift": 1.0}}
  for name, table in _TABLES.items():
    if name in config:
      configs.read(where, config[name], table, f"{name}.")
  if "objective" in config:
    schedule = config["objective"]["schedule"]
    configs.read(where, schedule, _SCHEDULE, "objective.schedule.")
  for i, row in enumerate(sampling.get("experts", ())):
    expert = dict(zip(_EXPERT.rows, row, strict=False))
    configs.read(where, expert, _EXPERT, f"sampling.experts[{i}].")


def upgrade(config: Mapping[str, Any]) -> dict[str, Any]:
  """Bring a run's config up to date: what it did, in today's words.

  Args:
    config: as plain dicts; what is not of a run is left as it is.
  """
  config = {
    name: _fill(group, _SINCE.get(name, {})) for name, group in config.items()
  }
  kinds = {network.kind for network in families.networks()}
  for name, group in config.items():
    kind = networks.kind_of(name)
    if kind in kinds and isinstance(group, Mapping) and "name" in group:
      known = families.network(group["name"], kind)
      own = vars(known.config())
      config[name] = _fill(dict(group) | {"name": known.family}, own)
  if "optim" in config:  # of a run, and not of a release
    config = {"steps_a_call": 1, **config}
  if "denoiser" in config:
    since = ("text_encoder_dir", "frame_encoder_dir", "init_from")
    config = {"network": "denoiser", **dict.fromkeys(since, ""), **config}
  if isinstance(sampling := config.get("sampling"), Mapping):
    config["sampling"] = _sampling(sampling)
  return config


def network(known: systems.Network, cfg: Any) -> ml_collections.ConfigDict:
  """Make a config's group of a network: its family and its Config's fields."""
  fields = {"name": known.family, **dataclasses.asdict(cfg)}
  return ml_collections.ConfigDict(fields)


def recipe(config: ml_collections.ConfigDict) -> types.Recipe:
  """Read a config's sampling defaults."""
  fields = config.sampling.to_dict()
  guidance, rows = fields.pop("guidance"), fields.pop("experts", ())
  experts = [types.Expert(*row) for row in rows]
  return types.Recipe(
    experts=tuple(experts) or (types.Expert(guidance=guidance),),
    objective=config.objective.objective,
    schedule=dict(config.objective.schedule),
    **fields,
  )


def text_lengths(config: ml_collections.ConfigDict) -> dict[str, int]:
  """Tokens of a caption, M, by text encoder.

  They are data.max_length, or fewer where the system pads to fewer: those of
  several encoders may differ.
  """
  cfg = networks.build_module(config.denoiser, "denoiser").cfg
  system = families.system(config.denoiser.name)
  return system.lengths(cfg, config.data.max_length)


def sampling(recipe: types.Recipe) -> ml_collections.ConfigDict:
  """Make a config's group of how to sample; `recipe` reads it back."""
  fields = dataclasses.asdict(recipe)
  for name in ("experts", "objective", "schedule"):
    del fields[name]
  fields["guidance"] = recipe.experts[0].guidance
  if recipe.experts != (types.Expert(guidance=fields["guidance"]),):
    fields["experts"] = tuple(map(dataclasses.astuple, recipe.experts))
  return ml_collections.ConfigDict(fields)


def _sampling(group: Mapping[str, Any]) -> dict[str, Any]:
  """Give a group of sampling today's fields."""
  group = dict(group)
  group.pop("sees_padding", None)  # a rule of the system
  if group.pop("dynamic_guidance", False):
    group["guidance_kind"] = "dynamic"
  known: dict[str, Any] = {}
  for field in dataclasses.fields(types.Recipe):
    if field.default_factory is not dataclasses.MISSING:
      known[field.name] = field.default_factory()
    elif field.default is not dataclasses.MISSING:
      known[field.name] = field.default
  return _fill(group, known)


def _fill(group: Any, defaults: Mapping[str, Any]) -> Any:
  """Add what a group lacks, and its groups."""
  if not defaults or not isinstance(group, Mapping):
    return group
  filled = dict(defaults) | dict(group)
  for name, value in defaults.items():
    if isinstance(value, Mapping):
      filled[name] = _fill(filled[name], value)
  return filled
