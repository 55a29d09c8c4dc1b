"""Laws of sizes: what divides is divided, what does not is refused."""

import numpy as np
import pytest

from vdit_jax.nn import sizes


def test_what_divides_is_divided():
  for n in range(1, 9):
    assert sizes.whole("height", 8 * n, 8) == n
  assert sizes.latent_space(16, 32, 48) == (2, 3)


@pytest.mark.parametrize(
  "size, near", [(1, 8), (11, 8), (13, 16), (0, 8), (-8, 8), (100, 96)]
)
def test_the_remedy_of_a_refused_size_is_the_nearest_taken(size, near):
  message = f"width must be a multiple of 8, got {size}; try {near}$"
  with pytest.raises(ValueError, match=message):
    sizes.whole("width", size, 8)
  assert sizes.whole("width", near, 8) == near // 8


def test_the_side_that_does_not_divide_is_named():
  with pytest.raises(ValueError, match="height must .* got 30; try 32"):
    sizes.latent_space(16, 30, 33)
  with pytest.raises(ValueError, match="width must .* got 33; try 32"):
    sizes.latent_space(16, 32, 33)


def _frames(latent, stride):
  """The frames of latent frames [B, f], as an autoencoder has them."""
  return np.concatenate(
    [latent[:, :1], np.repeat(latent[:, 1:], stride, axis=1)], axis=1
  )


@pytest.mark.parametrize("stride", [1, 2, 4])
def test_a_mask_of_whole_latent_frames_is_theirs(stride):
  rng = np.random.default_rng(0)
  latent = rng.random((8, 4)) < 0.5
  frames = _frames(latent, stride)
  assert frames.shape == (8, 3 * stride + 1)
  got = sizes.latent_mask(frames, stride)
  assert got.dtype == bool
  np.testing.assert_array_equal(got, latent)


def test_a_latent_frame_that_is_given_in_part_is_refused():
  frames = _frames(np.array([[True, False, True]]), 4)
  for frame in range(1, 9):
    part = frames.copy()
    part[0, frame] ^= True
    with pytest.raises(
      ValueError, match="frame_mask .* all 4 frames .*1..4, 5"
    ):
      sizes.latent_mask(part, 4)
  frames[0, 0] ^= True  # alone: it is a latent frame by itself
  got = sizes.latent_mask(frames, 4)
  np.testing.assert_array_equal(got, [[False, False, True]])


def test_an_image_is_a_latent_frame():
  mask = np.array([[True], [False]])
  np.testing.assert_array_equal(sizes.latent_mask(mask, 4), mask)
