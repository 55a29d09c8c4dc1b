"""Pictures, clips and numbers of the command line, as what a clip is given."""

import types

import numpy as np
import pytest

from vdit_jax import given_files
from vdit_jax.data.digit_worlds import BOX, CAMERA
from vdit_jax.media import formats

SIZE = F, H, W = 9, 16, 24
FPS = 8.0


class Pipe:
  """Stands in for a pipeline: what is not given is black, plus its seed."""

  def __init__(self, takes=4):
    cfg = types.SimpleNamespace(time_stride=4, space_stride=4)
    autoencoder = types.SimpleNamespace(cfg=cfg)
    denoiser = types.SimpleNamespace(cfg=None)
    self.modules = types.SimpleNamespace(
      autoencoder=autoencoder, denoiser=denoiser, needs=(), takes=takes
    )
    self.system = types.SimpleNamespace(name="stub")
    self.asked = []

  def generate(self, prompts, **asked):
    return np.concatenate(list(self.stream(prompts, **asked)))

  def stream(self, prompts, batch_size=None, **asked):
    self.asked.append(asked)
    size = [asked[name] for name in ("num_frames", "height", "width")]
    for i in range(0, len(prompts), batch_size or len(prompts)):
      rows = slice(i, i + (batch_size or len(prompts)))
      number = len(prompts[rows])
      video = np.full((number, *size, 3), -1, np.float32)
      video += np.reshape(asked["seed"][rows], (-1, 1, 1, 1, 1)) % 97 / 100
      if "frames" in asked:
        mask = np.asarray(asked["frame_mask"][rows])
        mask = mask.reshape(*mask.shape, *[1] * (5 - mask.ndim))
        video = np.where(mask, asked["frames"][rows], video)
      yield video


def _clip(frames, size=(H, W), value=None):
  rng = np.random.default_rng(0)
  clip = rng.integers(0, 256, (frames, *size, 3), np.uint8)
  return clip if value is None else np.full_like(clip, value)


def _write(path, frames, fps=FPS, **options):
  formats.write(path, _clip(frames, **options), fps)
  return str(path)


def _image(path, value):
  formats.write_image(path, np.full((H, W, 3), value, np.uint8))
  return str(path)


def _made(files, pipe=None, number=2, batch_size=None):
  pipe = pipe or Pipe()
  plan = given_files.plan(files, pipe, SIZE, FPS)
  said = [f"prompt {i}" for i in range(number)]
  seeds = list(range(3, 3 + number))
  videos = plan.stream(said, seeds, batch_size, "dull", steps=2)
  return plan, np.concatenate(list(videos)), pipe.asked


def _level(value):
  return value / 127.5 - 1


def test_nothing_given_is_a_plain_clip():
  plan, video, asked = _made(given_files.Files())
  assert plan.size == SIZE and video.shape == (2, *SIZE, 3)
  assert "frames" not in asked[0]
  assert asked[0]["negative_prompts"] == ["dull"] * 2 and asked[0]["steps"] == 2


def test_key_frames_lie_at_their_times(tmp_path):
  at = {0: 10, 3: 60, 8: 200}
  texts = tuple(
    f"{_image(tmp_path / f'{i}.png', v)}@{i / FPS}" for i, v in at.items()
  )
  _, video, asked = _made(given_files.Files(keyframes=texts))
  for i, value in at.items():
    np.testing.assert_allclose(video[:, i], _level(value), atol=1e-6)
  mask = asked[0]["frame_mask"][0]
  assert mask.nonzero()[0].tolist() == list(at)


def test_a_clip_goes_on_and_begins_earlier(tmp_path):
  path = _write(tmp_path / "clip.mp4", 7, value=128)
  files = given_files.Files(video=path, extend=1.5, extend_back=0.5)
  _, video, asked = _made(files)
  assert video.shape[1] == 4 + 7 + 12
  np.testing.assert_allclose(video[:, 4:11], _level(128), atol=0.05)
  assert np.abs(video[:, :4] - _level(128)).min() > 0.2
  assert np.abs(video[:, 11:] - _level(128)).min() > 0.2
  for one in asked:
    assert one["num_frames"] == F and one["frame_mask"][0].sum() == 5


@pytest.mark.parametrize("batch_size", [None, 1])
def test_a_loop_begins_with_its_image_or_one_of_its_own(tmp_path, batch_size):
  path = _image(tmp_path / "first.png", 90)
  _, video, asked = _made(
    given_files.Files(images=(path,), loop=True), batch_size=batch_size
  )
  assert video.shape[1] == 8
  np.testing.assert_allclose(video[:, 0], _level(90), atol=1e-6)
  assert asked[0]["frame_mask"][0].nonzero()[0].tolist() == [0, 8]
  _, video, asked = _made(given_files.Files(loop=True), batch_size=batch_size)
  assert asked[0]["num_frames"] == 1 and asked[1]["num_frames"] == 9
  np.testing.assert_allclose(video[:, 0, 0, 0, 0], [-0.97, -0.96], atol=1e-5)


