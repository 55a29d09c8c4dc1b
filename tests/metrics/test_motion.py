"""Smoothness and amount of motion of videos that move in a known way."""

import numpy as np
import pytest
from scipy import ndimage

from vdit_jax.metrics import motion

_SIDE = motion.SIDE  # of the clips: nothing is resized


def _texture(seed=0, size=200):
  noise = np.random.default_rng(seed).normal(size=(size, size, 3))
  smooth = ndimage.gaussian_filter(noise, (2, 2, 0))
  return np.clip(smooth / np.abs(smooth).max() * 2, -1, 1).astype(np.float32)


def _moving(path):
  """A window that moves over a texture: [1, F, 96, 96, 3]."""
  image = _texture()
  frames = [image[y : y + _SIDE, x : x + _SIDE] for y, x in path]
  return np.stack(frames)[None]


def _straight(velocity, frames=5):
  return [(50 + velocity[0] * i, 50 + velocity[1] * i) for i in range(frames)]


@pytest.mark.parametrize("velocity", [(0, 0), (2, 0), (0, -3), (4, 3)])
def test_steady_motion_is_smooth_and_its_speed_is_seen(velocity):
  smoothness, amount = motion.measure(_moving(_straight(velocity)))
  assert smoothness[0] > 0.995
  speed = np.hypot(*velocity) / _SIDE
  np.testing.assert_allclose(amount, [speed], atol=0.1 / _SIDE)


def test_jerks_flicker_and_cuts_are_not_smooth():
  steady = _moving(_straight((1, 1), 6))
  jerky = _moving([(50, 50), (53, 52), (50, 55), (54, 51), (49, 56), (55, 50)])
  flicker = steady * np.array([1, 0.5] * 3)[None, :, None, None, None]
  cut = steady.copy()
  cut[:, 3:] = -cut[:, 3:]
  clips = np.concatenate([steady, jerky, flicker, cut]).astype(np.float32)
  smoothness, _ = motion.measure(clips)
  assert smoothness[0] > smoothness[1:].max() + 0.01


def test_one_moving_object_on_a_plain_ground_is_seen():
  video = np.full((1, 5, _SIDE, _SIDE, 3), -1, np.float32)
  for i in range(5):
    patch = _texture()[:30, :30]
    video[0, i, 20 : 20 + 30, 10 + 3 * i : 40 + 3 * i] = patch
  smoothness, amount = motion.measure(video)
  assert smoothness[0] > 0.98
  np.testing.assert_allclose(amount, [3 / _SIDE], rtol=0.05)


def test_a_thin_object_is_not_jumped_over():
  """A bright line of two pixels on black: the ground agrees with itself."""
  video = np.full((1, 5, _SIDE, _SIDE, 3), -1, np.float32)
  for i in range(5):
    video[0, i, 20:70, 40 + 2 * i : 42 + 2 * i] = 1
  smoothness, amount = motion.measure(video)
  assert smoothness[0] > 0.99
  np.testing.assert_allclose(amount, [2 / _SIDE], rtol=0.05)


def test_size_does_not_matter():
  """Every pixel made four: the same speed in frames' sides."""
  small = _moving(_straight((2, 2)))
  large = small.repeat(2, axis=2).repeat(2, axis=3)
  one, two = (motion.measure(x)[1] for x in (small, large))
  np.testing.assert_allclose(one, two, rtol=0.05)


def test_two_frames_are_refused():
  with pytest.raises(ValueError, match="at least 3 frames"):
    motion.measure(np.zeros((1, 2, 32, 32, 3), np.float32))
