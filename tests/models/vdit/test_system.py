"""Laws of our system: what it is told, and what may be given."""

import types as python
from unittest import mock

import numpy as np
import pytest

from vdit_jax.models import families, system
from vdit_jax.models.vdit import autoencoder, denoiser
from vdit_jax.models.vdit import system as vdit

SMALL = dict(width=32, depth=1, heads=1, mlp_width=32, text_width=8)


def test_of_what_is_known_only_what_is_taken_is_told():
  cfg = denoiser.Config(cond=("fps", "motion"), **SMALL)
  known = {"fps": 8.0, "height": 32.0, "width": 32.0}
  cond = vdit.SYSTEM.number_cond(cfg, 2, known, {"motion": 3.0})
  np.testing.assert_array_equal(cond.fps, [8, 8])
  np.testing.assert_array_equal(cond.scores, [[3], [3]])
  assert cond.size is None
  assert vdit.SYSTEM.numbers(cfg) == ("fps", "motion")


def test_what_is_asked_for_goes_before_what_is_known():
  cfg = denoiser.Config(cond=("fps",), **SMALL)
  cond = vdit.SYSTEM.number_cond(cfg, 1, {"fps": 8.0}, {"fps": 24.0})
  np.testing.assert_array_equal(cond.fps, [24])


def test_numbers_that_it_was_not_told_in_training_are_refused():
  cfg = denoiser.Config(cond=("fps",), **SMALL)
  with pytest.raises(ValueError, match=r"\['fps'\].*got \['motion'\]"):
    vdit.SYSTEM.number_cond(cfg, 1, {}, {"motion": 1.0})
  bare = denoiser.Config(**SMALL)
  assert vdit.SYSTEM.number_cond(bare, 1, {"fps": 8.0}, {}) is None
  with pytest.raises(ValueError, match="numbers must be None, got .*'fps'"):
    vdit.SYSTEM.number_cond(bare, 1, {}, {"fps": 8.0})


def test_any_whole_latent_frames_may_be_given():
  cfg = autoencoder.VARIANTS["digits"]
  modules = system.Modules(
    vdit.SYSTEM,
    {
      "autoencoder": autoencoder.Autoencoder(cfg),
      "denoiser": denoiser.Denoiser(denoiser.Config(**SMALL)),
    },
  )
  assert cfg.time_stride == 4
  apply = mock.Mock(return_value="latents")
  mask = np.array([[False, *[True] * 4, *[False] * 4]])
  frames = np.zeros((1, 9, 8, 8, 3), np.float32)
  given = vdit.SYSTEM.condition(modules, apply, frames, mask, None)
  assert given.latents == "latents" and given.cond is None
  np.testing.assert_array_equal(given.mask, [[False, True, False]])
  assert apply.call_args.kwargs == {"method": "encode"}
  mask[0, 1] = False
  with pytest.raises(ValueError, match="all 4 frames"):
    vdit.SYSTEM.condition(modules, apply, frames, mask, None)


def test_it_is_ours_learns_its_null_and_needs_nothing():
  assert families.OURS is vdit.SYSTEM and vdit.SYSTEM.nulls == {"learned"}
  assert not vdit.SYSTEM.pipelines  # nobody else has released one
  cfg = python.SimpleNamespace()
  assert not vdit.SYSTEM.needs(cfg)
  assert [b.text for b in vdit.SYSTEM.branches(cfg)] == ["negative", "prompt"]
