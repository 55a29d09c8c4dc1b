"""What the probe says of a file is what the reader and the cuts find in it."""

import fractions
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.data import videos
from tests.data.test_clips import card, encode, extents
from vdit_jax.data import clips
from vdit_jax.data.build import cuts, probe

EIGHT = [(x, 0, 0, y) for x in (1, -1) for y in (1, -1)]
EIGHT += [(0, x, y, 0) for x in (1, -1) for y in (1, -1)]
ROOT = pathlib.Path(__file__).resolve().parents[3]
WIDE = fractions.Fraction(4, 3)


def probed(path):
  return probe.probe(str(path), 2, probe.MOST_BYTES)


def reason(path):
  found = probed(path)
  assert isinstance(found, probe.Reject), found
  return found.reason


def read(path):
  """All frames as a record's reader shows them; as many as the probe says."""
  clip = probed(path)
  assert isinstance(clip, probe.Clip), clip
  view = clips.View((clip.num_frames, clip.height, clip.width))
  frames, fps = clips.read(path.read_bytes(), view)
  assert fps == pytest.approx(clip.fps, rel=1e-3)
  if clip.num_frames > 1:
    with pytest.raises(ValueError, match="num_frames"):
      more = clip.num_frames + 1, clip.height, clip.width
      clips.read(path.read_bytes(), clips.View(more))
  return frames


def cut(path, **length):
  """A file's clips, cut without loss, as the reader shows them."""
  length = cuts.Length(**length, crf=0)
  found = []
  for clip in cuts.cut(str(path), probed(path), length):
    view = clips.View((clip.num_frames, clip.height, clip.width))
    found.append(clips.read(clip.mp4, view)[0])
  return found


@pytest.mark.parametrize("matrix", EIGHT)
def test_eight_orientations_of_videos(matrix, tmp_path):
  path = videos.write(tmp_path / "a.mp4", num_frames=9, width=32)
  plain = read(path)
  videos.show_by(path, matrix)
  want = videos.shown_by(plain, matrix)
  np.testing.assert_array_equal(read(path), want)
  for length in ({"frames": 4}, {"seconds": 0.4}):
    np.testing.assert_array_equal(np.concatenate(cut(path, **length)), want[:8])


@pytest.mark.parametrize(
  "matrix, quarter",
  [
    ((0.7071, 0.7071, -0.7071, 0.7071), None),
    ((0.6, 0.8, -0.8, 0.6), (0, 1, -1, 0)),
    ((0.8, 0.6, -0.6, 0.8), (1, 0, 0, 1)),
    ((0, 0, 0, 0), (1, 0, 0, 1)),
    ((2, 0, 0, 2), (1, 0, 0, 1)),
  ],
)
def test_other_matrices_are_the_nearest_of_the_eight(matrix, quarter, tmp_path):
  path = videos.write(tmp_path / "a.mp4", num_frames=9)
  plain = read(path)
  videos.show_by(path, matrix)
  found = read(path)
  if quarter:
    np.testing.assert_array_equal(found, videos.shown_by(plain, quarter))
  np.testing.assert_array_equal(np.concatenate(cut(path, frames=9)), found)


@pytest.mark.parametrize("matrix", [(1, 0, 0, 1), (0, 1, -1, 0)])
@pytest.mark.parametrize("length", [{"frames": 4}, {"seconds": 0.4}])
def test_cut_clips_keep_the_shape_of_pixels(matrix, length, tmp_path):
  squeezed = np.asarray(Image.fromarray(card(96, 96)).resize((72, 96)))
  path = tmp_path / "a.mp4"
  path.write_bytes(encode(np.stack([squeezed] * 8), aspect=WIDE))
  videos.show_by(path, matrix)
  for clip in cuts.cut(str(path), probed(path), cuts.Length(**length)):
    video, _ = clips.read(clip.mp4, clips.View((1, 64, 64)))
    height, width = extents(video[0])
    assert height == pytest.approx(width, rel=0.02)
    assert height == pytest.approx(extents(card(64, 64))[0], rel=0.03)


@pytest.mark.parametrize(
  "name, codec, pix_fmt",
  [
    ("a.mp4", "libx265", "yuv420p10le"),
    ("a.mov", "prores_ks", "yuv422p10le"),
    ("a.mov", "prores_ks", "yuva444p10le"),
    ("a.mkv", "ffv1", "gray16le"),
    ("a.mov", "png", "rgb24"),
    ("a.avi", "mjpeg", "yuvj420p"),
    ("a.avi", "libx264", "yuv420p"),
    ("a.h264", "libx264", "yuv420p"),
  ],
)
def test_depths_of_videos_survive_cuts(name, codec, pix_fmt, tmp_path):
  path = tmp_path / name
  videos.write(path, num_frames=8, codec=codec, pix_fmt=pix_fmt)
  whole = read(path)
  error = np.abs(np.concatenate(cut(path, frames=4)).astype(int) - whole)
  assert error.mean() < 2  # of RGB to YUV, and FFmpeg's of a range not said


