import dataclasses

import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from absl import flags
from tensorflow_datasets.proto import tf_example_pb2

from tests.data.forms import build, wanted, words
from vdit_jax.data import moving_digits, plan, reading
from vdit_jax.text import tokenizer

BYTES = tfds.features.Encoding.BYTES
PLAN = {"seed": 5, "batch_size": 8}


def read(source, trained, start_step, num_steps, options=None, **given):
  how = wanted(trained, 20, options)
  steps = range(start_step, start_step + num_steps)
  return list(reading.batches(source, how, steps, **PLAN | given))


def assert_equal(got, want):
  assert len(got) == len(want)
  for (batch, keys), (other, other_keys) in zip(got, want, strict=True):
    assert keys == other_keys
    jax.tree.map(np.testing.assert_array_equal, batch, other)


def test_batches_are_the_planned_records(source, trained):
  assert (source.kind, source.shape) == ("video", (9, 32, 32, 3))
  config = moving_digits.MovingDigits.builder_configs["tiny"]
  for step, (batch, keys) in enumerate(read(source, trained, 0, 7)):
    planned = plan.batch_indices(5, step, source.num_records, 8)
    assert keys == [f"train-{position:06d}" for position in planned]
    records = [moving_digits.record(config, "train", int(p)) for p in planned]
    videos = np.stack([record["video"] for record in records])
    np.testing.assert_array_equal(batch.video, videos)
    assert batch.video.dtype == np.uint8 and batch.moments is None
    captions = [record["caption"] for record in records]
    tokens, mask = trained.encode(captions, 20)
    np.testing.assert_array_equal(words(batch).tokens, tokens)
    np.testing.assert_array_equal(words(batch).mask, mask)
    np.testing.assert_array_equal(batch.weight, np.ones(8, np.float32))


def test_resuming_gives_the_tail_of_the_unbroken_run(source, trained):
  unbroken = read(source, trained, 0, 10)
  assert_equal(read(source, trained, 6, 4), unbroken[6:])
  assert_equal(read(source, trained, 0, 10, threads=1), unbroken)


def test_workers_do_not_matter(source, trained):
  if not flags.FLAGS.is_parsed():
    flags.FLAGS.mark_as_parsed()
  want = read(source, trained, 3, 5)
  assert_equal(read(source, trained, 3, 5, workers=2), want)


def test_hosts_read_shares_of_the_same_batches(source, trained):
  whole = read(source, trained, 0, 3)
  shares = [read(source, trained, 0, 3, share=(host, 2)) for host in range(2)]
  for step in range(3):
    (first, keys), (second, more) = shares[0][step], shares[1][step]
    joined = jax.tree.map(lambda *x: np.concatenate(x), first, second)
    assert_equal([(joined, keys + more)], [whole[step]])


def test_sizes_are_refused_before_reading(source, trained):
  with pytest.raises(ValueError, match="num_hosts=3"):
    reading.batches(source, wanted(trained, 20), range(1), share=(0, 3), **PLAN)


def corrupt(source, positions):
  """Cuts off the videos of some records, or whole records at odd positions."""
  records = [source.data_source[i] for i in range(source.num_records)]
  for position in positions:
    records[position] = _damaged(records[position], position)
  return dataclasses.replace(source, data_source=records)


