"""Positions of given frames: from the first, from the last, and refused."""

import numpy as np
import pytest

from vdit_jax.models import frame_positions


@pytest.mark.parametrize(
  ("positions", "num_frames", "found"),
  [((0,), 1, [0]), ((0, -1), 9, [0, 8]), ((0, -1), 2, [0, 1]), ((2,), 5, [2])],
)
def test_positions_from_the_last_are_counted(positions, num_frames, found):
  assert frame_positions.resolve(positions, num_frames) == found
  (places,) = np.nonzero(frame_positions.mask(positions, num_frames))
  assert places.tolist() == found


def test_no_position_is_no_frame():
  assert not frame_positions.mask((), 5).any()


@pytest.mark.parametrize(
  ("positions", "num_frames"), [((0, -1), 1), ((5,), 5), ((-2,), 1)]
)
def test_too_few_frames_are_refused(positions, num_frames):
  with pytest.raises(ValueError, match="num_frames must be enough"):
    frame_positions.mask(positions, num_frames)


@pytest.mark.parametrize(
  ("positions", "given", "said"),
  [
    ((0,), [[1, 0, 0], [1, 0, 1]], "first frame of every.*frames \\[0, 2\\]"),
    ((0,), [[0, 0, 0]], "first frame of every"),
    ((0, -1), [[1, 0, 0]], "first and the last frames of every"),
  ],
)
def test_other_frames_than_the_needed_are_refused(positions, given, said):
  with pytest.raises(ValueError, match=f"this model is given the {said}"):
    frame_positions.check("this model", np.array(given, bool), positions)
  wanted = np.tile(frame_positions.mask(positions, 3), (2, 1))
  frame_positions.check("this model", wanted, positions)
