"""Bytes of colours; sheets show what they are given."""

import jax.numpy as jnp
import numpy as np

from vdit_jax.media import sheets


def test_bytes_are_rounded_and_clipped():
  values = np.array([-2, -1, 0, 0.5, 1, 2], np.float32)
  video = np.broadcast_to(values[:, None, None], (6, 1, 3)).reshape(6, 1, 1, 3)
  expected = [0, 0, 128, 191, 255, 255]
  assert sheets.to_uint8(video)[:, 0, 0, 0].tolist() == expected
  assert sheets.to_uint8(jnp.asarray(video, jnp.bfloat16)).dtype == np.uint8


def test_bytes_survive_the_way_to_float_and_back():
  video = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 16, 16, 3)
  np.testing.assert_array_equal(sheets.to_uint8(video / 127.5 - 1), video)


def test_a_sheet_has_a_row_a_video_and_spaced_frames():
  shades = np.arange(9, dtype=np.uint8) * 20
  clip = np.broadcast_to(shades[:, None, None, None], (9, 4, 6, 3))
  sheet = sheets.draw(np.stack([clip, clip]), columns=3, factor=2)
  assert sheet.shape == (2 * 8 + 2, 3 * 12 + 2 * 2, 3)
  assert sheet[0, [0, 14, 28], 0].tolist() == [0, 80, 160]
  assert (sheet[0, 12:14] == 255).all() and (sheet[8:10] == 255).all()


def test_captions_are_drawn_whole_above_their_rows():
  videos = np.zeros((2, 3, 8, 8, 3), np.uint8)
  plain = sheets.draw(videos)
  short = sheets.draw(videos, ["a red one", ""])
  long = sheets.draw(videos, ["a red one moving " * 8, ""])
  assert plain.shape[0] < short.shape[0] < long.shape[0]
  assert (short[-8:, :28] == plain[-8:]).all()
  assert (short[:14, :28] < 128).any() and (short[:2, :, :] == 255).any()
