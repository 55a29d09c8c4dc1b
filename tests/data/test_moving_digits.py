import subprocess
import sys

import numpy as np
import pytest

from vdit_jax.data import digits, moving_digits, reading

CONFIGS = moving_digits.MovingDigits.builder_configs
ALIKE = [
  name
  for name, config in CONFIGS.items()
  if not isinstance(config, moving_digits.WorldsConfig)
]


def records(data_dir, split):
  source = reading.open_source("moving_digits/tiny", split, data_dir)
  raw = (source.data_source[i] for i in range(source.num_records))
  return [source.features.deserialize_example_np(record) for record in raw]


@pytest.mark.parametrize("split", digits.SPLITS)
def test_records_read_back_as_they_were_drawn(data_dir, split):
  read = records(data_dir, split)
  assert len(read) == CONFIGS["tiny"].clips[split]
  for index, got in enumerate(read):
    want = moving_digits.record(CONFIGS["tiny"], split, index)
    np.testing.assert_array_equal(got["video"], want["video"])
    assert got["video"].dtype == np.uint8
    assert got["caption"].decode() == want["caption"]
    assert got["key"].decode() == want["key"]
    assert got["fps"] == want["fps"]


def test_keys_are_unique(data_dir):
  keys = [r["key"] for split in digits.SPLITS for r in records(data_dir, split)]
  assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
  "split, held_out", [("train", False), ("validation", False), ("test", True)]
)
@pytest.mark.parametrize("config", ["one", "mixed", "fast"])
def test_held_out_combinations_are_in_the_test_split_alone(
  config, split, held_out
):
  rng = np.random.default_rng(0)
  for _ in range(200):
    scene = moving_digits._scene(rng, CONFIGS[config], split)
    assert {digits.held_out(digit) for digit in scene} == {held_out}
    assert len({digit.colour for digit in scene}) == len(scene)
    assert len(scene) in CONFIGS[config].counts


@pytest.mark.parametrize("config", ALIKE)
def test_digits_of_a_clip_are_seen_apart(config):
  config = CONFIGS[config]
  rng = np.random.default_rng(0)
  for _ in range(50):
    scene = moving_digits._scene(rng, config, "train")
    paths = moving_digits._paths(rng, config, scene)
    assert paths.shape == (len(scene), config.num_frames, 2)
    assert moving_digits._distance(paths) >= config.digit_size


def test_fast_digits_cross_a_patch_in_a_latent_frame():
  frames, patch = 4, 8
  assert min(CONFIGS["fast"].speeds) * frames > patch


@pytest.mark.parametrize("shard", [5, 48, 1000])
def test_shards_keep_the_order(tmp_path, monkeypatch, shard):
  monkeypatch.setattr(moving_digits, "_SHARD", shard)
  builder = moving_digits.MovingDigits(
    config="tiny", data_dir=tmp_path, file_format="array_record"
  )
  builder.download_and_prepare()
  for split, clips in CONFIGS["tiny"].clips.items():
    assert builder.info.splits[split].num_shards == -(-clips // shard)
    keys = [record["key"].decode() for record in records(tmp_path, split)]
    assert keys == [f"{split}-{index:06d}" for index in range(clips)]


def test_interrupted_build_is_not_there(tmp_path, monkeypatch):
  drawn = moving_digits.record

  def record(config, split, index):
    if (split, index) == ("validation", 3):
      raise KeyboardInterrupt
    return drawn(config, split, index)

  builder = moving_digits.MovingDigits(
    config="tiny", data_dir=tmp_path, file_format="array_record"
  )
  monkeypatch.setattr(moving_digits, "record", record)
  with pytest.raises(KeyboardInterrupt):
    builder.download_and_prepare()
  with pytest.raises(ValueError, match="--config=tiny"):
    reading.open_source("moving_digits/tiny", "train", tmp_path)
  monkeypatch.undo()
  builder.download_and_prepare()
  assert records(tmp_path, "train")


def test_building_and_reading_need_no_tensorflow(tmp_path):
  program = """
import sys
from vdit_jax.data import moving_digits, reading
builder = moving_digits.MovingDigits(
  config="tiny", data_dir=sys.argv[1], file_format="array_record"
)
builder.download_and_prepare()
source = reading.open_source("moving_digits/tiny", "test", sys.argv[1])
assert len(list(reading.records(source))) == source.num_records == 16
assert "tensorflow" not in sys.modules
"""
  subprocess.run([sys.executable, "-c", program, tmp_path], check=True)


def test_command_builds_once(tmp_path):
  command = [sys.executable, "-m", "vdit_jax.data.moving_digits"]
  command += ["--config=tiny", f"--data_dir={tmp_path}"]
  first = subprocess.run(command, check=True, capture_output=True, text=True)
  assert "train: 48 clips" in first.stderr
  again = subprocess.run(command, check=True, capture_output=True, text=True)
  assert "already there" in again.stderr
  assert len(records(tmp_path, "validation")) == 16


def test_a_bucket_is_refused_before_building():
  with pytest.raises(ValueError, match="build locally and copy"):
    moving_digits._local("gs://bucket/data")
