"""Which shape a record is read in, how many make a batch, what is refused."""

import numpy as np
import pytest

from vdit_jax.data import buckets, plan
from vdit_jax.data import index as indices

SQUARE, WIDE, TALL = (9, 32, 32), (9, 32, 64), (9, 64, 32)
LONG, IMAGE, LARGE = (17, 32, 32), (1, 32, 32), (9, 64, 64)
SHAPES = [SQUARE, WIDE, TALL, LONG, IMAGE, LARGE]


def tokens(num_frames, height, width):
  """Count as the digits networks do: 4x4x4 compression, patches of 2x2."""
  if (num_frames - 1) % 4:
    raise ValueError(f"num_frames must be 4n+1, got {num_frames}")
  return ((num_frames - 1) // 4 + 1) * (height // 8) * (width // 8)


def index(*rows):
  """Makes an index of rows (num_frames, height, width, fps)."""
  keys = [f"record {i}" for i in range(len(rows))]
  return indices.Index(keys, *zip(*rows, strict=True))


def make(found, options, multiple_of=1, fps=0.0):
  return buckets.make(
    found,
    options,
    tokens,
    seed=0,
    fps=fps,
    unit=(8, 8),
    multiple_of=multiple_of,
  )


@pytest.mark.parametrize(
  ("row", "fps", "shape"),
  [
    ((9, 40, 40, 8), 0, SQUARE),
    ((16, 40, 40, 8), 0, SQUARE),
    ((17, 40, 40, 8), 0, LONG),  # the longest
    ((17, 100, 200, 8), 0, LONG),  # even where another's aspect is nearer
    ((9, 40, 80, 8), 0, WIDE),
    ((9, 80, 40, 8), 0, TALL),
    ((9, 40, 45, 8), 0, SQUARE),
    ((9, 64, 64, 8), 0, LARGE),  # the largest of those as near
    ((9, 63, 64, 8), 0, SQUARE),  # that it need not be enlarged for
    ((1, 300, 500, 0), 0, IMAGE),
    ((1, 300, 500, 0), 8, IMAGE),
    ((8, 40, 40, 8), 0, IMAGE),  # too short a clip is one of its frames
    ((34, 40, 40, 16), 8, LONG),  # two seconds at 8 fps
    ((30, 40, 40, 16), 8, SQUARE),
    ((17, 40, 40, 16), 8, SQUARE),
    ((5, 40, 40, 4), 8, SQUARE),  # frames are shown twice
    ((9, 31, 40, 8), 0, buckets._TINY),
  ],
)
def test_a_record_goes_to_the_longest_nearest_largest(row, fps, shape):
  numbers = buckets.assign(index(row), SHAPES, fps)
  wanted = SHAPES.index(shape) if isinstance(shape, tuple) else shape
  assert numbers.tolist() == [wanted]


def test_nearest_is_so_in_the_logarithm():
  shapes = [(1, 16, 16), (1, 8, 32)]  # 1 and 4: between them is 2, not 2.5
  for width, number in ((190, 0), (210, 1)):
    found = index((1, 100, width, 0))
    assert buckets.assign(found, shapes, 0).tolist() == [number]


def test_about_as_near_is_near():
  small = (9, 36, 64)  # of the record's aspect
  found = index((9, 720, 1280, 8))
  for width, number in ((124, 1), (112, 0)):
    large = (9, 72, width)
    assert buckets.assign(found, [small, large], 0).tolist() == [number]


def test_a_short_record_without_images_is_dropped():
  found = index((8, 40, 40, 8), (1, 40, 40, 0), (9, 40, 40, 8), (9, 8, 8, 8))
  numbers = buckets.assign(found, [SQUARE, LONG], 0)
  assert numbers.tolist() == [buckets._SHORT, buckets._SHORT, 0, buckets._TINY]
  enlarged = buckets.assign(found, [SQUARE, LONG], 0, enlarge=4)
  assert enlarged[3] == 0
  none = buckets.assign(found, [], 0)
  assert none.tolist() == [buckets._SHORT] * 4


def test_many_records_are_looked_at_in_parts(monkeypatch):
  rng = np.random.default_rng(0)
  rows = zip(
    rng.integers(1, 20, 100), *rng.integers(20, 90, (2, 100)), [8] * 100,
    strict=True,
  )  # fmt: skip
  found = index(*rows)
  whole = buckets.assign(found, SHAPES, 8)
  monkeypatch.setattr(buckets, "_ROWS", 7)
  np.testing.assert_array_equal(buckets.assign(found, SHAPES, 8), whole)
  assert len(set(whole.tolist())) > 5


def test_made_shapes_keep_their_area_and_aspect():
  options = buckets.Options(
    max_tokens=1, frames=(1, 17), areas=(256**2, 512**2), aspects=(0.5, 1, 2)
  )
  shapes = buckets.make_shapes(options, (16, 32))
  assert len(shapes) == len(set(shapes)) == 12
  assert shapes[:3] == [(1, 368, 192), (1, 256, 256), (1, 176, 352)]
  for _, height, width in shapes:
    assert height % 16 == width % 32 == 0
    assert min(abs(height * width / a**2 - 1) for a in (256, 512)) < 0.1
  # Those that are rounded to the same are one.
  few = buckets.Options(
    max_tokens=1, frames=(1,), areas=(64,), aspects=(1, 1.1)
  )
  assert buckets.make_shapes(few, (8, 8)) == [(1, 8, 8)]


def many(*rows, times=40):
  return index(*(row for row in rows for _ in range(times)))


MIXED = many((9, 40, 40, 8), (17, 40, 40, 8), (1, 40, 40, 0), (9, 40, 80, 8))
OPTIONS = buckets.Options(max_tokens=640, shapes=(SQUARE, WIDE, LONG, IMAGE))


def test_batches_fill_the_step_and_records_are_in_one_bucket():
  planned, report = make(MIXED, OPTIONS, multiple_of=2)
  found = {b.shape: b for b in planned.buckets}
  assert list(found) == list(OPTIONS.shapes)
  for shape, bucket in found.items():
    assert bucket.batch_size % 2 == 0
    filled = bucket.batch_size * tokens(*shape)
    assert buckets.LEAST_FILL * 640 <= filled <= 640
  assert found[SQUARE].batch_size == 12 and found[IMAGE].batch_size == 40
  every = np.concatenate([b.positions for b in planned.buckets])
  assert sorted(every) == list(range(160))
  assert [row.records for row in report.rows] == [40] * 4
  assert [row.images for row in report.rows] == [0, 0, 0, 40]
  assert not report.dropped


def test_a_budget_that_does_not_suit_is_refused_with_one_that_does():
  options = buckets.Options(max_tokens=100, shapes=OPTIONS.shapes)
  with pytest.raises(ValueError) as refused:
    make(MIXED, options, multiple_of=2)
  text = str(refused.value)
  assert "max_tokens=100 does not suit batches of a multiple of 2" in text
  assert "9x32x64 of 96 tokens: 2 clips are 192, more than that" in text
  assert "1x32x32" not in text  # 96 of 100
  suggested = int(text.split("try max_tokens=")[1].split(",")[0])
  options = buckets.Options(max_tokens=suggested, shapes=OPTIONS.shapes)
  make(MIXED, options, multiple_of=2)
  with pytest.raises(ValueError, match="does not suit"):
    options = buckets.Options(max_tokens=suggested - 1, shapes=OPTIONS.shapes)
    make(MIXED, options, multiple_of=2)


def test_a_batch_that_fills_too_little_is_refused():
  options = buckets.Options(max_tokens=170, shapes=(SQUARE, LONG))
  with pytest.raises(ValueError) as refused:
    make(MIXED, options)
  text = str(refused.value)
  assert "9x32x32 of 48 tokens: 3 clips are 144, 84.7% of it" in text
  assert "the least is 85%" in text and "17x32x32" not in text  # 94.1 %
  assert "try max_tokens=192," not in text and "try max_tokens=" in text


def test_small_buckets_are_refused_dropped_or_moved():
  found = many((9, 40, 40, 8), (1, 40, 40, 0))
  found = indices.Index(
    *(
      np.concatenate([getattr(found, n), getattr(index((9, 40, 80, 8)), n)])
      for n in ("keys", "num_frames", "height", "width", "fps")
    )
  )
  shapes = (SQUARE, WIDE, IMAGE, LONG)
  with pytest.raises(ValueError) as refused:
    make(found, buckets.Options(max_tokens=480, shapes=shapes))
  assert "9x32x64: 1 records, 5 clips a batch" in str(refused.value)
  assert "17x32x32: 0 records, 6 clips a batch" in str(refused.value)
  for small, records in (("drop", 40), ("move", 41)):
    options = buckets.Options(max_tokens=480, shapes=shapes, small=small)
    planned, report = make(found, options)
    assert [b.shape for b in planned.buckets] == [SQUARE, IMAGE]
    assert len(planned.buckets[0].positions) == records
    assert [row.used for row in report.rows] == [True, False, True, False]
    assert sum(n for _, n, _ in report.dropped) == 41 - records


def test_a_report_names_what_is_dropped_and_why():
  rows = [(9, 40, 40, 8)] * 20 + [(5, 40, 40, 8)] * 5 + [(9, 16, 16, 8)]
  found = index(*rows, (9, 40, 80, 8))
  options = buckets.Options(max_tokens=96, shapes=(SQUARE, WIDE), small="drop")
  _, report = make(found, options, multiple_of=1)
  text = str(report)
  assert "| 9x32x32 | 48 | 2 | 100.0% | 20 | 0 | 10.0 |" in text
  assert "| 9x32x64 | 96 | 1 | 100.0% | 1 | 0 | 1.0 |" in text
  assert "dropped: 6 records" in text
  assert "5 shorter than every shape, at the clips' fps: record 20," in text
  assert "1 smaller than every shape" in text and "record 25" in text


def test_nothing_left_is_refused_with_the_report():
  options = buckets.Options(max_tokens=48, shapes=(SQUARE,), small="drop")
  with pytest.raises(
    ValueError, match="no bucket has any of the 3(?s:.)*3 shorter"
  ):
    make(many((5, 40, 40, 8), times=3), options)
  options = buckets.Options(max_tokens=48, shapes=(SQUARE,), small="move")
  with pytest.raises(ValueError, match="no bucket has any"):
    make(many((5, 40, 40, 8), times=3), options)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"small": "keep"}, "buckets.small must be one of .*'keep'"),
    ({"max_tokens": -1}, "buckets.max_tokens must be at least 0, got -1"),
    ({"max_tokens": 8}, "needs either buckets.shapes or both"),
    ({"max_tokens": 8, "frames": (1,)}, "needs either"),
    ({"max_tokens": 8, "shapes": (IMAGE,), "areas": (64,)}, "needs either"),
    (
      {"max_tokens": 8, "shapes": (IMAGE,), "areas": (64,), "frames": (1,)},
      "needs either",
    ),
  ],
)
def test_options_that_contradict_are_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    buckets.Options(**fields)


