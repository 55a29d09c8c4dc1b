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

from vdit_jax import inputs, schema
from vdit_jax.convert import configs

_OBJECTIVES = {"epsilon": "eps", "sample": "x0", "v_prediction": "v"}
_BETAS = ("linear", "scaled_linear")
_SPACINGS = ("leading", "trailing", "linspace")
_MOST_TIMESTEPS = 100_000
_TIMESTEPS = configs.whole(1000, 2, _MOST_TIMESTEPS)
_OFFSET = configs.whole(0, 0, _MOST_TIMESTEPS)
_FLOW = "flow_prediction"
# What diffusers 0.42.1 takes where a scheduler_config.json is silent.
_DISCRETE = dict(
  num_train_timesteps=_TIMESTEPS,
  set_alpha_to_one=configs.flag(True),
  steps_offset=_OFFSET,
  prediction_type=configs.word("epsilon", *_OBJECTIVES),
  timestep_spacing=configs.word("leading", *_SPACINGS),
  rescale_betas_zero_snr=configs.flag(False),
)


@dataclasses.dataclass(frozen=True)
class Scheduler:
  """A class of scheduler.

  Attributes:
    sampler: name in `diffusion.samplers`.
    fields: what its scheduler_config.json may say.
    read: filled-up fields -> those of `types.Recipe` but the sampler.
    options: of the sampler, if `read` says none.
  """

  sampler: str
  fields: configs.Table
  read: Callable[[Mapping[str, Any]], dict[str, Any]]
  options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def recipe_fields(
  config: Mapping[str, Any],
  known: Mapping[str, Scheduler],
  where: str = "scheduler_config.json",
) -> dict[str, Any]:
  """Read a scheduler_config.json: fields of `types.Recipe`.

  Args:
    config: the file's content.
    known: classes that the system takes, by name.
    where: path of the file, for errors.

  Raises:
    ValueError: if the scheduler or one of its settings is not known.
  """
  name = config.get("_class_name")
  if not isinstance(name, str) or name not in known:
    raise ValueError(
      f"{where}: the scheduler is of class {schema.quote(name)}, which is not "
      f"known; known are {', '.join(known)}"
    )
  row = known[name]
  given = configs.read(where, config, row.fields)
  options = {"sampler_options": dict(row.options)} if row.options else {}
  with inputs.naming(where):
    return {"sampler": row.sampler, **options, **row.read(given)}


def discrete(
  sampler: str,
  *,
  beta_start: float,
  beta_end: float,
  beta_schedule: str,
  snr_shift_scale: float,
  **unused: Any,
) -> Scheduler:
  """Describe a class of scheduler of training timesteps with betas.

  Args:
    sampler: name in `diffusion.samplers`.
    beta_start, beta_end, beta_schedule, snr_shift_scale: its defaults.
    unused: defaults of the fields that it never looks at.
  """
  rows = _betas(beta_start, beta_end, beta_schedule)
  rows["snr_shift_scale"] = configs.number(snr_shift_scale, 1e-3, 1e3)
  rows |= {name: configs.unused(value) for name, value in unused.items()}
  table = configs.Table(_DISCRETE | rows, fixed=dict(trained_betas=None))
  return Scheduler(sampler, table, _read_discrete)


def _betas(start: float, end: float, schedule: str) -> dict[str, configs.Row]:
  """Make the rows of betas, of their defaults."""
  return dict(
    beta_start=configs.number(start, 1e-9, 0.999),
    beta_end=configs.number(end, 1e-9, 0.999),
    beta_schedule=configs.word(schedule, *_BETAS),
  )


def _check(given: Mapping[str, Any], **fields: str) -> None:
  """Refuse fields that have not the one value that goes with the others."""
  for name, known in fields.items():
    if given[name] != known:
      raise ValueError(f"{name} must be {known!r} here, got {given[name]!r}")


def _read_discrete(given: Mapping[str, Any]) -> dict[str, Any]:
  """Read objective, schedule and spacing of one of training timesteps."""
  if given["beta_start"] > given["beta_end"]:
    raise ValueError(
      f"beta_start must be at most beta_end {given['beta_end']}, got "
      f"{given['beta_start']}"
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
  names = {"order": "solver_order", "lower_order_final": "lower_order_final"}
  options = {name: given[field] for name, field in names.items()}
  if given["use_flow_sigmas"]:
    _check(given, prediction_type=_FLOW, final_sigmas_type="zero")
    fields = _read_flow(given, "flow_shift", "flow_unipc")
  else:
    clean = given["final_sigmas_type"] == "zero"
    if given["prediction_type"] == _FLOW:
      raise ValueError(f"prediction_type {_FLOW!r} needs use_flow_sigmas")
    own = dict(snr_shift_scale=1.0, set_alpha_to_one=clean)
    fields = _read_discrete({**given, **own})
    fields["spacing"]["multistep"] = True
  return {"sampler_options": options, **fields}


# By the class's name, as `System.schedulers` has it.
FLOW_EULER: Mapping[str, Scheduler] = {
  "FlowMatchEulerDiscreteScheduler": Scheduler(
    sampler="euler",
    fields=configs.Table(
      dict(
        num_train_timesteps=_TIMESTEPS,
        shift=configs.number(1.0, 1e-3, 1e3),
        # Only dynamic shifting looks at these.
        base_shift=configs.unused(0.5),
        max_shift=configs.unused(1.15),
        base_image_seq_len=configs.unused(256),
        max_image_seq_len=configs.unused(4096),
        time_shift_type=configs.unused("exponential"),
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
    ),
    read=lambda given: _read_flow(given, "shift", "flow_euler"),
  )
}
UNIPC: Mapping[str, Scheduler] = {
  "UniPCMultistepScheduler": Scheduler(
    sampler="unipc",
    fields=configs.Table(
      dict(
        num_train_timesteps=_TIMESTEPS,
        **_betas(0.0001, 0.02, "linear"),
        prediction_type=configs.word("epsilon", *_OBJECTIVES, _FLOW),
        solver_order=configs.whole(2, 1, 3),
        lower_order_final=configs.flag(True),
        use_flow_sigmas=configs.flag(False),
        flow_shift=configs.number(1.0, 1e-3, 1e3),
        timestep_spacing=configs.word("linspace", *_SPACINGS),
        steps_offset=_OFFSET,
        final_sigmas_type=configs.word("zero", "zero", "sigma_min"),
        rescale_betas_zero_snr=configs.flag(False),
        # Only thresholding and dynamic shifting look at these.
        dynamic_thresholding_ratio=configs.unused(0.995),
        sample_max_value=configs.unused(1.0),
        time_shift_type=configs.unused("exponential"),
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
    ),
    read=_read_unipc,
  )
}
