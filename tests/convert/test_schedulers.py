"""Laws of scheduler_config.json: what it says is what is sampled."""

import dataclasses
import inspect

import numpy as np
import pytest

from vdit_jax.convert import configs, schedulers
from vdit_jax.diffusion import schedules
from vdit_jax.models import families

FLOW = "FlowMatchEulerDiscreteScheduler"
CLASSES = {
  **schedulers.FLOW_EULER,
  **schedulers.UNIPC,
  **{
    name: row
    for system in families.SYSTEMS.values()
    for name, row in system.schedulers.items()
  },
}
KNOWN = {
  "One": dataclasses.replace(
    schedulers.discrete(
      "ddim",
      beta_start=0.001,
      beta_end=0.02,
      beta_schedule="linear",
      snr_shift_scale=1.0,
    ),
    options={"eta": 1.0},
  ),
  "Two": schedulers.Scheduler(
    "euler", configs.Table({"a": configs.whole(1)}), lambda given: dict(given)
  ),
}


def read(**fields):
  return schedulers.recipe_fields({"_class_name": "One", **fields}, KNOWN)


def test_a_silent_file_is_the_defaults():
  got = read()
  assert got["sampler"] == "ddim" and got["objective"] == "eps"
  assert got["sampler_options"] == {"eta": 1.0}
  assert schedules.Schedule(**got["schedule"]) == schedules.Schedule(
    "linear", 1000, 0.001, 0.02, zero_terminal_snr=False, snr_shift=1.0
  )
  assert schedules.Spacing(**got["spacing"]) == schedules.Spacing("leading")


def test_every_field_reaches_its_own():
  got = read(
    num_train_timesteps=500,
    beta_start=0.002,
    beta_end=0.03,
    beta_schedule="scaled_linear",
    set_alpha_to_one=False,
    steps_offset=1,
    prediction_type="v_prediction",
    timestep_spacing="trailing",
    rescale_betas_zero_snr=True,
    snr_shift_scale=3.0,
  )
  assert got["objective"] == "v"
  schedule = schedules.Schedule(**got["schedule"])
  assert schedule == schedules.Schedule(
    "scaled_linear", 500, 0.002, 0.03, zero_terminal_snr=True, snr_shift=3.0
  )
  spacing = schedules.Spacing(**got["spacing"])
  assert spacing == schedules.Spacing("trailing", 1, clean_end=False)


def test_a_scheduler_without_options_sets_none():
  got = schedulers.recipe_fields({"_class_name": "Two", "a": 5}, KNOWN)
  assert got == {"sampler": "euler", "a": 5}


def test_options_are_a_copy():
  read()["sampler_options"]["eta"] = 0.0
  assert read()["sampler_options"] == {"eta": 1.0}


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"_class_name": "Three"}, "class 'Three', .* known are One, Two"),
    ({"prediction_type": "flow"}, "prediction_type must be one .* got 'flow'"),
    ({"beta_schedule": "cosine"}, "beta_schedule must be one .* got 'cosine'"),
    ({"thresholding": True}, "not honoured: 'thresholding'"),
    ({"beta_start": 0.5}, "beta_start must be at most beta_end 0.02, got 0.5"),
    ({"num_train_timesteps": 10**12}, "num_train_timesteps must be .* 100000"),
    ({"snr_shift_scale": float("nan")}, "snr_shift_scale must be .* got nan"),
    ({"trained_betas": [0.1]}, r"trained_betas=\[0.1\] \(only None"),
  ],
)
def test_what_cannot_be_honoured_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    read(**fields)


def _flow(**fields):
  config = {"_class_name": FLOW, **fields}
  return schedulers.recipe_fields(config, schedulers.FLOW_EULER)


@pytest.mark.parametrize("name", CLASSES)
def test_fields_and_defaults_are_those_of_diffusers(name):
  diffusers = pytest.importorskip("diffusers")
  parameters = inspect.signature(getattr(diffusers, name)).parameters
  row = CLASSES[name]
  table = row.fields
  assert not table.rows.keys() & table.fixed.keys()
  assert {**table.defaults, **table.fixed} == {
    k: p.default for k, p in parameters.items()
  }


def test_a_flow_is_read():
  assert _flow(shift=5, num_train_timesteps=500) == dict(
    sampler="euler",
    objective="flow",
    schedule=dict(kind="rectified_flow", num_timesteps=500),
    shift=5.0,
    spacing=dict(kind="flow_euler"),
  )
  assert _flow()["shift"] == 1.0


@pytest.mark.parametrize("fields", [{}, {"shift": 3.0}, {"shift": 8.0}])
def test_levels_of_a_flow_are_those_of_diffusers(fields):
  diffusers = pytest.importorskip("diffusers")
  theirs = getattr(diffusers, FLOW)(**fields)
  theirs.set_timesteps(7)
  found = _flow(**fields)
  table = schedules.sampling_table(
    schedules.Schedule(**found["schedule"]),
    7,
    found["shift"],
    spacing=schedules.Spacing(**found["spacing"]),
  )
  np.testing.assert_allclose(table.sigma, theirs.sigmas, rtol=1e-5)
  shown = theirs.timesteps / theirs.config.num_train_timesteps
  np.testing.assert_allclose(table.t[:-1], shown, rtol=1e-5)


@pytest.mark.parametrize(
  "field, value",
  [
    ("use_dynamic_shifting", True),
    ("shift_terminal", 0.1),
    ("invert_sigmas", True),
    ("use_karras_sigmas", True),
    ("use_exponential_sigmas", True),
    ("use_beta_sigmas", True),
    ("stochastic_sampling", True),
    ("unheard", 1),
  ],
)
def test_what_a_flow_does_not_honour_is_refused(field, value):
  with pytest.raises(ValueError, match=field):
    _flow(**{field: value})


def test_an_unknown_class_is_refused():
  config = {"_class_name": "UniPCMultistepScheduler"}
  with pytest.raises(ValueError, match=f"'UniPC.*known are {FLOW}"):
    schedulers.recipe_fields(config, schedulers.FLOW_EULER)
