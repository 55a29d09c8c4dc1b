import dataclasses

import numpy as np
import pytest

from vdit_jax.data import index

KEYS = ["a.mp4", "", "süß/映画 .mp4", "long" * 50]


def make():
  return index.Index(KEYS, [9, 1, 2**20, 3], [4, 5, 6, 7], [7, 6, 5, 4], [
    8.0, 0.0, 29.97, 1e-3
  ])  # fmt: skip


def assert_equal(got, want):
  for field in dataclasses.fields(index.Index):
    a, b = getattr(got, field.name), getattr(want, field.name)
    np.testing.assert_array_equal(a, b)
    assert a.dtype == b.dtype


def test_reads_back_as_it_was_written(tmp_path):
  assert index.read(tmp_path, "train") is None
  index.write(tmp_path, "train", make())
  got = index.read(tmp_path, "train")
  assert_equal(got, make())
  assert got.keys.tolist() == KEYS and len(got) == 4
  assert got.fps.dtype == np.float32 and got.height.dtype == np.int32
  assert [p.name for p in tmp_path.iterdir()] == ["index-train.npz"]
  empty = index.uniform(0, 9, 4, 4)
  index.write(tmp_path, "validation", empty)
  assert_equal(index.read(tmp_path, "validation"), empty)


def test_takes_rows():
  part = make().take(slice(1, 3))
  assert part.keys.tolist() == KEYS[1:3] and part.width.tolist() == [6, 5]
  assert make().take(np.array([3, 0])).num_frames.tolist() == [3, 9]


def test_uniform_has_one_shape():
  got = index.uniform(3, 9, 32, 48, fps=8)
  assert got.num_frames.tolist() == [9] * 3 and got.width.tolist() == [48] * 3
  assert got.height.tolist() == [32] * 3 and got.fps.tolist() == [8.0] * 3


def test_bad_input_is_refused(tmp_path):
  with pytest.raises(ValueError, match="height must be .R. as keys are"):
    index.Index(["a"], [1], [2, 3], [4], [5])
  with pytest.raises(ValueError, match="split must be a split's name"):
    index.read(tmp_path, "train[:10%]")
