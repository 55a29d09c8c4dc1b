"""Worlds of digits: walls turn back, cameras move what is seen, ground too."""

import numpy as np
import pytest

from vdit_jax.data import digit_worlds, digits, moving_digits

SIZE = HEIGHT, WIDTH = 32, 48
BOX = 14
CONFIG = moving_digits.MovingDigits.builder_configs["tiny_worlds"]


@pytest.mark.parametrize("direction", digits.DIRECTIONS)
def test_walls_turn_digits_back(direction):
  rng, speed = np.random.default_rng(0), 1.5
  low, high = (BOX - 1) / 2, np.array([WIDTH, HEIGHT]) - (BOX + 1) / 2
  for _ in range(20):
    path = digit_worlds.bouncing(rng, direction, speed, 65, *SIZE, BOX)
    assert (path >= low - 1e-9).all() and (path <= high + 1e-9).all()
    step = speed * np.array(digits.DIRECTIONS[direction])
    np.testing.assert_allclose(np.diff(path[:5], axis=0), [step] * 4)
    steps = np.abs(np.diff(path, axis=0))
    assert (steps <= np.abs(step) + 1e-9).all()  # slower only at a wall
    assert (np.isclose(steps, np.abs(step)).all(1)).mean() > 0.7


def test_a_camera_moves_what_is_seen_the_other_way():
  camera = digit_worlds.Camera(x=0.5, y=-0.25)
  still = np.tile([20.0, 10.0], (9, 1))
  seen = camera.project(still, *SIZE)
  np.testing.assert_allclose(np.diff(seen, axis=0), [[-0.5, 0.25]] * 8)
  assert digit_worlds.Camera().project(still, *SIZE) == pytest.approx(still)


def test_a_zoom_leaves_the_middle_where_it_is():
  camera = digit_worlds.Camera(zoom=2.0)
  middle = np.tile([(WIDTH - 1) / 2, (HEIGHT - 1) / 2], (9, 1))
  np.testing.assert_allclose(camera.project(middle, *SIZE), middle)
  away = camera.project(middle + [1.0, 0.0], *SIZE) - middle
  np.testing.assert_allclose(away[:, 0], camera.scale(9))


def test_ground_moves_as_the_digits_on_it():
  camera = digit_worlds.Camera(x=1.0, y=-2.0)
  seen = digit_worlds.ground(np.random.default_rng(0), camera, 5, *SIZE)
  assert 0 <= seen.min() and seen.max() <= digit_worlds.BRIGHTEST
  assert seen.std() > 0.02
  for frame in range(4):  # a pixel to the left, two down
    np.testing.assert_allclose(
      seen[frame + 1, 2:, :-1], seen[frame, :-2, 1:], atol=1e-6
    )


def test_a_digit_grows_with_the_zoom():
  images, _ = digits.scans("validation")
  scale = np.array([0.75, 1.0, 1.5])
  clip = digits.render(
    images[:1],
    [digits.COLOURS["white"]],
    np.tile([24.0, 16.0], (1, 3, 1)),
    *SIZE,
    BOX,
    scale=scale,
  )
  ink = clip[..., 0].astype(float).sum((1, 2))
  np.testing.assert_allclose(ink / ink[1], scale**2, rtol=0.05)


def test_records_have_what_the_config_says():
  records = [moving_digits.record(CONFIG, "train", i) for i in range(300)]
  shapes = {record["video"].shape[:3] for record in records}
  assert shapes == set(CONFIG.shapes)
  for record in records:
    camera = [record[name] for name in digit_worlds.CAMERA]
    box = [record[name] for name in digit_worlds.BOX]
    assert np.isnan(camera).all() or np.isfinite(camera).all()
    assert np.isnan(box).all() or np.isfinite(box).all()
    scene = digits.parse(record["captions"][0])
    assert not any(digits.held_out(digit) for digit in scene)
    grey = all(c.endswith(digits.ON_GROUND) for c in record["captions"])
    assert grey == ((record["video"].max(-1) > 5).mean() > 0.5)
    if any(np.nan_to_num(camera)):
      assert grey and np.isnan(box).all()
  told = np.array([np.isfinite(record["camera_x"]) for record in records])
  moved = np.array(
    [bool(np.nan_to_num(record["camera_x"])) for record in records]
  )
  assert 0.4 < told.mean() < 0.6 and moved.sum() > 5


def test_a_box_holds_its_digit_and_goes_its_way():
  found = 0
  for index in range(300):
    record = moving_digits.record(CONFIG, "train", index)
    left, top, right, bottom, dx, dy = (record[n] for n in digit_worlds.BOX)
    scene = digits.parse(record["captions"][0])
    if np.isnan(left) or len(scene) > 1:
      continue
    video = record["video"].max(-1).astype(float) * (
      record["video"].max(-1) > 90
    )
    span = lambda n: np.arange(n)
    for frame, moved in ((video[0], 0), (video[-1], 1)):
      y, x = (
        frame.sum(axis) @ span(n) / frame.sum()
        for axis, n in ((1, frame.shape[0]), (0, frame.shape[1]))
      )
      centre = (
        (left + right - 1) / 2 + moved * dx,
        (top + bottom - 1) / 2 + moved * dy,
      )
      assert np.hypot(x - centre[0], y - centre[1]) < 1.5
    found += 1
  assert found > 20


def test_other_words_say_no_more_than_the_caption():
  scene = (
    digits.Digit("orange", 8, "up left"),
    digits.Digit("red", 0, "still"),
  )
  said = digits.rewordings(scene)
  assert len(set(said)) == len(said)
  assert (
    "an eight in orange moving up left and a zero in red standing still" in said
  )
  assert "an orange 8 moving up left and a red 0 standing still" in said
  words = {w for text in said for w in text.split()}
  assert not words & {"green", "one", "moving-still", "moves-still"}
  assert digits.parse(digits.caption(scene) + digits.ON_GROUND) == scene
