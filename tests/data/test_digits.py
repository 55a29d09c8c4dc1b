import itertools

import numpy as np
import pytest

from vdit_jax.data import digits

SIZE, DIGIT, FRAMES = 32, 16, 9


def paths(directions, speed=1.5, seed=0):
  rng = np.random.default_rng(seed)
  drawn = [
    digits.trajectory(rng, direction, speed, FRAMES, SIZE, SIZE, DIGIT)
    for direction in directions
  ]
  return np.stack(drawn)


def clip(scene, positions, seed=0):
  images, labels = digits.scans("train")
  rng = np.random.default_rng(seed)
  chosen = [rng.choice(np.flatnonzero(labels == d.digit)) for d in scene]
  colours = [digits.COLOURS[d.colour] for d in scene]
  return digits.render(images[chosen], colours, positions, SIZE, SIZE, DIGIT)


def centroids(video):
  ink = video.max(-1).astype(np.float64)  # [F, H, W]
  y, x = np.mgrid[: video.shape[1], : video.shape[2]]
  total = ink.sum((1, 2))
  centre = [(ink * axis).sum((1, 2)) / total for axis in (x, y)]
  return np.stack(centre, axis=-1)


def test_parse_inverts_caption_of_every_digit():
  for digit in digits.singles():
    assert digits.parse(digits.caption((digit,))) == (digit,)


def test_parse_inverts_caption_of_pairs():
  rng = np.random.default_rng(0)
  every = digits.singles()
  for first, second in rng.integers(len(every), size=(300, 2)):
    scene = (every[first], every[second])
    assert digits.parse(digits.caption(scene)) == scene


@pytest.mark.parametrize(
  "phrase",
  [
    "",
    "a red seven",
    "a orange three moving up",
    "an red three moving up",
    "a red seven moving still",
    "a red seven moving left up",
    "a pink seven moving up",
    "a red ten moving up",
    "a Red seven moving up",
  ],
)
def test_parse_names_the_phrase_it_does_not_understand(phrase):
  with pytest.raises(ValueError, match=f"understood: '{phrase}'"):
    digits.parse(f"a blue two standing still and {phrase}")


@pytest.mark.parametrize(
  "values", [("pink", 1, "up"), ("red", 10, "up"), ("red", 1, "north")]
)
def test_unknown_digit_is_refused(values):
  with pytest.raises(ValueError, match="must be one of"):
    digits.Digit(*values)


def test_colours_are_separable():
  for a, b in itertools.combinations(digits.COLOURS.values(), 2):
    assert np.linalg.norm(np.subtract(a, b)) >= 0.5


def test_directions_are_unit_steps():
  for name, step in digits.DIRECTIONS.items():
    assert np.hypot(*step) == pytest.approx(0 if name == "still" else 1)
  assert digits.DIRECTIONS["up"][1] < 0 < digits.DIRECTIONS["right"][0]


def test_one_in_five_is_held_out_and_every_pair_is_trained():
  every = digits.singles()
  trained = [digit for digit in every if not digits.held_out(digit)]
  assert len(every) - len(trained) == len(every) // 5 == 144

  def pairs(scene):
    of = [(d.colour, d.digit, d.direction) for d in scene]
    return [
      {(t[i], t[j]) for t in of} for i, j in itertools.combinations(range(3), 2)
    ]

  assert pairs(trained) == pairs(every)


@pytest.mark.parametrize("num_digits", [1, 2])
def test_held_out_prompts_are_distinct_and_balanced(num_digits):
  prompts = digits.held_out_prompts(72, seed=3, num_digits=num_digits)
  assert prompts == digits.held_out_prompts(72, seed=3, num_digits=num_digits)
  assert prompts != digits.held_out_prompts(72, seed=4, num_digits=num_digits)
  scenes = [digits.parse(prompt) for prompt in prompts]
  assert len(set(map(frozenset, scenes))) == 72
  members = [digit for scene in scenes for digit in scene]
  assert all(map(digits.held_out, members))
  assert all(len({d.colour for d in s}) == num_digits for s in scenes)
  for field, values in (
    ("colour", list(digits.COLOURS)),
    ("digit", range(10)),
    ("direction", list(digits.DIRECTIONS)),
  ):
    used = [sum(getattr(d, field) == v for d in members) for v in values]
    assert max(used) - min(used) <= 2


