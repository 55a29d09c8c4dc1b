"""Edits: which frames are given and asked for, windows that go on."""

import numpy as np
import pytest

from vdit_jax import editing

H, W = 8, 12


def _clip(frames, value=None):
  rng = np.random.default_rng(frames)
  clip = rng.uniform(-1, 1, (frames, H, W, 3)).astype(np.float32)
  return clip if value is None else np.full_like(clip, value)


class Counting:
  """Stands in for a pipeline: each new frame is the one before it and 0.01."""

  def __init__(self):
    self.asked = []

  def generate(self, prompts, **asked):
    self.asked.append(asked)
    frames, mask = np.array(asked["frames"]), np.asarray(asked["frame_mask"])[0]
    order = range(len(mask)) if mask[0] else range(len(mask) - 1, -1, -1)
    step = 0.01 if mask[0] else -0.01
    before = None
    for i in order:
      if not mask[i]:
        frames[:, i] = frames[:, before] + step
      before = i
    return frames


def test_key_frames_are_given_where_they_are_told():
  images = _clip(3)
  edit = editing.key_frames({0: images[0], 5: images[1], -1: images[2]}, 9)
  assert edit.size == (9, H, W)
  np.testing.assert_array_equal(edit.mask.nonzero()[0], [0, 5, 8])
  np.testing.assert_array_equal(edit.frames[[0, 5, 8]], images)
  asked = edit.of(4)
  assert asked["frames"].shape == (4, 9, H, W, 3)
  assert asked["frame_mask"].shape == (4, 9) and asked["strength"] == 1


@pytest.mark.parametrize(
  "places, match",
  [
    ((), "at least one"),
    ((9,), "0 to 8"),
    ((-10,), "0 to 8"),
    ((8, -1), "differ"),
  ],
)
def test_key_frames_that_cannot_be_are_refused(places, match):
  image = _clip(1)[0]
  with pytest.raises(ValueError, match=match):
    editing.key_frames(dict.fromkeys(places, image), 9)


def test_what_joins_clips_lies_between_them():
  a, b = _clip(4), _clip(3)
  edit = editing.join(a, b, between=6)
  np.testing.assert_array_equal(edit.frames[:4], a)
  np.testing.assert_array_equal(edit.frames[10:], b)
  assert (~edit.mask).nonzero()[0].tolist() == list(range(4, 10))
  assert np.arange(13)[edit.kept].tolist() == list(range(4, 10))
  with pytest.raises(ValueError, match="one size"):
    editing.join(a, b[:, :4], 6)


def test_a_loop_s_first_frame_follows_its_last():
  image = _clip(1)[0]
  edit = editing.loop(image, 8)
  assert edit.size == (9, H, W)
  np.testing.assert_array_equal(edit.mask.nonzero()[0], [0, 8])
  assert np.arange(9)[edit.kept].tolist() == list(range(8))


def test_a_clip_is_inside_what_is_made_around_it():
  video = _clip(5)
  edit = editing.expand(video, 1, 2, 3, 0)
  assert edit.size == (5, H + 2, W + 4)
  np.testing.assert_array_equal(edit.frames[:, 2:, 1:-3], video)
  assert edit.mask[:, 2:, 1:-3].all() and edit.mask.sum() == video[..., 0].size
  for sides in ((0, 0, 0, 0), (-1, 2, 0, 0)):
    with pytest.raises(ValueError, match="expand must add"):
      editing.expand(video, *sides)


def test_clips_become_whole_latent_frames():
  edit = editing.whole(editing.join(_clip(3), _clip(2), 5), 4)
  assert edit.size[0] == 13
  assert np.arange(13)[edit.kept].tolist() == list(range(3, 8))
  assert not edit.mask[10:].any()
  assert editing.whole(edit, 4) is edit


@pytest.mark.parametrize("number", [1, 8, 9, 30])
def test_windows_go_on_from_each_other(number):
  pipe, start = Counting(), _clip(6, 0.0)[None]
  found = list(
    editing.extend(
      pipe, ["a"], start, number, window=13, given=5, seeds=[3], steps=7
    )
  )
  video = np.concatenate(found, 1)
  assert video.shape[1] == number
  wanted = 0.01 * (1 + np.arange(number))
  np.testing.assert_allclose(video[0, :, 0, 0, 0], wanted, atol=1e-5)
  assert max(x.shape[1] for x in found) <= 8
  seeds = [asked["seed"] for asked in pipe.asked]
  assert len({tuple(seed) for seed in seeds}) == len(seeds) == -(-number // 8)
  assert seeds[0] == [3] and pipe.asked[0]["steps"] == 7


def test_windows_lead_up_to_a_clip():
  pipe, start = Counting(), _clip(6, 0.0)[None]
  found = list(
    editing.extend(
      pipe, ["a"], start, 11, window=13, given=5, seeds=[0], backwards=True
    )
  )
  video = np.concatenate(found[::-1], 1)
  wanted = 0.01 * np.arange(-11, 0)
  np.testing.assert_allclose(video[0, :, 0, 0, 0], wanted, atol=1e-5)


def test_a_clip_shorter_than_what_is_given_is_given_whole():
  pipe = Counting()
  list(
    editing.extend(
      pipe, ["a"], _clip(2, 0.0)[None], 4, window=9, given=5, seeds=[0]
    )
  )
  np.testing.assert_array_equal(
    np.asarray(pipe.asked[0]["frame_mask"])[0].nonzero()[0], [0, 1]
  )


@pytest.mark.parametrize(
  "changes, match",
  [
    (dict(given=9), "1 to 8"),
    (dict(given=0), "1 to 8"),
    (dict(number=0), "1 or"),
  ],
)
def test_windows_that_cannot_be_are_refused(changes, match):
  asked = dict(number=4, window=9, given=5, seeds=[0]) | changes
  with pytest.raises(ValueError, match=match):
    list(editing.extend(Counting(), ["a"], _clip(6)[None], **asked))
