import fractions
import io

import av
import numpy as np
import pytest
from PIL import Image

from tests.data import videos
from vdit_jax.data import clips
from vdit_jax.media import footage

GOP = 8


def encode(
  images, times=None, rate=10, aspect=None, container="mp4", **options
):
  """Write images [n, H, W, 3] as a video, times in seconds; gives its bytes."""
  file = io.BytesIO()
  options = {"g": str(GOP), "crf": "4", "bf": "2"} | options
  with av.open(file, "w", format=container) as output:
    stream = output.add_stream("libx264", rate, options=options)
    stream.height, stream.width = images.shape[1:3]
    stream.pix_fmt = "yuv420p"
    if aspect:
      stream.codec_context.sample_aspect_ratio = aspect
    stream.codec_context.time_base = fractions.Fraction(1, 9000)
    for i, image in enumerate(images):
      frame = av.VideoFrame.from_ndarray(image, format="rgb24")
      frame.time_base = fractions.Fraction(1, 9000)
      frame.pts = round(9000 * (i / rate if times is None else times[i]))
      output.mux(stream.encode(frame))
    output.mux(stream.encode())
  return file.getvalue()


def decode(data):
  with av.open(io.BytesIO(data)) as container:
    frames = [f.to_ndarray(format="rgb24") for f in container.decode(video=0)]
  return np.stack(frames)


def pictures(number, height=48, width=64):
  return np.stack([videos.picture(i, height, width) for i in range(number)])


def card(height, width):
  """A test card: a white disc on black, in the middle."""
  y, x = np.mgrid[:height, :width] + 0.5
  radius = min(height, width) / 4
  inside = (y - height / 2) ** 2 + (x - width / 2) ** 2 < radius**2
  return np.repeat((255 * inside.astype(np.uint8))[..., None], 3, axis=-1)


def extents(image):
  """Height and width of what is white, by its second moments."""
  mass = image.astype(float).mean(-1)
  sizes = []
  for axis in (1, 0):
    profile = mass.sum(axis)
    at = np.arange(len(profile))
    mean = np.average(at, weights=profile)
    sizes.append(np.sqrt(np.average((at - mean) ** 2, weights=profile)))
  return sizes


@pytest.fixture(scope="module")
def steady():
  """60 frames of 24 a second, and their decoded pixels."""
  data = encode(pictures(60), rate=24)
  return data, decode(data)


@pytest.mark.parametrize("start", [0.0, 0.3, 0.77, 0.999])
@pytest.mark.parametrize(
  "fps, stride", [(0.0, 1), (24.0, 1), (8.0, 3), (2, 12)]
)
def test_frames_are_those_of_the_file(steady, start, fps, stride):
  data, whole = steady
  F = 5
  video, rate = clips.read(data, clips.View((F, 48, 64), fps, start))
  starts = 60 - (F - 1) * stride
  assert clips.available(60, 24.0, fps) >= F
  first = int(start * starts)
  np.testing.assert_array_equal(
    video, whole[first : first + F * stride : stride][:F]
  )
  assert rate == pytest.approx(fps or 24.0)


def test_varying_rate_is_evened_by_the_files_times():
  rng = np.random.default_rng(0)
  times = np.cumsum(rng.choice([0.02, 0.05, 0.3], 40))
  data = encode(pictures(40), times=times)
  whole, seconds = decode(data), times - times[0]
  for start in (0.0, 0.5, 0.99):
    view = clips.View((9, 48, 64), 7.0, start)
    indices = clips.pick(seconds, 9, 7.0, start)
    video, rate = clips.read(data, view)
    np.testing.assert_array_equal(video, whole[indices])
    assert rate == 7.0
    wanted = seconds[indices[0]] + np.arange(9) / 7.0
    nearest = np.abs(seconds[None] - wanted[:, None]).min(1)
    reached = np.abs(seconds[indices] - wanted)
    np.testing.assert_allclose(reached, nearest, atol=1e-3)


def test_slow_clips_repeat_frames(steady):
  data, whole = steady
  video, _ = clips.read(data, clips.View((6, 48, 64), 48.0))
  np.testing.assert_array_equal(video, whole[[0, 0, 1, 1, 2, 2]])


