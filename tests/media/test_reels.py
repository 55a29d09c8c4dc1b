"""The record of a command's videos, and its contact sheet."""

import json

import numpy as np
import pytest

from vdit_jax.media import formats, reels

SETTINGS = {"steps": 3, "size": (2, 8, 8), "score": float("nan")}


def _clips(out, prompts=("a", "b"), num_videos=1, seed=5):
  return reels.clips(out, prompts, num_videos, seed)


def _begin(out, clips, settings=SETTINGS, overwrite=False):
  left = reels.find(out, clips, settings, overwrite)
  reels.begin(out, clips, settings, left)
  return left


def test_each_video_has_a_name_and_a_seed(tmp_path):
  clips = _clips(tmp_path / "x.gif", num_videos=2)
  assert [c.file for c in clips] == [f"x_{i:03d}.gif" for i in range(4)]
  assert [c.prompt for c in clips] == ["a", "a", "b", "b"]
  assert [c.seed for c in clips] == [5, 6, 7, 8]
  (one,) = _clips(tmp_path / "x.gif", ["a"])
  assert (one.file, one.seed) == ("x.gif", 5)
  with pytest.raises(
    ValueError, match="num_videos must be at least 1 .*, got 0"
  ):
    _clips(tmp_path / "x.gif", num_videos=0)
  with pytest.raises(
    ValueError, match="num_videos .* at most .*, got 10000000"
  ):
    _clips(tmp_path / "x.gif", num_videos=10**12)


def test_what_is_there_is_not_left(tmp_path):
  out = tmp_path / "x.npy"
  clips = _clips(out)
  assert _begin(out, clips) == clips
  (tmp_path / "x_001.npy").write_bytes(b"")
  assert _begin(out, clips) == clips[:1]
  assert (tmp_path / "x_001.npy").exists()
  assert _begin(out, clips, overwrite=True) == clips
  assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_one_video_alone_has_no_record(tmp_path):
  (tmp_path / "x.npy").write_bytes(b"older")
  clips = _clips(tmp_path / "x.npy", ["a"])
  assert _begin(tmp_path / "x.npy", clips) == clips
  assert [p.name for p in tmp_path.iterdir()] == ["x.npy"]


@pytest.mark.parametrize(
  "content",
  [
    b"",
    b"\xff",
    b"[]",
    b"[" * 50_000,
    b'{"settings": {}}',
    b'{"settings": [], "videos": []}',
    b'{"settings": {}, "videos": [1]}',
    b'{"settings": {}, "videos": [{"file": "x_0", "prompt": 1, "seed": 1}]}',
    b'{"settings": {}, "videos": [{"file": "other", "prompt": "", "seed": 1}]}',
    b'{"settings": {}, "videos": [{"file": "../x_", "prompt": "", "seed": 1}]}',
  ],
)
@pytest.mark.parametrize("overwrite", [False, True])
def test_another_file_is_no_record_and_stays(tmp_path, content, overwrite):
  """Nothing that it names is removed either."""
  out = tmp_path / "in" / "x.npy"
  out.parent.mkdir()
  (tmp_path / "in" / "other").write_text("")
  (tmp_path / "x_").write_text("")
  reels.record_path(out).write_bytes(content)
  with pytest.raises(
    ValueError, match=r"^out has .*x.json, which is no record"
  ):
    _begin(out, _clips(out), overwrite=overwrite)
  assert reels.record_path(out).read_bytes() == content
  assert (tmp_path / "x_").exists() and (out.parent / "other").exists()


@pytest.mark.parametrize("suffix", formats.SUFFIXES)
def test_the_sheet_shows_what_was_written(tmp_path, suffix):
  out, enlarged = tmp_path / f"x{suffix}", 2
  clips, rng = _clips(out), np.random.default_rng(0)
  for clip in clips:
    video = rng.uniform(-1, 1, (12, 8, 8, 3)).astype(np.float32)
    formats.write(tmp_path / clip.file, video, 8.0, enlarge=enlarged)
  reels.draw_sheet(out, clips, enlarged)
  sheet, _ = formats.read(tmp_path / "x_sheet.png")
  assert sheet.shape[0] == 1 and sheet.shape[2] >= 9 * 8
  again = sheet.copy()
  reels.draw_sheet(out, clips, enlarged)
  np.testing.assert_array_equal(
    again, formats.read(tmp_path / "x_sheet.png")[0]
  )


def test_a_sheet_of_many_large_videos_has_the_first(tmp_path, monkeypatch):
  out = tmp_path / "x.npy"
  clips = _clips(out, ["a"] * 5)
  for clip in clips[:3]:  # what comes after is not even read
    formats.write(tmp_path / clip.file, np.zeros((9, 8, 8, 3), np.uint8), 8.0)
  monkeypatch.setattr(reels, "_MOST_PIXELS", 2 * 9 * 8 * 8)
  reels.draw_sheet(out, clips, 1)
  assert (tmp_path / "x_sheet.png").exists()


def test_settings_that_are_no_numbers_are_the_same(tmp_path):
  out = tmp_path / "x.npy"
  _begin(out, _clips(out))
  (tmp_path / "x_000.npy").write_bytes(b"")
  assert len(_begin(out, _clips(out))) == 1
  text = reels.record_path(out).read_text()
  assert json.loads(text)["settings"]["size"] == [2, 8, 8]
  with pytest.raises(ValueError, match="x_000.npy: its score is None, not 1.0"):
    _begin(out, _clips(out), SETTINGS | {"score": 1.0})