def _damaged(record, position):
  if position % 2:
    return record[: len(record) // 2]
  example = tf_example_pb2.Example.FromString(record)
  video = example.features.feature["video"].bytes_list
  video.value[0] = video.value[0][:-7]
  return example.SerializeToString()


def test_unreadable_records_keep_their_places(source, trained, caplog):
  whole = read(source, trained, 0, 6)
  broken = read(corrupt(source, [4, 9]), trained, 0, 6)
  lost = []
  for (got, keys), (want, true_keys) in zip(broken, whole, strict=True):
    damaged = np.isin(true_keys, ["train-000004", "train-000009"])
    np.testing.assert_array_equal(got.weight, ~damaged)
    np.testing.assert_array_equal(got.video[~damaged], want.video[~damaged])
    np.testing.assert_array_equal(
      words(got).tokens[~damaged], words(want).tokens[~damaged]
    )
    assert not got.video[damaged].any()
    np.testing.assert_array_equal(words(got).tokens[damaged, 0], tokenizer.EOS)
    np.testing.assert_array_equal(words(got).mask[damaged].sum(-1), 1)
    lost += np.array(keys)[damaged].tolist()
  assert sorted(lost) == ["train-000004", "train[9]"]
  assert "train-000004" in caplog.text and "train[9]" in caplog.text


def test_too_many_unreadable_records_end_the_run(source, trained):
  options = reading.Options(max_unreadable=3)
  broken = corrupt(source, range(0, 8, 2))
  with pytest.raises(RuntimeError, match="more than 3 unreadable"):
    read(broken, trained, 0, 6, options=options)


def test_evaluation_reads_every_record_once_in_order(data_dir, trained):
  source = reading.open_source("moving_digits/tiny", "test[:11]", data_dir)
  read = list(reading.evaluation_batches(source, wanted(trained, 20), 4))
  keys = [key for _, keys in read for key in keys]
  assert keys == [f"test-{index:06d}" for index in range(11)] + [""]
  weight = np.concatenate([batch.weight for batch, _ in read])
  assert weight.tolist() == [1] * 11 + [0]
  assert {batch.video.shape for batch, _ in read} == {(4, 9, 32, 32, 3)}
  assert not read[-1][0].video[-1].any()


def test_without_a_tokenizer_no_captions_are_read(source, trained):
  for (got, _), (want, _) in zip(
    read(source, None, 0, 2), read(source, trained, 0, 2), strict=True
  ):
    assert words(got).tokens.shape == words(got).mask.shape == (8, 0)
    np.testing.assert_array_equal(got.video, want.video)


def test_records_are_those_that_can_be_read_in_order(source):
  whole = list(reading.records(source))
  assert [r["key"] for r in whole] == [f"train-{i:06d}" for i in range(48)]
  keys = [r["key"] for r in reading.records(corrupt(source, [4, 9]))]
  assert keys == [r["key"] for i, r in enumerate(whole) if i not in (4, 9)]


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_latents_are_read_as_moments(tmp_path, trained, dtype):
  rng = np.random.default_rng(0)
  shape = (3, 4, 4, 8)
  arrays = rng.normal(size=(6, 2, *shape)).astype(dtype)
  tensor = tfds.features.Tensor(shape=shape, dtype=dtype, encoding=BYTES)
  text = tfds.features.Text()
  name = build(
    tmp_path,
    {"mean": tensor, "logvar": tensor, "caption": text, "key": text},
    [
      {"mean": mean, "logvar": logvar, "caption": "a red one", "key": str(i)}
      for i, (mean, logvar) in enumerate(arrays)
    ],
  )
  source = reading.open_source(name, "train", tmp_path)
  assert (source.kind, source.shape) == ("latents", shape)
  [(batch, keys)] = reading.evaluation_batches(source, wanted(trained, 20), 6)
  assert batch.video is None and keys == list("012345")
  for moment, want in zip(batch.moments, arrays.swapaxes(0, 1), strict=True):
    assert moment.dtype == np.float32
    np.testing.assert_array_equal(moment, want.astype(np.float32))


def build_embedded(path, embeds, text=None):
  """Writes latents with the embeddings of captions; gives their source."""
  tensor = tfds.features.Tensor(
    shape=(1, 2, 2, 3), dtype=np.float16, encoding=BYTES
  )
  text = text or tfds.features.Tensor(
    shape=(None, 4), dtype=np.float16, encoding=BYTES
  )
  string = tfds.features.Text()
  features = {"mean": tensor, "logvar": tensor, "embeds": text}
  zeros = np.zeros((1, 2, 2, 3), np.float16)
  name = build(
    path,
    features | {"caption": string, "key": string},
    [
      {"mean": zeros, "logvar": zeros, "embeds": rows, "caption": "a red one"}
      | {"key": str(i)}
      for i, rows in enumerate(embeds)
    ],
  )
  return reading.open_source(name, "train", path)


@pytest.fixture(scope="module")
def embeds():
  rng = np.random.default_rng(0)
  return [rng.normal(size=(n, 4)).astype(np.float16) for n in (3, 1, 5)]


def test_embeddings_are_read_in_place_of_tokens(tmp_path, trained, embeds):
  source = build_embedded(tmp_path, embeds)
  assert (source.kind, source.text_widths) == ("latents", {"text_encoder": 4})
  [(batch, _)] = reading.evaluation_batches(source, wanted(None, 7), 4)
  assert words(batch).tokens is None and batch.moments[0].shape == (
    4,
    1,
    2,
    2,
    3,
  )
  assert (
    words(batch).embeds.shape == (4, 7, 4)
    and words(batch).embeds.dtype == np.float16
  )
  assert words(batch).mask.sum(1).tolist() == [3, 1, 5, 0]
  assert not words(batch).embeds[~words(batch).mask].any()
  for row, want in enumerate(embeds):
    np.testing.assert_array_equal(words(batch).embeds[row, : len(want)], want)
    assert words(batch).mask[row, : len(want)].all()
  [(batch, _)] = reading.evaluation_batches(source, wanted(trained, 7), 4)
  assert words(batch).embeds is None and words(batch).tokens.shape == (4, 7)
  found = [r["embeds"] for r in reading.records(source, range(1, 3))]
  for [a], b in zip(found, embeds[1:], strict=True):
    np.testing.assert_array_equal(a, b)


def test_long_embeddings_are_cut_with_one_warning(tmp_path, embeds, caplog):
  source = build_embedded(tmp_path, embeds)
  for _ in range(2):
    [(batch, _)] = reading.evaluation_batches(source, wanted(None, 2), 3)
  assert words(batch).mask.tolist() == [
    [True, True],
    [True, False],
    [True, True],
  ]
  np.testing.assert_array_equal(words(batch).embeds[0], embeds[0][:2])
  assert caplog.text.count("are cut to data.max_length=2") == 1


def test_embeddings_of_another_form_are_refused(tmp_path, embeds):
  text = tfds.features.Tensor(shape=(None, 4), dtype=np.float16)
  with pytest.raises(ValueError, match="shape \\(None, E\\) and float16"):
    build_embedded(tmp_path, embeds, text)


def test_missing_dataset_names_the_command_that_builds_it(tmp_path):
  command = f"moving_digits --config=one --data_dir={tmp_path}"
  with pytest.raises(ValueError, match=command):
    reading.open_source("moving_digits/one", "train", tmp_path)
  with pytest.raises(ValueError, match="array_record"):
    reading.open_source("someone_elses", "train", tmp_path)


def test_missing_split_names_those_there_are(data_dir):
  with pytest.raises(ValueError, match="train, validation, test.*'val'"):
    reading.open_source("moving_digits/tiny", "val", data_dir)


def test_dataset_of_another_form_lists_what_is_missing(tmp_path):
  text = tfds.features.Text()
  name = build(
    tmp_path, {"key": text, "label": text}, [{"key": "a", "label": "b"}]
  )
  with pytest.raises(ValueError, match="'caption', 'fps'") as error:
    reading.open_source(name, "train", tmp_path)
  assert "['key', 'label']" in str(error.value)


@pytest.mark.parametrize(
  "video",
  [
    tfds.features.Tensor(shape=(2, 4, 4, 3), dtype=np.uint8),
    tfds.features.Tensor(shape=(2, 4, 4, 3), dtype=np.float32, encoding=BYTES),
    tfds.features.Tensor(shape=(None, 4, 4, 3), dtype=np.uint8, encoding=BYTES),
  ],
)
def test_video_of_another_kind_is_refused(tmp_path, video):
  text, fps = tfds.features.Text(), tfds.features.Scalar(np.float32)
  features = {"video": video, "caption": text, "key": text, "fps": fps}
  frames = np.zeros((2, 4, 4, 3), video.np_dtype)
  example = {"video": frames, "caption": "a", "key": "b", "fps": 8.0}
  name = build(tmp_path, features, [example])
  with pytest.raises(ValueError, match="feature 'video'"):
    reading.open_source(name, "train", tmp_path)


def test_videos_are_read_in_other_shapes_too(source, trained):
  """Half of the frame rate, a quarter of the pixels."""
  options = reading.Options(fps=4.0, crop="centre")
  planned = lambda step: ((4, 16, 16), np.arange(8))
  [(batch, keys)] = read(
    source, trained, 0, 1, planned=planned, options=options
  )
  config = moving_digits.MovingDigits.builder_configs["tiny"]
  for row, key in enumerate(keys):
    stored = moving_digits.record(config, "train", row)["video"]
    halves = [stored[first : first + 7 : 2] for first in range(3)]
    small = [h.reshape(4, 16, 2, 16, 2, 3).mean((2, 4)) for h in halves]
    far = [np.abs(batch.video[row] - x).mean() for x in small]
    assert min(far) < 4, key
