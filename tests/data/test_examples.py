"""Laws of records as clips: in their places, drawn by their seeds alone."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.data.forms import wanted, words
from vdit_jax.data import examples, moving_digits, plan, sources
from vdit_jax.text import tokenizer

SMALL = 4, 16, 16  # F, H, W
SIDES = {"left", "right"}


def read(source, positions, trained=None, shape=None, seeds=None, **fields):
  options = examples.Options(**fields)
  how = wanted(trained, 20, options)
  return examples.load(source, how, np.array(positions), shape, seeds)


def seeds_of(positions):
  return [plan.record_seed(0, 0, p) for p in positions]


def test_rows_are_the_records_of_their_positions(source, trained):
  config = moving_digits.MovingDigits.builder_configs["tiny"]
  loaded = read(source, [5, 2, 5], trained)
  assert loaded.keys == ["train-000005", "train-000002", "train-000005"]
  assert not loaded.errors and loaded.cut == 0
  for row, position in enumerate([5, 2, 5]):
    record = moving_digits.record(config, "train", position)
    np.testing.assert_array_equal(loaded.batch.video[row], record["video"])
    tokens, mask = trained.encode([record["caption"]], 20)
    np.testing.assert_array_equal(words(loaded.batch).tokens[row], tokens[0])
    np.testing.assert_array_equal(words(loaded.batch).mask[row], mask[0])
  np.testing.assert_array_equal(loaded.batch.weight, np.ones(3, np.float32))


def test_what_fills_up_is_empty_and_counts_nothing(source, trained):
  loaded = read(source, [examples.FILL, 3], trained)
  batch = loaded.batch
  assert loaded.keys == ["", "train-000003"] and not loaded.errors
  assert batch.weight.tolist() == [0, 1]
  assert not batch.video[0].any() and batch.video[1].any()
  assert words(batch).mask.sum(1)[0] == 1
  assert words(batch).tokens[0, 0] == tokenizer.EOS


def test_what_is_drawn_is_the_records_seeds_alone(source, trained):
  positions = [1, 7, 9]
  seeds = seeds_of(positions)
  fields = dict(shape=SMALL, fps=4.0)
  whole = read(source, positions, trained, seeds=seeds, **fields).batch
  alone = read(source, [7], trained, seeds=seeds[1:2], **fields).batch
  np.testing.assert_array_equal(alone.video[0], whole.video[1])
  other = read(source, [7], trained, seeds=seeds[2:], **fields).batch
  again = read(source, positions[::-1], trained, seeds=seeds[::-1], **fields)
  np.testing.assert_array_equal(again.batch.video[::-1], whole.video)
  first = read(source, [7] * 8, trained, seeds=seeds_of(range(8)), **fields)
  assert len({clip.tobytes() for clip in first.batch.video}) > 1
  assert other.video.shape == (1, *SMALL, 3)


def test_without_seeds_nothing_is_drawn(source):
  loaded = read(source, [7, 7], shape=SMALL, fps=4.0)
  one, two = loaded.batch.video
  np.testing.assert_array_equal(one, two)
  # The first frames, at half of the rate, a quarter of the pixels.
  stored = read(source, [7]).batch.video[0, :7:2]
  small = stored.reshape(4, 16, 2, 16, 2, 3).mean((2, 4))
  assert np.abs(one - small).mean() < 4


def find(sides):
  """The first record whose caption tells left from right, or does not."""
  config = moving_digits.MovingDigits.builder_configs["tiny"]
  told = lambda i: moving_digits.record(config, "train", i)["caption"].split()
  return next(i for i in range(48) if sides == bool(SIDES & set(told(i))))


def test_a_flip_mirrors_about_half_of_the_clips(source):
  positions = [find(sides=False)] * 24
  seeds = seeds_of(range(24))
  plain = read(source, positions, seeds=seeds).batch
  flipped = read(source, positions, seeds=seeds, flip=True).batch
  assert plain.weight.all() and flipped.weight.all()
  back = plain.video[:, :, :, ::-1]
  assert not np.array_equal(plain.video[0], back[0])
  mirrored = [np.array_equal(*x) for x in zip(flipped.video, back, strict=True)]
  same = [
    np.array_equal(*x) for x in zip(flipped.video, plain.video, strict=True)
  ]
  assert sum(mirrored) + sum(same) == 24 and 5 < sum(mirrored) < 19
  unseeded = read(source, positions[:1], flip=True).batch
  np.testing.assert_array_equal(unseeded.video, plain.video[:1])


def test_a_flip_of_captions_with_sides_is_refused(source):
  position = find(sides=True)
  message = f"train-0000{position:02d} says '(left|right)'"
  with pytest.raises(ValueError, match=message):
    read(source, [position], seeds=seeds_of([0]), flip=True)


def test_numbers_are_told_where_they_are_known(source, trained):
  how = wanted(trained, 20, cond=("fps", "size", "beauty"))
  load = lambda shape: examples.load(
    source, how, np.array([0, -1]), shape, None
  )
  cond = load(None).batch.cond
  np.testing.assert_array_equal(cond.fps, [8, np.nan])
  np.testing.assert_array_equal(cond.size, [[32, 32], [np.nan] * 2])
  assert np.isnan(cond.scores).all() and cond.scores.shape == (2, 1)
  np.testing.assert_array_equal(load(SMALL).batch.cond.size[0], [16, 16])
  assert read(source, [0]).batch.cond is None


def test_captions_are_cut_and_counted(source, trained):
  how = wanted(trained, 3)
  loaded = examples.load(source, how, np.array([0, 1, -1]), None, None)
  assert loaded.cut == 2  # the end token alone is not cut
  assert words(loaded.batch).tokens.shape == (3, 3)
  assert words(loaded.batch).mask[:2].all()
  whole = read(source, [0], trained).batch
  length = int(words(whole).mask.sum())
  for short in (0, 1):  # one that just fits is not cut
    how = wanted(trained, length - short)
    loaded = examples.load(source, how, np.array([0]), None, None)
    assert loaded.cut == short and words(loaded.batch).mask.all()


def test_numbers_are_said_behind_the_caption(source, trained):
  template = "at {fps:.0f} frames"
  plain = examples.read_clip(source, 3, (9, 32, 32), None, examples.Options())[
    0
  ]
  clip, error = examples.read_clip(
    source,
    3,
    (9, 32, 32),
    None,
    examples.Options(number_templates=(template, "motion {motion:.1f}")),
  )
  assert not error and clip.text == f"{plain.text} at 8 frames"


def test_a_record_that_cannot_be_read_keeps_its_place(source, trained):
  rows = [source.data_source[i] for i in range(4)]
  rows[1] = rows[1][:40]
  broken = dataclasses.replace(source, data_source=rows)
  loaded = read(broken, [0, 1, 2], trained)
  [error] = loaded.errors
  assert error.startswith("train[1]: ") and loaded.keys[1] == "train[1]"
  assert loaded.batch.weight.tolist() == [1, 0, 1]
  whole = read(source, [0, 2], trained).batch
  kept = jax.tree.map(lambda x: x[[0, 2]], loaded.batch)
  jax.tree.map(np.testing.assert_array_equal, kept, whole)
  assert not loaded.batch.video[1].any()


def test_a_shape_is_the_records_or_one_that_can_be(source):
  assert isinstance(source, sources.Source)
  assert examples.check_shape(source, None) == (9, 32, 32)
  assert examples.check_shape(source, [4, 16, 16]) == SMALL
  for shape in ((4, 16), (0, 16, 16)):
    with pytest.raises(
      ValueError, match="shape must be .frames, height, width"
    ):
      examples.check_shape(source, shape)
  form = dataclasses.replace(source.form, shape=(None, None, None, 3))
  varied = dataclasses.replace(source, form=form)
  with pytest.raises(ValueError, match="shape must be given, .*tiny has clips"):
    examples.check_shape(varied, None)
  form = dataclasses.replace(source.form, kind="latents")
  latents = dataclasses.replace(source, form=form)
  assert examples.check_shape(latents, (9, 32, 32)) == (9, 32, 32)
  with pytest.raises(ValueError, match=r"that of the latents, \(9, 32, 32\)"):
    examples.check_shape(latents, SMALL)


@pytest.mark.parametrize(
  "fields, message",
  [
    ({"crop": "left"}, "crop must be one of .* got 'left'"),
    ({"fps": -1.0}, "fps must be a rate, .* got -1.0"),
    ({"fps": float("nan")}, "fps must be a rate, .* got nan"),
    ({"number_templates": "{fps}"}, r"tuple of texts, .*write \('{fps}',\)"),
  ],
)
def test_options_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    examples.Options(**fields)
