"""Released schedulers' configs: diffusers' defaults, levels and refusals."""

import inspect

import numpy as np
import pytest

from vdit_jax.convert import schedulers
from vdit_jax.diffusion import schedules
from vdit_jax.models import families

FLOW = "FlowMatchEulerDiscreteScheduler"
CLASSES = schedulers.FLOW_EULER | {
  name: row
  for system in families.SYSTEMS.values()
  for name, row in system.schedulers.items()
}


def _flow(**fields):
  config = {"_class_name": FLOW, **fields}
  return schedulers.recipe_fields(config, schedulers.FLOW_EULER)


@pytest.mark.parametrize("name", CLASSES)
def test_fields_and_defaults_are_those_of_diffusers(name):
  diffusers = pytest.importorskip("diffusers")
  parameters = inspect.signature(getattr(diffusers, name)).parameters
  row = CLASSES[name]
  assert not row.defaults.keys() & row.fixed.keys()
  assert {**row.defaults, **row.fixed} == {
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