@pytest.mark.parametrize("curve", [16, 18], ids=["PQ", "HLG"])
def test_high_dynamic_range_survives_cuts(curve, tmp_path):
  picture = videos.picture(1, 48, 64)
  path = videos.write_hdr(tmp_path / "a.mp4", picture, curve, num_frames=8)
  np.testing.assert_array_equal(np.concatenate(cut(path, frames=4)), read(path))


@pytest.mark.parametrize("form", ["gif", "webp", "png", "avif"])
def test_animations_are_read_and_cut(form, tmp_path):
  path = tmp_path / f"a.{form}"
  images = [Image.fromarray(videos.picture(i, 48, 64)) for i in range(9)]
  images[0].save(path, save_all=True, append_images=images[1:], duration=100)
  whole = read(path)
  assert whole.shape == (9, 48, 64, 3)
  error = np.abs(np.concatenate(cut(path, frames=3)).astype(int) - whole)
  assert error.mean() < 2


def test_edit_list_leaves_frames_out(tmp_path):
  path = videos.write(tmp_path / "a.mp4", num_frames=12)
  whole = read(path)
  data = bytearray(path.read_bytes())
  at = data.index(b"elst") + 4 + 8  # version, count; duration, begin, rate
  track = data.index(b"mdhd") + 4 + 12
  scale = int.from_bytes(data[track : track + 4], "big")
  begin = int.from_bytes(data[at + 4 : at + 8], "big") + 3 * scale // 10
  data[at + 4 : at + 8] = begin.to_bytes(4, "big")
  path.write_bytes(data)
  np.testing.assert_array_equal(read(path), whole[3:])


def box(kind, content=bytes(16)):
  return (8 + len(content)).to_bytes(4, "big") + kind + content


def before(data, kind, more):
  """Put more before a box of an mp4."""
  at = data.index(kind) - 4
  return data[:at] + more + data[at:]


def grown(data, kind, by):
  """Change the length of a box of an mp4."""
  at = data.index(kind) - 4
  length = int.from_bytes(data[at : at + 4], "big") + by
  return data[:at] + length.to_bytes(4, "big") + data[at + 4 :]


def little(data, at, value):
  return data[:at] + (value % 2**32).to_bytes(4, "little") + data[at + 4 :]


def segment(data, change):
  at = data.index(b"\x18\x53\x80\x67") + 4
  length = 2**56 - 1 if change is None else len(data) - at - 8 + change
  return data[:at] + (2**56 + length).to_bytes(8, "big") + data[at + 8 :]


FRONT = {"container": {"movflags": "faststart"}}
AVI, WEBM = {"codec": "mpeg4"}, {"codec": "libvpx-vp9"}
WHOLE = [
  *[
    ("mp4", {}, lambda d, kind=kind: before(d, b"moov", box(kind)))
    for kind in (b"pdin", b"pnot", b"PICT", b"abcd", b"\xa9xyz")
  ],
  ("mp4", {}, lambda d: d + b"behind the end " * 99),
  ("mp4", {}, lambda d: d + bytes(999)),
  ("mp4", FRONT, lambda d: d + box(b"wxyz")[:-4]),
  *[("mp4", FRONT, lambda d, n=n: grown(d, b"mdat", n)) for n in (1, 9**6)],
  *[("avi", AVI, lambda d, n=n: little(d, 4, n)) for n in (0, 100, 10**6, -1)],
  *[
    ("avi", AVI, lambda d, n=n: little(d, d.index(b"movi") - 4, n))
    for n in (0, -1)
  ],
  ("avi", AVI, lambda d: d + b"behind the end " * 99),
  *[
    ("webm", WEBM, lambda d, n=n: segment(d, n))
    for n in (-900, -1, 1, 900, 10**9, None)
  ],
  ("mkv", {}, lambda d: d + b"behind the end " * 99),
]


