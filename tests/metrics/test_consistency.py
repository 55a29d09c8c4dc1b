"""Consistency of features that are known."""

import numpy as np
import pytest

from vdit_jax.metrics import consistency


def test_turning_features_have_the_cosines_of_their_angles():
  angles = np.radians(10) * np.arange(5)
  features = np.stack([np.cos(angles), np.sin(angles)], -1)[None] * 3
  near = np.cos(np.radians(10))
  far = np.cos(np.radians([10, 20, 30, 40])).mean()
  np.testing.assert_allclose(consistency.neighbour(features), [near])
  np.testing.assert_allclose(consistency.first(features), [far])


def test_still_clips_are_consistent_and_black_features_are_not():
  still = np.ones((2, 4, 3))
  still[1] = 0
  np.testing.assert_allclose(consistency.neighbour(still), [1, 0])


def test_one_frame_is_refused():
  with pytest.raises(ValueError, match="two frames"):
    consistency.first(np.ones((2, 1, 3)))
