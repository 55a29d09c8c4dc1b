"""Clips of any size and length: what a batch is made of, by whom and when."""

import dataclasses
import functools
import io

import jax
import numpy as np
import pytest
from PIL import Image

from tests.data import test_clips
from tests.data.forms import build, wanted, words
from vdit_jax.data import clips, plan, reading
from vdit_jax.data import records as forms
from vdit_jax.data.build import clip_records

SHAPE = (5, 32, 32)
SEED, M = 3, 24
LENGTHS = (6, 8, 12, 20, 30, 1)  # the last one is an image
FEATURES = clip_records.features(["motion_score"])


def example(number, length):
  height, width = (48, 64) if number % 2 else (64, 48)
  images = test_clips.pictures(length, height, width)
  if length == 1:
    file = io.BytesIO()
    Image.fromarray(images[0]).save(file, "PNG")
    data = file.getvalue()
  else:
    data = test_clips.encode(images)
  return {
    "mp4": data,
    "captions": [f"clip {number}", f"again {number}", f"third {number}"],
    "key": f"c{number}",
    "fps": 10.0 if length > 1 else 0.0,
    "num_frames": length,
    "height": height,
    "width": width,
    "motion_score": np.nan if number == 2 else number + 0.5,
  }


@pytest.fixture(scope="module")
def examples():
  return [example(*pair) for pair in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def mixed(examples, tmp_path_factory):
  path = tmp_path_factory.mktemp("mixed")
  return reading.open_source(
    build(path, dict(FEATURES), examples), "train", path
  )


def planned(step, shape=SHAPE):
  """Each step has four of the clips that are long enough."""
  return shape, plan.batch_indices(SEED, step, 5, 4)


def read(
  source,
  tokenizer,
  start=0,
  number=3,
  options=None,
  cond=(),
  length=M,
  **given,
):
  how = wanted(tokenizer, length, options, cond)
  given = {"planned": planned, "seed": SEED} | given
  steps = range(start, start + number)
  return list(reading.batches(source, how, steps, **given))


def test_source_knows_sizes_and_lengths(mixed, examples):
  assert (mixed.kind, mixed.shape) == ("clips", None)
  with pytest.raises(ValueError, match="clips of many shapes"):
    _ = mixed.num_frames
  assert mixed.index.keys.tolist() == [e["key"] for e in examples]
  for name in ("num_frames", "height", "width", "fps"):
    assert getattr(mixed.index, name).tolist() == [e[name] for e in examples]


@pytest.mark.parametrize("fps", [0.0, 5.0])
def test_clips_are_what_the_records_seed_draws(mixed, examples, trained, fps):
  shape = (3, 32, 32)
  options = reading.Options(fps=fps)
  batches = read(
    mixed,
    trained,
    planned=functools.partial(planned, shape=shape),
    options=options,
  )
  said = set()
  for step, (batch, keys) in enumerate(batches):
    positions = planned(step)[1]
    assert keys == [f"c{position}" for position in positions]
    assert batch.weight.tolist() == [1] * 4 and batch.video.dtype == np.uint8
    for row, position in enumerate(positions):
      rng = np.random.default_rng(plan.record_seed(SEED, step, row))
      view = clips.draw_view(shape, fps, rng, "random")
      video, _ = clips.read(examples[position]["mp4"], view)
      np.testing.assert_array_equal(batch.video[row], video)
    texts = trained.decode(words(batch).tokens)
    for text, position in zip(texts, positions, strict=True):
      assert text in examples[position]["captions"]
      said.add(text.split()[0])
  assert said == {"clip", "again", "third"}


def test_hosts_workers_and_start_do_not_matter(mixed, trained):
  whole = read(mixed, trained, 0, 4)
  halves = [read(mixed, trained, 0, 4, share=(h, 2)) for h in range(2)]
  late = read(mixed, trained, 2, 2, threads=1)
  for step, (batch, keys) in enumerate(whole):
    (one, some), (two, others) = (half[step] for half in halves)
    assert some + others == keys
    joined = jax.tree.map(lambda *x: np.concatenate(x), one, two)
    jax.tree.map(np.testing.assert_array_equal, joined, batch)
    if step >= 2:
      jax.tree.map(np.testing.assert_array_equal, late[step - 2][0], batch)


def test_evaluation_draws_nothing(mixed, examples, trained):
  options = reading.Options(fps=5.0, flip=True)
  shape = (4, 24, 24)
  how = wanted(trained, M, options)
  batches = reading.evaluation_batches(mixed, how, 2, shape)
  read = list(batches)
  # Seven frames of ten a second are four of five; six are not.
  assert [k for _, keys in read for k in keys] == ["c1", "c2", "c3", "c4"]
  for row, (batch, keys) in enumerate(read):
    for i, key in enumerate(keys):
      stored = examples[2 * row + 1 + i]
      video, _ = clips.read(stored["mp4"], clips.View(shape, 5.0))
      np.testing.assert_array_equal(batch.video[i], video)
      assert key == stored["key"]
  assert trained.decode(words(read[0][0]).tokens) == ["clip 1", "clip 2"]
  [(image, keys)] = reading.evaluation_batches(
    mixed, wanted(trained, M), 6, (1, 24, 24)
  )
  assert keys[-1] == "c5" and image.video[-1].any()
  with pytest.raises(ValueError, match="num_frames=31.*30 at most"):
    reading.evaluation_batches(mixed, wanted(trained, M), 2, (31, 24, 24))


def corrupt(source, position):
  """Cut a record's mp4 off in its middle, its other features whole."""
  records = [source.data_source[i] for i in range(source.num_records)]
  example = forms.tf_example_pb2.Example.FromString(records[position])
  mp4 = example.features.feature["mp4"].bytes_list
  mp4.value[0] = mp4.value[0][: len(mp4.value[0]) // 2]
  records[position] = example.SerializeToString()
  return dataclasses.replace(source, data_source=records)


def test_damaged_clips_keep_their_places(mixed, trained, caplog):
  whole, tally = read(mixed, trained, 0, 5), reading.Tally()
  broken = read(corrupt(mixed, 2), trained, 0, 5, tally=tally)
  lost = 0
  for (got, keys), (want, true_keys) in zip(broken, whole, strict=True):
    assert keys == true_keys
    damaged = np.array(keys) == "c2"
    np.testing.assert_array_equal(got.weight, ~damaged)
    np.testing.assert_array_equal(got.video[~damaged], want.video[~damaged])
    assert not got.video[damaged].any()
    lost += damaged.sum()
  assert lost and tally.unreadable == lost and tally.clips == 20 - lost
  assert "unreadable c2" in caplog.text
  options = reading.Options(max_unreadable=int(lost) - 1)
  with pytest.raises(RuntimeError, match=f"more than {lost - 1} unreadable"):
    read(corrupt(mixed, 2), trained, 0, 5, options=options)


def test_records_that_are_too_short_are_unreadable(mixed, trained):
  """A plan knows lengths; a clip that is shorter than its index says is bad."""
  loaded = reading.load(
    mixed, wanted(trained, M), np.array([0, 4]), (9, 32, 32), None
  )
  assert loaded.batch.weight.tolist() == [0, 1]
  assert "num_frames=9" in loaded.errors[0]


def with_caption(source, text):
  """Give the last record another caption."""
  records = [source.data_source[i] for i in range(source.num_records)]
  example = forms.tf_example_pb2.Example.FromString(records[4])
  example.features.feature["captions"].bytes_list.value[1] = text.encode()
  records[4] = example.SerializeToString()
  return dataclasses.replace(source, data_source=records)


def test_flips_are_refused_where_a_caption_tells_sides(mixed, trained):
  flip = reading.Options(flip=True)
  assert len(read(mixed, trained, options=flip)) == 3
  sided = with_caption(mixed, "it moves left")
  reading.check_sides(mixed)
  with pytest.raises(ValueError, match="'it moves left' of record c4.*'left'"):
    reading.check_sides(sided)
  with pytest.raises(ValueError, match="'it moves left' of record c4.*'left'"):
    read(sided, trained, number=5, options=flip)
  assert len(read(sided, trained)) == 3


def test_flips_mirror_half_of_the_clips(mixed, trained):
  plain = read(mixed, trained, number=10)
  flipped = read(mixed, trained, number=10, options=reading.Options(flip=True))
  mirrored = 0
  for (batch, _), (other, _) in zip(plain, flipped, strict=True):
    for a, b in zip(batch.video, other.video, strict=True):
      if not np.array_equal(a, b):
        np.testing.assert_array_equal(a, b[:, :, ::-1])
        mirrored += 1
  assert 10 <= mirrored <= 30


def test_numbers_are_said_and_given(mixed, trained):
  options = reading.Options(
    fps=5.0,
    number_templates=("score {motion_score:.1f}.", "{width} wide."),
  )
  how = wanted(trained, 40, options, ("fps", "motion_score", "size"))
  loaded = reading.load(mixed, how, np.array([1, 2, -1]), (2, 16, 24), None)
  texts = trained.decode(words(loaded.batch).tokens)
  assert texts == ["clip 1 score 1.5. 24 wide.", "clip 2 24 wide.", ""]
  cond, nan = loaded.batch.cond, np.nan
  np.testing.assert_array_equal(cond.fps, np.float32([5, 5, nan]))
  size = [[16, 24], [16, 24], [nan, nan]]
  np.testing.assert_array_equal(cond.size, np.float32(size))
  np.testing.assert_array_equal(cond.scores, np.float32([[1.5], [nan], [nan]]))
  with pytest.raises(ValueError, match=r"name \['beauty'\].*motion_score"):
    read(mixed, trained, cond=("beauty",))


def test_captions_that_are_cut_are_counted(mixed, trained, caplog):
  length = max(
    np.count_nonzero(mask)
    for mask in trained.encode([f"clip {n}" for n in range(5)], M)[1]
  )
  tally = reading.Tally()
  read(mixed, trained, number=5, length=length - 1, tally=tally)
  assert 0 < tally.cut <= tally.clips == 20
  assert tally.metrics()["captions_cut_share"] == tally.cut / 20
  assert "captions lost their end to data.max_length" in caplog.text
  tally = reading.Tally()
  read(mixed, trained, number=5, tally=tally)
  assert tally.cut == 0


def test_options_that_cannot_be_are_refused():
  for match, options in (
    ("crop must be one of", {"crop": "middle"}),
    ("fps must be a rate", {"fps": -1.0}),
    ("number_templates must be a tuple", {"number_templates": "{fps}"}),
  ):
    with pytest.raises(ValueError, match=match):
      reading.Options(**options)