@pytest.mark.parametrize("rate", [12.0, 23.976, 29.97, 30.0, 59.94])
@pytest.mark.parametrize("fps", [0.0, 8.0, 16.0, 24.0])
def test_available_frames_are_there_and_no_more(rate, fps):
  rate = np.float32(rate)
  for count in (1, 2, 17, 100, 301):
    times = np.arange(count) / float(rate)
    most = int(clips.available(count, rate, fps))
    indices = clips.pick(times, most, fps, 0.0)
    assert len(indices) == most and (np.diff(indices) >= 0).all()
    if count > 1:
      end = (count - 0.5) / float(rate)
      step = 1 / (fps or float(rate))
      assert (most - 1) * step <= end + 1e-3 * step < most * step + 2e-3 * step
      with pytest.raises(ValueError, match=f"num_frames={most + 2}"):
        clips.pick(times, most + 2, fps, 0.0)


def test_starts_cover_the_clip_evenly():
  times = np.arange(20) / 10
  starts = [clips.pick(times, 5, 5.0, u)[0] for u in np.linspace(0, 0.999, 600)]
  counts = np.bincount(starts)
  assert len(counts) == 12 and counts.min() >= 49 and counts.max() <= 51


def test_only_frames_from_the_key_frame_on_are_decoded(steady, monkeypatch):
  data, whole = steady
  decoded = []
  opened = av.open

  class Watched:
    """A container that counts the frames it decodes."""

    def __init__(self, container):
      self._container = container

    def __enter__(self):
      self._container.__enter__()
      return self

    def __exit__(self, *error):
      self._container.__exit__(*error)

    def __getattr__(self, name):
      return getattr(self._container, name)

    def decode(self, stream):
      for frame in self._container.decode(stream):
        decoded.append(round(frame.time * 24))
        yield frame

  watched = lambda file, **options: Watched(opened(file, **options))
  monkeypatch.setattr(footage.av, "open", watched)
  with opened(io.BytesIO(data)) as container:
    packets = [p for p in container.demux(video=0) if p.size and p.is_keyframe]
    keys = [round(float(p.pts * p.time_base) * 24) for p in packets]
  assert len(keys) > 5
  for start, F in ((0.0, 1), (0.5, 4), (0.95, 3)):
    decoded.clear()
    video, _ = clips.read(data, clips.View((F, 48, 64), 0.0, start))
    first = int(start * (60 - F + 1))
    np.testing.assert_array_equal(video, whole[first : first + F])
    key = max(k for k in keys if k <= first)
    assert decoded == list(range(key, first + F))


@pytest.mark.parametrize(
  "size", [(90, 160), (160, 90), (128, 128), (64, 200), (40, 40)]
)
@pytest.mark.parametrize("H, W", [(64, 64), (64, 96), (96, 64), (63, 95)])
def test_pixels_are_not_stretched(size, H, W):
  frames = card(*size)[None]
  video, _ = clips.arrange(frames, 0.0, clips.View((1, H, W)))
  assert video.shape == (1, H, W, 3)
  scale = max(H / size[0], W / size[1])
  before = np.array(extents(frames[0]))
  reach = min(size) / 4 * scale
  if reach < min(H, W) / 2:  # the whole disc is in the crop
    np.testing.assert_allclose(extents(video[0]), scale * before, rtol=0.01)


def test_shrinking_does_not_alias():
  """Lines finer than the result's pixels become grey."""
  lines = np.zeros((1, 128, 128, 3), np.uint8)
  lines[:, :, ::2] = 255
  video, _ = clips.arrange(lines, 0.0, clips.View((1, 32, 32)))
  assert np.abs(video[:, 2:-2, 2:-2].astype(int) - 127).max() <= 2


def test_crop_lies_where_the_view_says():
  ramp = np.broadcast_to(np.arange(96, dtype=np.uint8), (48, 96))
  image = ramp[None, :, :, None]
  for left, first in ((0.0, 0), (0.5, 24), (1.0, 48)):
    video, _ = clips.arrange(image, 0.0, clips.View((1, 48, 48), left=left))
    np.testing.assert_array_equal(
      video[0, 0, :, 0], np.arange(first, first + 48)
    )
    tall = np.ascontiguousarray(image.swapaxes(1, 2))
    video, _ = clips.arrange(tall, 0.0, clips.View((1, 48, 48), top=left))
    np.testing.assert_array_equal(
      video[0, :, 0, 0], np.arange(first, first + 48)
    )
  view = clips.View((1, 48, 48), left=0.0, mirrored=True)
  video, _ = clips.arrange(image, 0.0, view)
  np.testing.assert_array_equal(video[0, 0, :, 0], np.arange(48)[::-1])


