"""Schedulers of released pipelines: what a scheduler_config.json says.

  scheduler_config.json --recipe_fields--> fields of `types.Recipe`

A class of diffusers is a `Scheduler`: the sampler that it is here, its fields
with the defaults that diffusers takes where the file is silent, and what a
schedule and a spacing are made of. Which classes a system takes it says itself.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from vdit_jax.convert import configs

_OBJECTIVES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_BETAS = ("linear", "scaled_linear")


@dataclasses.dataclass(frozen=True)
class Scheduler:
  """A class of scheduler.

  Attributes:
    sampler: name in `diffusion.samplers`.
    defaults: fields that are honoured; see `configs.fields`.
    fixed: fields of which one value alone is honoured.
    read: filled-up fields -> those of `types.Recipe` but the sampler.
    options: of the sampler.
  """

  sampler: str
  defaults: Mapping[str, Any]
  fixed: Mapping[str, Any]
  read: Callable[[Mapping[str, Any]], dict[str, Any]]
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def recipe_fields(
  config: Mapping[str, Any], known: Mapping[str, Scheduler]
) -> dict[str, Any]:
  """Read a scheduler_config.json: fields of `types.Recipe`.

  Args:
    config: the file's content.
    known: classes that the system takes, by name.

  Raises:
    ValueError: if the scheduler or one of its settings is not known.
  """
  name = config.get("_class_name")
  if name not in known:
    raise ValueError(
      f"the scheduler is of class {name!r}, which is not known; known are "
      f"{', '.join(known)}"
    )
  row = known[name]
  given = configs.fields(config, row.defaults, row.fixed)
  options = {"sampler_options": dict(row.options)} if row.options else {}
  return {"sampler": row.sampler, **options, **row.read(given)}


def discrete(given: Mapping[str, Any]) -> dict[str, Any]:
  """Read objective, schedule and spacing of one of training timesteps."""
  for field, known in (
    ("prediction_type", tuple(_OBJECTIVES)),
    ("beta_schedule", _BETAS),
  ):
    if given[field] not in known:
      raise ValueError(
        f"{field} of scheduler_config.json must be one of {known}, got "
        f"{given[field]!r}"
      )
  return dict(
    objective=_OBJECTIVES[given["prediction_type"]],
    schedule=dict(
      kind=given["beta_schedule"],
      num_timesteps=given["num_train_timesteps"],
      beta_start=given["beta_start"],
      beta_end=given["beta_end"],
      zero_terminal_snr=given["rescale_betas_zero_snr"],
      snr_shift=given["snr_shift_scale"],
    ),
    spacing=dict(
      kind=given["timestep_spacing"],
      offset=given["steps_offset"],
      clean_end=given["set_alpha_to_one"],
    ),
  )
