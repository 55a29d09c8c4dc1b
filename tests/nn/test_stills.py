"""Stills: each frame alone, laid beside the latents of its latent frame."""

import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax.nn import stills

B, N, C = 2, 4, 3


def _every(f, h=3, w=2):
  rng = np.random.default_rng(0)
  F = N * (f - 1) + 1
  known = rng.random((B, F, h, w)) < 0.5
  return rng.standard_normal((B, F, h, w, C)).astype(np.float32), known


@pytest.mark.parametrize("f", [1, 2, 4])
def test_every_frame_has_a_place_of_its_own(f):
  values, known = _every(f)
  cond = stills.lay_out(values, known, N)
  h, w = known.shape[2:]
  assert cond.latents.shape == (B, f, h, w, N * C)
  assert cond.mask.shape == (B, f, h, w, N)
  for frame in range(known.shape[1]):
    j, slot = (frame + N - 1) // N, (frame + N - 1) % N
    shown = cond.latents[:, j, :, :, slot * C : (slot + 1) * C]
    wanted = np.where(known[:, frame, ..., None], values[:, frame], 0)
    np.testing.assert_array_equal(shown, wanted)
    np.testing.assert_array_equal(cond.mask[:, j, :, :, slot], known[:, frame])
  np.testing.assert_array_equal(cond.mask[:, 0, :, :, : N - 1], 0)


def test_a_latent_is_whole_with_all_its_frames():
  values, known = _every(3)
  known[:] = False
  known[0, 0] = True  # the first frame is a latent frame
  known[0, 1:5, 0] = True
  known[1, 5:8] = True  # three of four
  found = np.asarray(stills.whole(stills.lay_out(values, known, N)))
  wanted = np.zeros_like(found)
  wanted[0, 0] = True
  wanted[0, 1, 0] = True
  np.testing.assert_array_equal(found, wanted)


def test_cells_beside_what_is_not_given_are_left_out():
  pixels = np.ones((1, 12, 16), bool)
  np.testing.assert_array_equal(stills.cells(pixels, (3, 4)), True)
  pixels[0, 0, 15] = False  # of the corner's cell
  found = np.asarray(stills.cells(pixels, (3, 4)))[0]
  wanted = np.ones((3, 4), bool)
  wanted[:2, 2:] = False
  np.testing.assert_array_equal(found, wanted)


def test_frames_are_encoded_alone():
  seen = []

  def apply(video, method):
    seen.append((video.shape, method))
    return video[:, :, ::4, ::4, :1]

  video = jnp.asarray(np.random.default_rng(0).random((B, 5, 8, 12, 3)))
  found = stills.encode(apply, video)
  assert seen == [((B * 5, 1, 8, 12, 3), "encode")]
  np.testing.assert_array_equal(found, video[:, :, ::4, ::4, :1])