def test_clips_are_joined(tmp_path):
  paths = (
    _write(tmp_path / "a.mp4", 12, value=30),
    _write(tmp_path / "b.mp4", 10, value=220),
  )
  _, video, asked = _made(given_files.Files(join=paths, between=0.5))
  assert video.shape[1] == 12 + 4 + 10
  np.testing.assert_allclose(video[:, :12], _level(30), atol=0.05)
  np.testing.assert_allclose(video[:, 16:], _level(220), atol=0.05)
  assert asked[0]["num_frames"] == 9
  with pytest.raises(ValueError, match="between must leave"):
    _made(given_files.Files(join=paths, between=1.0))


def test_a_clip_is_made_anew_by_strength(tmp_path):
  path = _write(tmp_path / "clip.mp4", 12)
  _, _, asked = _made(given_files.Files(video=path, strength=0.4))
  assert asked[0]["strength"] == 0.4 and not asked[0]["frame_mask"].any()


def test_more_is_made_around_a_clip(tmp_path):
  path = _write(tmp_path / "clip.mp4", 9, size=(8, 16), value=128)
  files = given_files.Files(video=path, expand=(4, 8, 4, 0))
  plan, video, _ = _made(files)
  assert plan.size == SIZE
  np.testing.assert_allclose(video[:, :, 8:, 4:-4], _level(128), atol=0.05)
  files = given_files.Files(video=path, reframe=(24, 16))
  plan, video, asked = _made(files)
  assert plan.size == (9, 24, 16)
  assert asked[0]["frame_mask"][0, 0].any(1).nonzero()[0].tolist() == [
    *range(8, 16)
  ]


def test_cameras_and_boxes_are_numbers():
  assert given_files.numbers(None, None) == {}
  found = given_files.numbers("left", "2,8,16,22:12,-3")
  assert [found[name] for name in CAMERA] == [-0.5, 0, 0]
  assert [found[name] for name in BOX] == [2, 8, 16, 22, 12, -3]
  assert given_files.numbers("0.25,0,1.5", None)["zoom"] == 1.5
  for camera in ("sideways", "1,2", "1,2,nan"):
    with pytest.raises(ValueError, match="camera must be one of"):
      given_files.numbers(camera, None)
  for motion in ("1,2,3,4", "1,2,3:4,5", "a,2,3,4:5,6"):
    with pytest.raises(ValueError, match="motion must be LEFT"):
      given_files.numbers(None, motion)


@pytest.mark.parametrize(
  "fields, match",
  [
    (dict(video="a.mp4"), "video must be given with one of"),
    (dict(video="a.mp4", extend=1.0, strength=0.5), "extend', 'strength"),
    (dict(extend=1.0), "extend needs a clip"),
    (
      dict(images=("a.png",), keyframes=("b.png@1",)),
      "image, keyframe must be",
    ),
    (dict(loop=True, keyframes=("b.png@1",)), "loop must be alone"),
    (dict(join=("a.mp4",)), "two clips, got 1"),
    (dict(video="a.mp4", expand=(1, 2)), "expand must be 4"),
    (dict(video="a.mp4", extend=-1.0), "extend must be 0 to"),
    (dict(keyframes=("b.png",)), "FILE@SECONDS"),
  ],
)
def test_what_does_not_go_together_is_refused(fields, match):
  with pytest.raises(ValueError, match=match):
    files = given_files.Files(**fields)
    given_files.plan(files, Pipe(), SIZE, FPS)


def test_files_and_times_that_cannot_be_are_refused(tmp_path):
  short = _write(tmp_path / "short.mp4", 5)
  image = _image(tmp_path / "image.png", 9)
  broken = tmp_path / "broken.mp4"
  broken.write_bytes(b"no clip")
  for files, match in (
    (given_files.Files(video=short, strength=0.5), "5 frames at 8 a second"),
    (given_files.Files(video=str(broken), extend=1.0), "cannot be read as a"),
    (given_files.Files(video="none.mp4", extend=1.0), "missing file"),
    (given_files.Files(keyframes=(f"{image}@1.2",)), "0 to 8"),
    (
      given_files.Files(keyframes=(f"{image}@0", f"{image}@0.01")),
      "frame 0, as",
    ),
    (given_files.Files(video=short, expand=(0, 16, 0, 0)), "leave room"),
  ):
    with pytest.raises(ValueError, match=match):
      given_files.plan(files, Pipe(), SIZE, FPS)


def test_a_model_that_was_not_trained_for_it_is_named():
  with pytest.raises(ValueError, match="this stub was not trained"):
    given_files.plan(given_files.Files(loop=True), Pipe(takes=0), SIZE, FPS)