@pytest.mark.parametrize("suffix, options, change", WHOLE)
def test_sizes_that_are_not_exact_are_no_damage(
  suffix, options, change, tmp_path
):
  path = videos.write(tmp_path / f"a.{suffix}", num_frames=8, **options)
  whole = read(path)
  path.write_bytes(change(path.read_bytes()))
  np.testing.assert_array_equal(read(path), whole)


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.97])
@pytest.mark.parametrize(
  "suffix, options",
  [
    ("mp4", {}),
    ("mp4", FRONT),
    ("mp4", {"container": {"movflags": "frag_keyframe+empty_moov"}}),
    ("webm", WEBM),
    ("mkv", {}),
    ("avi", AVI),
  ],
)
def test_cut_off_files_are_truncated(suffix, options, share, tmp_path):
  path = videos.write(tmp_path / f"a.{suffix}", num_frames=20, **options)
  assert reason(videos.cut_off(path, share)) == probe.Reason.TRUNCATED


def test_index_that_is_cut_off_is_not_missed(tmp_path):
  """An AVI of which every frame is there, and its header says how many."""
  path = videos.write(tmp_path / "a.avi", num_frames=8, **AVI)
  whole = read(path)
  data = path.read_bytes()
  data = little(data, data.index(b"strh") + 40, 8)  # PyAV counts otherwise
  path.write_bytes(data[: data.rindex(b"idx1") + 20])
  np.testing.assert_array_equal(read(path), whole)


def test_what_is_no_file_is_left_out(tmp_path):
  os.mkfifo(tmp_path / "pipe.mp4")
  (tmp_path / "folder.mp4").mkdir()
  (tmp_path / "empty.mp4").write_bytes(b"")
  for name in ("pipe.mp4", "folder.mp4", "none.mp4"):
    assert reason(tmp_path / name) == probe.Reason.MISSING
  assert reason("/dev/zero") == probe.Reason.MISSING
  assert reason(tmp_path / "empty.mp4") == probe.Reason.EMPTY


def test_build_goes_on_beside_a_pipe_and_a_play_list(tmp_path):
  folder = tmp_path / "videos"
  folder.mkdir()
  videos.write(folder / "good.mp4")
  os.mkfifo(folder / "pipe.mp4")
  (folder / "list.mp4").write_text("ffconcat version 1.0\nfile good.mp4\n")
  table = tmp_path / "all.csv"
  names = ("good", "pipe", "list")
  table.write_text("file,caption\n" + "".join(f"{n}.mp4,x\n" for n in names))
  found = subprocess.run(
    [
      *(sys.executable, "-m", "vdit_jax.data.build", "--name=mine/clips"),
      *(f"--videos={folder}", f"--captions={table}", "--validation=0"),
      *(f"--data_dir={tmp_path / 'data'}", "--workers=0"),
    ],
    cwd=folder,
    capture_output=True,
    text=True,
    check=False,
    timeout=120,
    env=os.environ | {"PYTHONPATH": str(ROOT)},
  )
  assert found.returncode == 0, found.stderr
  assert "train: 1 clips" in found.stderr
  assert "1 missing file" in found.stderr
  assert "1 not a video or image" in found.stderr


def test_stills_of_one_video_frame_are_whole_records(tmp_path):
  path = videos.write(tmp_path / "a.mkv", num_frames=1)
  clip = probe.probe(str(path), 9, probe.MOST_BYTES)
  assert isinstance(clip, probe.Clip)
  assert (clip.num_frames, clip.fps, clip.seconds) == (1, 0.0, 0.0)
  frames, fps = clips.read(path.read_bytes(), clips.View((1, 48, 64)))
  assert frames.shape == (1, 48, 64, 3) and fps == 0


@pytest.mark.parametrize(
  "name, codec, pix_fmt",
  [
    ("a.h264", "libx264", "yuv420p"),
    ("a.hevc", "libx265", "yuv420p"),
    ("a.swf", "flashsv", "bgr24"),
    ("a.flv", "libx264", "yuv420p"),
    ("a.wmv", "wmv2", "yuv420p"),
    ("a.ivf", "libvpx", "yuv420p"),
    ("a.obu", "libsvtav1", "yuv420p"),
    ("a.mpg", "mpeg2video", "yuv420p"),
    ("a.nut", "ffv1", "yuv420p"),
  ],
)
def test_forms_with_and_without_an_index_are_read(
  name, codec, pix_fmt, tmp_path
):
  path = tmp_path / name
  videos.write(path, codec=codec, pix_fmt=pix_fmt, height=96, width=128)
  frames = read(path)
  assert frames.shape == (12, 96, 128, 3)
  want = np.stack([videos.picture([0, i], 96, 128) for i in range(12)])
  assert np.abs(frames.astype(int) - want).mean() < 20