def test_held_out_prompts_end():
  assert len(set(digits.held_out_prompts(144, seed=0))) == 144
  with pytest.raises(ValueError, match="n must be 1..144.*got 145"):
    digits.held_out_prompts(145, seed=0)


def test_scans_of_splits_are_disjoint_and_stratified():
  splits = {split: digits.scans(split) for split in digits.SPLITS}
  seen = [{scan.tobytes() for scan in images} for images, _ in splits.values()]
  assert len(set.union(*seen)) == sum(map(len, seen)) == 5000
  for split, (_, labels) in splits.items():
    share = round(digits.SPLITS[split] * 500)
    assert np.bincount(labels).tolist() == [share] * 10


def test_scans_are_repeatable():
  images, labels = digits.scans("test")
  again, same = digits.scans.__wrapped__("test")
  np.testing.assert_array_equal(images, again)
  np.testing.assert_array_equal(labels, same)


@pytest.mark.parametrize("direction", digits.DIRECTIONS)
@pytest.mark.parametrize("number", [1, 4, 7])
def test_centroid_follows_the_trajectory(direction, number):
  digit = digits.Digit("cyan", number, direction)
  positions = paths([direction], seed=number)
  video = clip((digit,), positions, seed=number)
  assert abs(centroids(video) - positions[0]).max() < 0.3


@pytest.mark.parametrize("direction", digits.DIRECTIONS)
def test_trajectory_keeps_its_speed_and_the_box_inside(direction):
  for seed in range(20):
    path = paths([direction], speed=1.25, seed=seed)[0]
    speed = 0 if direction == "still" else 1.25
    steps = np.diff(path, axis=0)
    np.testing.assert_allclose(np.linalg.norm(steps, axis=1), speed, atol=1e-9)
    np.testing.assert_allclose(
      steps, speed * np.tile(digits.DIRECTIONS[direction], (8, 1)), atol=1e-9
    )
    assert path.min() - DIGIT / 2 >= -0.5 - 1e-9
    assert path.max() + DIGIT / 2 <= SIZE - 0.5 + 1e-9


def test_too_fast_a_trajectory_names_the_fastest():
  with pytest.raises(ValueError, match="at most 2 pixels.*got 2.1"):
    paths(["left"], speed=2.1)
  paths(["left"], speed=2)


@pytest.mark.parametrize("colour", digits.COLOURS)
def test_colour_is_the_named_one(colour):
  video = clip((digits.Digit(colour, 3, "up"),), paths(["up"]))
  ink = video.reshape(-1, 3).astype(np.float64)
  hue = ink.sum(0) / ink.sum(0).max()
  np.testing.assert_allclose(hue, digits.COLOURS[colour], atol=0.02)


def test_standing_still_repeats_the_frame():
  video = clip((digits.Digit("red", 5, "still"),), paths(["still"]))
  assert video.any()
  np.testing.assert_array_equal(video, np.repeat(video[:1], FRAMES, 0))


def test_two_digits_are_both_drawn():
  scene = (digits.Digit("red", 1, "still"), digits.Digit("blue", 2, "still"))
  left, right = np.full((FRAMES, 2), 7.5), np.full((FRAMES, 2), 23.5)
  video = clip(scene, np.stack([left, right]))
  assert video[:, :16, :16, 0].max() > 180 and not video[:, :16, :16, 2].any()
  assert video[:, 16:, 16:, 2].max() > 180 and not video[:, 16:, 16:, 0].any()


def test_later_digits_cover_earlier_ones():
  scene = (digits.Digit("red", 8, "still"), digits.Digit("blue", 8, "still"))
  images = digits.scans("train")[0][:1].repeat(2, 0)
  centre = np.full((2, 1, 2), 15.5)
  colours = [digits.COLOURS[digit.colour] for digit in scene]
  video = digits.render(images, colours, centre, SIZE, SIZE, DIGIT)
  row, column = np.unravel_index(video[0, ..., 2].argmax(), (SIZE, SIZE))
  assert video[0, row, column, 2] > 2 * video[0, row, column, 0]
