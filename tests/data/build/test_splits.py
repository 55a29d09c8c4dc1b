"""The share of the clips that is for validation, in whole files."""

import logging

import numpy as np
import pytest
from etils import epath

from tests.data import videos
from vdit_jax.data import index, shards
from vdit_jax.data.build import cuts, dataset, jobs, splits


def _groups(counts, share, num_rows=None, seed=0):
  draws = np.random.default_rng(seed).random(len(counts)).tolist()
  return [
    splits.Group(
      shards.Shard(epath.Path(f"{i}"), count, 0, {}),
      splits.label(draw, share, num_rows or len(counts)),
      draw,
    )
    for i, (count, draw) in enumerate(zip(counts, draws, strict=True))
  ]


def _sizes(counts, share, **options):
  found = splits.divide(_groups(counts, share, **options), share)
  return [sum(s.num_records for s in found[name]) for name in splits.SPLITS]


def _nearest(counts, share):
  """The best that whole files allow, by trying all."""
  sums = {0}
  for count in counts:
    sums |= {count + x for x in sums}
  least = share * sum(counts)
  return min(abs(x - least) for x in sums - {0, sum(counts)})


@pytest.mark.parametrize("share", [0.001, 0.02, 0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(5))
def test_the_share_of_few_files_is_as_near_as_a_file_allows(seed, share):
  counts = np.random.default_rng(seed).integers(1, 12, 9).tolist()
  train, validation = _sizes(counts, share, seed=seed)
  assert train + validation == sum(counts) and train and validation
  off = abs(validation - share * sum(counts))
  assert off == pytest.approx(_nearest(counts, share))


def test_of_more_files_the_first_draws_are_taken():
  groups = _groups([3] * 2_000, 0.2)
  found = splits.divide(groups, 0.2)["validation"]
  chosen = {shard.path.name for shard in found}
  assert len(chosen) == 400
  ordered = sorted(groups, key=lambda group: group.draw)
  assert chosen == {group.shard.path.name for group in ordered[:400]}


@pytest.mark.parametrize(
  "counts, share, validation",
  [
    ([7, 6, 5, 9, 4, 3, 8, 6, 8], 0.02, 3),  # 56 clips of nine files
    ([1] * 9, 0.02, 1),
    ([1] * 100, 0.02, 2),
    ([1] * 3000, 0.02, 60),
    ([5] * 300, 0.1, 150),
    ([1, 1], 0.9, 1),
    ([1], 0.5, 0),
    ([4, 0, 0], 0.5, 0),
    ([3, 1, 2], 0.0, 0),
  ],
)
def test_shares_of_files(counts, share, validation):
  assert _sizes(counts, share)[1] == validation


def test_of_many_files_each_is_decided_by_itself():
  alone = [splits.label(d, 0.1, 10**6) for d in (0.0, 0.0999, 0.1, 0.9)]
  assert alone == ["validation", "validation", "train", "train"]
  validation = _sizes([1] * 20_000, 0.1, num_rows=20_000)[1]
  assert validation == pytest.approx(2_000, rel=0.05)


def test_the_order_stays(tmp_path):
  groups = _groups([2] * 30, 0.3)
  for split in splits.divide(groups, 0.3).values():
    places = [int(shard.path.name) for shard in split]
    assert places == sorted(places)


def test_films_cut_into_clips_keep_the_share_and_it_is_said(tmp_path, caplog):
  """Nine files of 56 clips; two machines give what one does."""
  folder = tmp_path / "films"
  folder.mkdir()
  lengths = [84, 72, 60, 108, 48, 36, 96, 72, 96]  # frames at 10 a second
  rows = ["file,caption"]
  for i, num_frames in enumerate(lengths):
    videos.write(folder / f"{i}.mp4", num_frames, 16, 16, seed=i)
    rows.append(f"{i}.mp4,x")
  (folder / "all.csv").write_text("\n".join(rows))
  known = {}
  for num_shards, share in ((1, 0.02), (1, 0.2), (2, 0.2)):
    spec = jobs.Spec(
      str(folder / "all.csv"),
      "",
      validation=share,
      length=cuts.Length(seconds=1.2),
      num_shards=num_shards,
    )
    name = f"mine/of{num_shards}_{round(100 * share)}"
    caplog.clear()
    with caplog.at_level(logging.INFO, "absl"):
      for shard in range(num_shards):
        dataset.build(spec, tmp_path, name, shard=shard, workers=0)
      if num_shards > 1:
        dataset.join(tmp_path, name)
    target = shards.place(tmp_path, name).target
    keys = [index.read(target, split).keys.tolist() for split in splits.SPLITS]
    assert sum(map(len, keys)) == 56
    assert len(keys[1]) == {0.02: 3, 0.2: 11}[share]
    assert f"for --validation={share:g}" in caplog.text
    assert known.setdefault(share, keys) == keys
