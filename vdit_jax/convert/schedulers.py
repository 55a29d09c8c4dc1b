"""Schedulers of released pipelines: what a scheduler_config.json says.

  scheduler_config.json --recipe_fields--> fields of `types.Recipe`

A class of diffusers is a `Scheduler`: the sampler that it is here, its fields
with the defaults that diffusers takes where the file is silent, and what a
schedule and a spacing are made of. Those of no family stand here, `FLOW_EULER`
and `UNIPC`; what a family has of its own is made by `discrete`. Which classes a
system takes it says itself.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from vdit_jax.convert import configs

_OBJECTIVES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_BETAS = ("linear", "scaled_linear")
_ZERO = ("zero",)
_ORDERS = (1, 2, 3)  # of UniPC
_ENDS = (*_ZERO, "sigma_min")
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
    options: of the sampler, if `read` says none.
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


def _check(given: Mapping[str, Any], **fields: tuple[Any, ...]) -> None:
  """Refuse fields that have none of the values that are honoured."""
  for field, known in fields.items():
    if given[field] not in known:
      raise ValueError(
        f"{field} of scheduler_config.json must be one of {known}, got "
        f"{given[field]!r}"
      )


def _read_discrete(given: Mapping[str, Any]) -> dict[str, Any]:
  """Read objective, schedule and spacing of one of training timesteps."""
  _check(given, prediction_type=tuple(_OBJECTIVES), beta_schedule=_BETAS)
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


def _read_flow(
  given: Mapping[str, Any], shift: str, spacing: str
) -> dict[str, Any]:
  """Read objective, schedule, shift and spacing of a rectified flow's.

  Args:
    given: filled-up fields.
    shift: name of the shift's.
    spacing: kind of `diffusion.schedules.Spacing`.
  """
  num_timesteps = given["num_train_timesteps"]
  return dict(
    objective="flow",
    schedule=dict(kind="rectified_flow", num_timesteps=num_timesteps),
    shift=float(given[shift]),
    spacing=dict(kind=spacing),
  )


def _read_unipc(given: Mapping[str, Any]) -> dict[str, Any]:
  """Read what UniPC does: of a rectified flow, or of training timesteps."""
  _check(given, solver_order=_ORDERS, final_sigmas_type=_ENDS)
  names = {"order": "solver_order", "lower_order_final": "lower_order_final"}
  options = {name: given[field] for name, field in names.items()}
  if given["use_flow_sigmas"]:
    _check(given, prediction_type=("flow_prediction",), final_sigmas_type=_ZERO)
    fields = _read_flow(given, "flow_shift", "flow_unipc")
  else:
    clean = given["final_sigmas_type"] in _ZERO
    own = dict(snr_shift_scale=1.0, set_alpha_to_one=clean)
    fields = _read_discrete({**given, **own})
    fields["spacing"]["multistep"] = True
  return {"sampler_options": options, **fields}


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
    read=lambda given: _read_flow(given, "shift", "flow_euler"),
  )
}
UNIPC: Mapping[str, Scheduler] = {
  "UniPCMultistepScheduler": Scheduler(
    sampler="unipc",
    defaults=dict(
      num_train_timesteps=1000,
      beta_start=0.0001,
      beta_end=0.02,
      beta_schedule="linear",
      prediction_type="epsilon",
      solver_order=2,
      lower_order_final=True,
      use_flow_sigmas=False,
      flow_shift=1.0,
      timestep_spacing="linspace",
      steps_offset=0,
      final_sigmas_type="zero",
      rescale_betas_zero_snr=False,
      # Only thresholding and dynamic shifting look at these.
      dynamic_thresholding_ratio=0.995,
      sample_max_value=1.0,
      time_shift_type="exponential",
    ),
    fixed=dict(
      trained_betas=None,
      thresholding=False,
      predict_x0=True,
      solver_type="bh2",
      disable_corrector=[],
      solver_p=None,
      use_karras_sigmas=False,
      use_exponential_sigmas=False,
      use_beta_sigmas=False,
      use_dynamic_shifting=False,
      sigma_min=None,
      sigma_max=None,
      shift_terminal=None,
    ),
    read=_read_unipc,
  )
}
