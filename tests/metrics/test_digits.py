"""Clips drawn from real scans are read right, and each fault is noticed."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy import ndimage

from vdit_jax.data import digits as scenes
from vdit_jax.metrics import classifier as classifiers
from vdit_jax.metrics import digits

SIZE, F, H, W = 14, 9, 32, 32
WORDS = list(scenes.DIRECTIONS)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
  return tmp_path_factory.mktemp("classifier") / "digits.npz"


@pytest.fixture(scope="module")
def classifier(path):
  return classifiers.load(path, SIZE, steps=700)


def _scan(rng, digit):
  images, labels = scenes.scans("test")
  return images[rng.choice(np.flatnonzero(labels == digit))]


def _path(rng, direction):
  speed = rng.choice([0.75, 1.0, 1.5])
  return scenes.trajectory(rng, direction, speed, F, H, W, SIZE)


def _render(images, scene, paths):
  colours = [scenes.COLOURS[digit.colour] for digit in scene]
  return scenes.render(images, colours, paths, H, W, SIZE) / 127.5 - 1


def _clip(rng, scene):
  """Draws a scene whose digits are apart in some frame [F, H, W, 3]."""
  images = [_scan(rng, digit.digit) for digit in scene]
  for _ in range(100):
    paths = np.stack([_path(rng, digit.direction) for digit in scene])
    gap = np.linalg.norm(paths[0] - paths[-1], axis=-1).max()
    if len(scene) == 1 or gap >= SIZE:
      break
  return _render(images, scene, paths)


@pytest.fixture(scope="module")
def singles(classifier):
  """Two digits in every colour and direction: clips, prompts, readings."""
  pairs = itertools.product(scenes.COLOURS, WORDS, range(2))
  prompted = [
    (scenes.Digit(colour, index % 10, direction),)
    for index, (colour, direction, _) in enumerate(pairs)
  ]
  return _drawn(classifier, prompted, seed=0)


@pytest.fixture(scope="module")
def doubles(classifier):
  """Two digits of different colours a clip: clips, prompts, readings."""
  rng = np.random.default_rng(1)
  prompted = []
  for _ in range(144):
    colours = rng.permutation(list(scenes.COLOURS))[:2].tolist()
    prompted.append(
      tuple(
        scenes.Digit(colour, int(rng.integers(10)), str(rng.choice(WORDS)))
        for colour in colours
      )
    )
  return _drawn(classifier, prompted, seed=2)


def _drawn(classifier, prompted, seed):
  rng = np.random.default_rng(seed)
  videos = np.stack([_clip(rng, scene) for scene in prompted])
  return videos, prompted, digits.read(videos, classifier)


def _score(readings, prompted):
  return digits.score(readings, [scenes.caption(scene) for scene in prompted])


def _right(readings, prompted):
  """The clips on which nothing is wrong: readings and scenes."""
  scores = _score(readings, prompted)
  fine = scores["all"] & scores["consistency"]
  assert fine.mean() > 0.85
  return (
    [reading for reading, ok in zip(readings, fine, strict=True) if ok],
    [scene for scene, ok in zip(prompted, fine, strict=True) if ok],
  )


def _shares(scores):
  return {name: float(scores[name].mean()) for name in digits.SHARES}


@pytest.mark.slow
@pytest.mark.parametrize("clips", ["singles", "doubles"])
def test_real_clips_are_read_right(clips, request):
  _, prompted, readings = request.getfixturevalue(clips)
  shares = _shares(_score(readings, prompted))
  print(clips, shares)
  for name in ("colour", "direction", "count"):
    assert shares[name] >= 0.99, shares
  assert shares["identity"] >= (0.95 if clips == "singles" else 0.92), shares
  assert shares["consistency"] >= 0.9, shares


@pytest.mark.slow
@pytest.mark.parametrize("clips", ["singles", "doubles"])
@pytest.mark.parametrize("fault", ["noise", "blur", "offset"])
def test_faint_faults_of_a_decoder_are_read_over(
  clips, fault, request, classifier
):
  videos, prompted, _ = request.getfixturevalue(clips)
  rng = np.random.default_rng(3)
  if fault == "noise":
    seen = videos + rng.normal(size=videos.shape) * 2 * 10 ** (-27 / 20)
  elif fault == "blur":
    seen = ndimage.gaussian_filter(videos, (0, 0, 0.8, 0.8, 0))
  else:
    seen = 0.85 * videos
  shares = _shares(_score(digits.read(seen, classifier), prompted))
  print(clips, fault, shares)
  for name in ("colour", "direction", "count"):
    assert shares[name] >= 0.97, shares
  assert shares["identity"] >= 0.9, shares


def _other(value, values):
  values = list(values)
  return values[(values.index(value) + 1) % len(values)]


@pytest.mark.slow
@pytest.mark.parametrize(
  "check, changed",
  [
    ("identity", lambda d: {"digit": (d.digit + 1) % 10}),
    ("colour", lambda d: {"colour": _other(d.colour, scenes.COLOURS)}),
    ("direction", lambda d: {"direction": _other(d.direction, WORDS)}),
  ],
)
def test_one_wrong_thing_fails_its_check_alone(singles, check, changed):
  readings, prompted = _right(singles[2], singles[1])
  wrong = [
    (scenes.Digit(**(vars(scene[0]) | changed(scene[0]))),)
    for scene in prompted
  ]
  scores = _score(readings, wrong)
  for name in digits.SHARES:
    assert (scores[name] == (name not in (check, "all"))).all(), name


@pytest.mark.slow
def test_a_digit_too_many_fails_the_count_alone(doubles):
  readings, prompted = _right(doubles[2], doubles[1])
  scores = _score(readings, [scene[:1] for scene in prompted])
  for name in digits.SHARES:
    assert (scores[name] == (name not in ("count", "all"))).all(), name


@pytest.mark.slow
def test_a_digit_too_few_fails_the_count_and_what_it_should_show(singles):
  readings, prompted = _right(singles[2], singles[1])
  more = [
    (*scene, scenes.Digit(_other(scene[0].colour, scenes.COLOURS), 3, "up"))
    for scene in prompted
  ]
  scores = _score(readings, more)
  for name in digits.SHARES:
    assert (scores[name] == (name == "consistency")).all(), name


@pytest.mark.slow
def test_two_wrong_colours_are_matched_by_their_digits(doubles):
  readings, prompted = _right(doubles[2], doubles[1])
  checked = 0
  for reading, scene in zip(readings, prompted, strict=True):
    unused = [c for c in scenes.COLOURS if c not in {d.colour for d in scene}]
    wrong = [
      scenes.Digit(colour, digit.digit, digit.direction)
      for colour, digit in zip(unused, scene, strict=False)
    ]
    scores = _score([reading], [tuple(wrong)])
    assert scores["identity"] and scores["count"] and not scores["colour"]
    checked += bool(scores["direction"])
  assert checked > 0.8 * len(readings)  # equal digits leave the choice open


@pytest.mark.slow
def test_two_digits_of_one_colour_are_counted(classifier):
  rng = np.random.default_rng(4)
  scene = (scenes.Digit("red", 3, "still"), scenes.Digit("red", 8, "still"))
  places = np.array([[7.0, 7.0], [23.0, 23.0]])[:, None].repeat(F, 1)
  images = [[_scan(rng, d.digit) for d in scene] for _ in range(16)]
  videos = np.stack([_render(pair, scene, places) for pair in images])
  readings = digits.read(videos, classifier)
  assert [reading.count for reading in readings] == [2] * 16


@pytest.mark.slow
def test_the_thinnest_digit_is_seen_beside_the_fattest(classifier):
  images = scenes.scans("test")[0]
  ink = [scenes.resize(image, SIZE).sum() for image in images]
  pair = [images[np.argmin(ink)], images[np.argmax(ink)]]
  scene = (scenes.Digit("red", 1, "still"), scenes.Digit("green", 0, "still"))
  places = np.array([[7.0, 7.0], [23.0, 23.0]])[:, None].repeat(F, 1)
  reading = digits.read(_render(pair, scene, places)[None], classifier)[0]
  assert [seen.colour for seen in reading.objects] == ["green", "red"]


def _twins(classifier, other):
  """Pairs of clips on one path that are read right, [n, F, H, W, 3] each.

  Args:
    other: gives the second clip's digit from the first's.
  """
  rng = np.random.default_rng(5)
  pairs, prompted = [], []
  for index in range(48):
    first = scenes.Digit(*_cycle(index))
    path = _path(rng, first.direction)[None]
    for digit in (first, other(first)):
      pairs.append(_render([_scan(rng, digit.digit)], (digit,), path))
      prompted.append((digit,))
  scores = _score(digits.read(np.stack(pairs), classifier), prompted)
  fine = (scores["all"] & scores["consistency"]).reshape(-1, 2).all(1)
  assert fine.mean() > 0.7
  return np.stack(pairs).reshape(-1, 2, F, H, W, 3)[fine].swapaxes(0, 1)


def _cycle(index):
  colours = list(scenes.COLOURS)
  return colours[index % 8], index % 10, WORDS[index % 9]


def _consistency(videos, classifier):
  readings = digits.read(videos, classifier)
  return np.array([reading.objects[0].steady for reading in readings])


def _switched(first, second):
  return np.concatenate([first[:, : F // 2], second[:, F // 2 :]], axis=1)


@pytest.mark.slow
def test_a_digit_that_changes_half_way_is_inconsistent(classifier):
  first, second = _twins(
    classifier,
    lambda d: scenes.Digit(d.colour, (d.digit + 5) % 10, d.direction),
  )
  assert _consistency(first, classifier).all()
  assert not _consistency(_switched(first, second), classifier).any()
  readings = digits.read(_switched(first, second), classifier)
  steady = digits.read(first, classifier)
  jumps = [reading.objects[0].drift_first for reading in readings]
  assert np.mean(jumps) > 2 * np.mean(
    [r.objects[0].drift_first for r in steady]
  )


@pytest.mark.slow
def test_a_colour_that_changes_or_fades_is_inconsistent(classifier):
  first, second = _twins(
    classifier,
    lambda d: scenes.Digit(
      _other(d.colour, scenes.COLOURS), d.digit, d.direction
    ),
  )
  assert not _consistency(_switched(first, second), classifier).any()
  fading = np.concatenate([first[:, :-3], np.full_like(first[:, -3:], -1)], 1)
  assert not _consistency(fading, classifier).any()


@pytest.mark.slow
def test_an_empty_clip_shows_nothing(classifier):
  readings = digits.read(np.full((1, F, H, W, 3), -1.0), classifier)
  assert readings == [digits.Reading((), 0)]
  scores = digits.score(readings, ["a red two moving up"])
  assert not any(scores[name].any() for name in digits.SHARES)
  assert np.isnan(scores["appearance"]).all()


@pytest.mark.slow
def test_a_clip_is_read_the_same_in_any_batch(singles, classifier):
  alone = digits.read(singles[0][17:18], classifier)[0]
  among = singles[2][17]
  assert [o.colour for o in alone.objects] == [o.colour for o in among.objects]
  np.testing.assert_allclose(
    alone.objects[0].log_probs, among.objects[0].log_probs, atol=1e-3
  )


def test_the_centre_of_ink_is_where_it_was_drawn():
  rng = np.random.default_rng(6)
  scene = (scenes.Digit("white", 4, "down right"),)
  place = _path(rng, "down right")
  video = (_render([_scan(rng, 4)], scene, place[None]) + 1) / 2
  _, centre = classifiers.centroid(video[..., 0].astype(np.float32))
  np.testing.assert_allclose(centre, place, atol=0.05)


@pytest.mark.parametrize("size", [14, 16, 28])
def test_windows_move_with_the_ink(size):
  rng = np.random.default_rng(7)
  ink = np.zeros((48, 48), np.float32)
  ink[12:30, 10:28] = rng.uniform(size=(18, 18))
  moved = np.roll(ink, (3, 5), (0, 1))
  centre = np.array([19.3, 20.6], np.float32)
  np.testing.assert_allclose(
    classifiers.windows(ink, centre, size),
    classifiers.windows(moved, centre + np.array([5, 3]), size),
    atol=1e-5,
  )


@pytest.mark.slow
def test_a_classifier_is_trained_once(path, classifier):
  before = path.stat().st_mtime_ns
  again = classifiers.load(path, SIZE, steps=700)
  assert path.stat().st_mtime_ns == before
  assert [p.name for p in path.parent.iterdir()] == [path.name]
  share = classifiers.accuracy(again, "test")
  print("test scans right:", share)
  assert share == classifiers.accuracy(classifier, "test") > 0.95
  with pytest.raises(ValueError, match="digit_size is 20.*for 14"):
    classifiers.load(path, 20)


@pytest.mark.parametrize(
  "right, n, low, high",
  [(9, 10, 0.5958, 0.9821), (0, 10, 0.0, 0.2775), (50, 100, 0.4038, 0.5962)],
)
def test_shares_have_wilsons_interval(right, n, low, high):
  summary = digits.summarise(np.arange(n) < right)
  assert summary["value"] == right / n and summary["n"] == n
  np.testing.assert_allclose(summary["ci95"], [low, high], atol=5e-5)


def test_distances_have_a_normal_interval_and_skip_what_is_unknown():
  values = np.array([1.0, 2.0, 3.0, np.nan])
  summary = digits.summarise(values)
  half = 1.959964 * 1.0 / math.sqrt(3)
  assert summary["value"] == 2 and summary["n"] == 3
  np.testing.assert_allclose(summary["ci95"], [2 - half, 2 + half], rtol=1e-6)
  assert digits.summarise(values[3:]) == {"value": None, "ci95": None, "n": 0}


@pytest.mark.slow
def test_results_hold_the_ceiling_and_are_json(singles):
  readings, prompted = singles[2], singles[1]
  prompts = [scenes.caption(scene) for scene in prompted]
  turned = prompts[1:] + prompts[:1]
  found = digits.results(readings, turned, readings, prompts)
  assert set(found) == {*digits.SHARES, *digits.DISTANCES}
  assert found["identity"]["value"] < 0.6 < found["identity"]["ceiling"]
  assert json.loads(json.dumps(found, allow_nan=False)) == found


@pytest.mark.slow
def test_what_cannot_be_read_or_scored_is_refused(singles, classifier):
  clip = singles[0][:1]
  for videos, message in (
    (clip[0], r"shape \(9, 32, 32, 3\)"),
    (clip[:, :2], "at least 3 frames"),
    (clip.astype(np.uint8), "uint8"),
    (clip * np.nan, "finite"),
  ):
    with pytest.raises(ValueError, match=message):
      digits.read(videos, classifier)
  with pytest.raises(ValueError, match="got 0 for 1 readings"):
    digits.score(singles[2][:1], [])
  with pytest.raises(ValueError, match="different colours"):
    digits.score(
      singles[2][:1], ["a red one moving up and a red two moving up"]
    )