@pytest.mark.parametrize("degrees, quarters", [(90, 3), (180, 2), (270, 1)])
def test_rotation_is_as_a_player_shows_it(tmp_path, degrees, quarters):
  path = videos.write(tmp_path / "a.mp4", num_frames=4)
  plain = decode(path.read_bytes())
  data = videos.rotate(path, degrees).read_bytes()
  turned = np.rot90(plain, quarters, axes=(1, 2))
  F, H, W, _ = turned.shape
  video, _ = clips.read(data, clips.View((F, H, W)))
  np.testing.assert_array_equal(video, turned)


def test_pixels_that_are_not_square_are_made_square():
  squeezed = np.asarray(Image.fromarray(card(96, 96)).resize((72, 96)))
  data = encode(squeezed[None], aspect=fractions.Fraction(4, 3))
  video, _ = clips.read(data, clips.View((1, 64, 64)))
  height, width = extents(video[0])
  assert height == pytest.approx(width, rel=0.02)


@pytest.mark.parametrize("format", ["PNG", "JPEG"])
def test_image_is_a_clip_of_one_frame(format):
  picture = Image.fromarray(card(40, 60)[:, :40])
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by 90 degrees
  file = io.BytesIO()
  picture.save(file, format, exif=exif)
  video, fps = clips.read(file.getvalue(), clips.View((1, 40, 40), 8.0, 0.7))
  assert fps == 0 and video.shape == (1, 40, 40, 3)
  want = np.rot90(np.asarray(picture), 3)
  assert np.abs(video[0].astype(int) - want).mean() < (
    3 if format == "JPEG" else 1e-9
  )
  with pytest.raises(ValueError, match="num_frames=2"):
    clips.read(file.getvalue(), clips.View((2, 40, 40)))


def test_files_without_times_are_read_too():
  data = encode(pictures(20), container="avi", bf="2")
  whole = decode(data)
  video, fps = clips.read(data, clips.View((4, 48, 64), 5.0, 0.5))
  first = int(0.5 * 14)
  np.testing.assert_array_equal(video, whole[first : first + 8 : 2])
  assert fps == 5


def test_draws_are_of_the_records_seed():
  def draw(seed, **options):
    rng = np.random.default_rng(seed)
    return clips.draw_view((4, 8, 8), 0.0, rng, **options)

  assert draw(1, crop="random") == draw(1, crop="random")
  assert draw(1, crop="random") != draw(2, crop="random")
  views = [draw(seed, crop="random", flip=True) for seed in range(200)]
  assert 70 < sum(view.mirrored for view in views) < 130
  assert np.std([view.top for view in views]) == pytest.approx(0.29, abs=0.04)
  centre = draw(3, flip=False)
  assert (centre.top, centre.left, centre.mirrored) == (0.5, 0.5, False)
  assert centre.start == draw(3, crop="random").start
  assert clips.draw_view((4, 8, 8), 8.0, None, "random", True) == clips.View(
    (4, 8, 8), 8.0
  )


def test_damaged_files_are_refused(steady):
  data, _ = steady
  view = clips.View((60, 48, 64))
  broken = bytearray(data)
  middle = len(data) // 2
  broken[middle : middle + 400] = bytes(400)
  for bad in (data[: len(data) // 2], b"", b"no video at all", bytes(broken)):
    with pytest.raises((ValueError, OSError, av.FFmpegError)):
      clips.read(bad, view)


def test_frames_that_the_decoder_made_up_are_refused(steady):
  """A few wrong bytes: it goes on, with what it had before."""
  data, _ = steady
  rng, refused = np.random.default_rng(0), 0
  for place in rng.integers(2_000, len(data) - 3_000, 20).tolist():
    broken = data[:place] + rng.bytes(6) + data[place + 6 :]
    try:
      clips.read(broken, clips.View((60, 48, 64)))
    except ValueError as error:
      refused += "is damaged" in str(error)
  assert refused >= 10
