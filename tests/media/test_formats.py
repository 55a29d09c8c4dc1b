"""Files give back what was written, or were never there."""

import numpy as np
import pytest
from PIL import Image

from vdit_jax.media import formats, sheets


def _video(F=5, H=32, W=48):
  """A coloured square that moves over a gradient, float [F, H, W, 3]."""
  video = np.zeros((F, H, W, 3), np.float32)
  video[..., 2] = np.linspace(-0.5, 0.5, W)
  for index in range(F):
    video[index, 4:16, 4 + 4 * index : 16 + 4 * index] = (0.8, -0.4, 0.0)
  return video


@pytest.mark.parametrize("suffix", [".mp4", ".gif", ".npy"])
def test_a_video_comes_back(tmp_path, suffix):
  path = tmp_path / "new" / f"clip{suffix}"
  formats.write(path, _video(), 8, enlarge=2)
  frames, fps = formats.read(path)
  factor = 1 if suffix == ".npy" else 2
  expected = sheets.to_uint8(_video()).repeat(factor, 1).repeat(factor, 2)
  assert frames.dtype == np.uint8 and frames.shape == expected.shape
  assert fps == (None if suffix == ".npy" else 8)
  assert np.abs(frames.astype(int) - expected).mean() < 2


def test_an_array_file_keeps_the_floats(tmp_path):
  formats.write(tmp_path / "clip.npy", _video(), 8)
  np.testing.assert_array_equal(np.load(tmp_path / "clip.npy"), _video())


def test_a_picture_is_one_row_of_all_frames(tmp_path):
  formats.write(tmp_path / "clip.png", _video(), 8)
  frames, fps = formats.read(tmp_path / "clip.png")
  assert fps is None and len(frames) == 1
  np.testing.assert_array_equal(frames[0], sheets.draw(_video()[None]))


def test_odd_sizes_are_padded_with_the_edge(tmp_path):
  formats.write(tmp_path / "odd.mp4", _video(H=31, W=47), 8)
  frames, _ = formats.read(tmp_path / "odd.mp4")
  assert frames.shape[1:3] == (32, 48)
  expected = sheets.to_uint8(_video(H=31, W=47))
  assert np.abs(frames[:, -1, :47].astype(int) - expected[:, -1]).mean() < 3


@pytest.mark.parametrize("fps", [8, 12.5, 24, 30000 / 1001])
def test_the_rate_comes_back(tmp_path, fps):
  for name in ("a.mp4", "a.gif"):
    formats.write(tmp_path / name, _video(), fps)
    frames, found = formats.read(tmp_path / name)
    assert len(frames) == 5 and found == pytest.approx(fps)


def test_a_gif_keeps_frames_that_are_equal(tmp_path):
  video = _video()[[0, 0, 0, 1, 2, 2]]
  for clip in (video, video[:3]):
    formats.write(tmp_path / "still.gif", clip, 8)
    frames, fps = formats.read(tmp_path / "still.gif")
    assert fps == 8
    difference = frames.astype(int) - sheets.to_uint8(clip)
    assert len(frames) == len(clip) and np.abs(difference).mean() < 2


def test_a_gif_without_our_comment_is_read_as_it_is(tmp_path):
  images = [Image.fromarray(frame) for frame in sheets.to_uint8(_video())]
  images[0].save(
    tmp_path / "a.gif", save_all=True, append_images=images[1:], duration=100
  )
  frames, fps = formats.read(tmp_path / "a.gif")
  assert frames.shape == (5, 32, 48, 3) and fps == pytest.approx(10)


def test_a_failed_write_leaves_the_old_file_and_nothing_else(
  tmp_path, monkeypatch
):
  path = tmp_path / "clip.mp4"
  formats.write(path, _video(), 8)
  before = path.read_bytes()

  def fail(source, target):
    raise OSError("disk full")

  monkeypatch.setattr("os.replace", fail)
  with pytest.raises(OSError, match="disk full"):
    formats.write(path, -_video(), 8)
  assert path.read_bytes() == before
  assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]


@pytest.mark.parametrize(
  "video, message",
  [
    (np.full((2, 4, 4, 3), np.nan, np.float32), "finite, got 96 of 96"),
    (np.zeros((2, 4, 4, 1), np.float32), r"shape \(2, 4, 4, 1\)"),
    (np.zeros((2, 4, 4, 3), np.int32), "int32"),
    (np.zeros((0, 4, 4, 3), np.uint8), "not empty"),
    (np.zeros((1, 2, 4, 4, 3), np.uint8), "one clip"),
  ],
)
def test_a_video_that_is_none_is_refused(tmp_path, video, message):
  with pytest.raises(ValueError, match=message):
    formats.write(tmp_path / "clip.mp4", video, 8)
  assert not list(tmp_path.iterdir())


def test_paths_are_checked_before_any_work(tmp_path):
  (tmp_path / "file").write_text("")
  (tmp_path / "folder.mp4").mkdir()
  for path, message in (
    ("clip.avi", r"\.gif, \.mp4, \.npy, \.png, got"),
    ("clip", "rename it"),
    ("file/clip.mp4", "cannot be written"),
    ("file/deeper/clip.mp4", "cannot be written"),
    ("folder.mp4", "is a folder"),
  ):
    with pytest.raises(ValueError, match=message):
      formats.check_writable(tmp_path / path)
  formats.check_writable(tmp_path / "new" / "folder" / "clip.mp4")
  assert not (tmp_path / "new").exists()


def test_numbers_out_of_range_are_refused(tmp_path):
  for arguments in ({"fps": 0}, {"fps": 8, "enlarge": 0}):
    with pytest.raises(ValueError, match=list(arguments)[-1]):
      formats.write(tmp_path / "clip.gif", _video(), **arguments)
  with pytest.raises(ValueError, match="at most 50"):
    formats.write(tmp_path / "clip.gif", _video(), 60)