def test_hosts_choose_the_same_bucket():
  options = buckets.Options(max_tokens=640, shapes=(SQUARE, LONG, IMAGE))
  planned, _ = make(MIXED, options, multiple_of=4)
  for step in range(40):
    shape, positions = plan.batch(planned, step)
    for hosts in (1, 2, 4):
      shares = [plan.host_slice(positions, h, hosts) for h in range(hosts)]
      assert np.concatenate(shares).tolist() == positions.tolist()
    (bucket,) = (b for b in planned.buckets if b.shape == shape)
    assert set(positions) <= set(bucket.positions)


def test_one_shape_takes_what_is_long_enough():
  found = index((9, 8, 8, 8), (5, 90, 90, 8), (20, 90, 90, 8))
  planned, report = buckets.make_one(found, SQUARE, 4, 48, seed=1, fps=8)
  (bucket,) = planned.buckets
  assert bucket.positions.tolist() == [0, 2] and bucket.batch_size == 4
  assert "1 shorter than every shape, at the clips' fps: record 1" in str(
    report
  )
  whole, _ = buckets.make_one(found, IMAGE, 4, 1, seed=1, fps=8)
  for step in range(5):
    wanted = plan.batch_indices(1, step, 3, 4)
    assert plan.batch(whole, step)[1].tolist() == wanted.tolist()
  with pytest.raises(ValueError, match="no bucket has any of the 3 records"):
    buckets.make_one(found, (33, 8, 8), 4, 48, seed=1, fps=8)
