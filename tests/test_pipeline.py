"""What a pipeline tells its denoiser of the clips to be made."""

import dataclasses

import numpy as np
import pytest

import sample
from vdit_jax import networks, pipeline, types
from vdit_jax.models import vdit

RECIPE = types.Recipe(
  denoisers=((0.0, 1.0, 1.0),),
  objective="flow",
  schedule={},
  sampler="euler",
  steps=1,
  shift=1.0,
  num_frames=9,
  height=32,
  width=48,
  fps=8.0,
)


def told(cond, numbers):
  cfg = dataclasses.replace(vdit.VARIANTS["digits"], cond=cond)
  modules = networks.Modules(None, None, vdit.Denoiser(cfg))
  pipe = pipeline.Pipeline(modules, {}, None, RECIPE, max_length=1)
  return pipe._told((9, 32, 48), 2, numbers)


def test_fps_and_size_are_told_unless_others_are():
  cond = told(("fps", "size", "motion_score"), None)["cond"]
  np.testing.assert_array_equal(cond.fps, [8, 8])
  np.testing.assert_array_equal(cond.size, [[32, 48]] * 2)
  np.testing.assert_array_equal(cond.scores, [[np.nan]] * 2)
  numbers = sample.read_numbers(["motion_score=5", "fps=12.5"])
  cond = told(("fps", "motion_score"), numbers)["cond"]
  np.testing.assert_array_equal(cond.fps, [12.5, 12.5])
  np.testing.assert_array_equal(cond.scores, [[5], [5]])
  assert cond.size is None


def test_numbers_that_a_denoiser_does_not_take_are_refused():
  assert told((), None) == told((), {}) == {}
  with pytest.raises(ValueError, match="was told none in training"):
    told((), {"fps": 8.0})
  with pytest.raises(ValueError, match=r"got \['beauty'\]"):
    told(("fps",), {"beauty": 1.0})
  for broken in ("motion_score", "motion_score=high"):
    with pytest.raises(ValueError, match="write motion_score=5"):
      sample.read_numbers([broken])
