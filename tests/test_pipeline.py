"""What a pipeline tells its denoiser of the clips to be made."""

import dataclasses

import numpy as np
import pytest

from vdit_jax import pipeline, sample, sampling, types
from vdit_jax.models import networks
from vdit_jax.models.vdit import autoencoder as causal_vae
from vdit_jax.models.vdit import denoiser as vdit

RECIPE = types.Recipe(
  experts=(types.Expert(),),
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


@pytest.fixture
def told(monkeypatch):
  """What a denoiser that takes such numbers is told of two clips."""

  seen = []

  def stop(denoiser, how, params, text, noise, given, key, **options):
    seen.append(given.cond)
    raise RuntimeError("sampling begins")

  monkeypatch.setattr(sampling, "sample_latents", stop)
  autoencoder = causal_vae.Autoencoder(causal_vae.VARIANTS["digits"])
  text = types.Text(embeds=np.zeros((2, 1, 128)), mask=np.ones((2, 1), bool))

  def run(cond, numbers):
    cfg = dataclasses.replace(vdit.VARIANTS["digits"], cond=cond)
    modules = networks.gather(
      {"autoencoder": autoencoder, "denoiser": vdit.Denoiser(cfg)}
    )
    params = {"denoiser": {}}
    pipe = pipeline.Pipeline(modules, params, {}, RECIPE, {})
    with pytest.raises(RuntimeError, match="sampling begins"):
      pipe.generate(["one", "two"], text=text, numbers=numbers)
    return seen.pop()

  return run


def test_fps_and_size_are_told_unless_others_are(told):
  cond = told(("fps", "size", "motion_score"), None)
  np.testing.assert_array_equal(cond.fps, [8, 8])
  np.testing.assert_array_equal(cond.size, [[32, 48]] * 2)
  np.testing.assert_array_equal(cond.scores, [[np.nan]] * 2)
  numbers = sample.read_numbers(["motion_score=5", "fps=12.5"])
  cond = told(("fps", "motion_score"), numbers)
  np.testing.assert_array_equal(cond.fps, [12.5, 12.5])
  np.testing.assert_array_equal(cond.scores, [[5], [5]])
  assert cond.size is None


def test_numbers_that_a_denoiser_does_not_take_are_refused(told):
  assert told((), None) is told((), {}) is None
  with pytest.raises(ValueError, match="was told none in training"):
    told((), {"fps": 8.0})
  with pytest.raises(ValueError, match=r"got \['beauty'\]"):
    told(("fps",), {"beauty": 1.0})
  for broken in ("motion_score", "motion_score=high"):
    with pytest.raises(ValueError, match="write motion_score=5"):
      sample.read_numbers([broken])
