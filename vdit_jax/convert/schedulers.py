"""Schedulers of released pipelines: what a scheduler_config.json says.

  scheduler_config.json --recipe_fields--> fields of `types.Recipe`

A class of diffusers is a `Scheduler`: the sampler that it is here, its fields
with the defaults that diffusers takes where the file is silent, and what a
schedule and a spacing are made of. Those of no family stand here, `FLOW_EULER`;
what a family has of its own is made by `discrete`. Which classes a system takes
it says itself.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from vdit_jax.convert import configs

_OBJECTIVES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_BETAS = ("linear", "scaled_linear")
# What diffusers 0.42.1 takes where a scheduler_config.json is silent.
_DISCRETE: dict[str, Any] = dict(
  num_train_timesteps=1000,
  set_alpha_to_one=True,
  steps_offset=0,
  prediction_type="epsilon",
  timestep_spacing="leading",
  rescale_betas_zero_snr=False,
)


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


def discrete(sampler: str, **fields: Any) -> Scheduler:
  """Describe a class of scheduler of training timesteps with betas.

  Args:
    sampler: name in `diffusion.samplers`.
    fields: defaults of the class that others do not share: beta_start,
      beta_end, beta_schedule, snr_shift_scale, and those it never looks at.
  """
  fixed = dict(trained_betas=None)
  return Scheduler(sampler, _DISCRETE | fields, fixed, _read_discrete)


def _read_discrete(given: Mapping[str, Any]) -> dict[str, Any]:
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


def _read_flow_euler(given: Mapping[str, Any]) -> dict[str, Any]:
  """Read objective, schedule, shift and spacing of a rectified flow's."""
  num_timesteps = given["num_train_timesteps"]
  return dict(
    objective="flow",
    schedule=dict(kind="rectified_flow", num_timesteps=num_timesteps),
    shift=float(given["shift"]),
    spacing=dict(kind="flow_euler"),
  )


# By the class's name, as `System.schedulers` has it.
FLOW_EULER: Mapping[str, Scheduler] = {
  "FlowMatchEulerDiscreteScheduler": Scheduler(
    sampler="euler",
    defaults=dict(
      num_train_timesteps=1000,
      shift=1.0,
      # Only dynamic shifting looks at these.
      base_shift=0.5,
      max_shift=1.15,
      base_image_seq_len=256,
      max_image_seq_len=4096,
      time_shift_type="exponential",
    ),
    fixed=dict(
      use_dynamic_shifting=False,
      invert_sigmas=False,
      shift_terminal=None,
      use_karras_sigmas=False,
      use_exponential_sigmas=False,
      use_beta_sigmas=False,
      stochastic_sampling=False,
    ),
    read=_read_flow_euler,
  )
}
