"""The command-line tool on the packaged model, as a new user runs it."""

import json
import types

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from vdit_jax import given_files, pipeline, sample
from vdit_jax.data import digits
from vdit_jax.media import formats

PROMPTS = ("a red seven moving left", "a green three moving down")


@pytest.fixture(scope="module", autouse=True)
def parsed_flags():
  """Let `sample` read its flags, as after a command line."""
  flags.FLAGS.mark_as_parsed()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, parsed_flags):
  """What one call with two prompts writes."""
  folder = tmp_path_factory.mktemp("videos")
  with flagsaver.as_parsed(
    prompt=list(PROMPTS), out=str(folder / "clip.mp4"), steps="12", seed="3"
  ):
    sample.main(["sample.py"])
  return folder


def test_writes_a_video_a_prompt_and_a_contact_sheet(folder):
  names = sorted(path.name for path in folder.iterdir())
  videos = ["clip_000.mp4", "clip_001.mp4"]
  assert names == ["clip.json", *videos, "clip_sheet.png"]
  record = json.loads((folder / "clip.json").read_text())
  assert record["videos"] == [
    {"file": file, "prompt": prompt, "seed": 3 + i}
    for i, (file, prompt) in enumerate(zip(videos, PROMPTS, strict=True))
  ]
  assert record["settings"]["steps"] == 12
  video, fps = formats.read(folder / "clip_000.mp4")
  assert video.shape == (9, 256, 256, 3) and fps == pytest.approx(8)


@pytest.mark.parametrize("index", range(len(PROMPTS)))
def test_colour_and_motion_are_as_the_prompt_says(folder, index):
  (digit,) = digits.parse(PROMPTS[index])
  video, _ = formats.read(folder / f"clip_{index:03d}.mp4")
  ink = video.astype(float).max(-1)  # [F, H, W]
  mean = np.average(video.reshape(-1, 3), axis=0, weights=ink.ravel() ** 2)
  palette = np.array(list(digits.COLOURS.values()))
  nearest = np.argmin(np.linalg.norm(palette - mean / mean.max(), axis=-1))
  assert list(digits.COLOURS)[nearest] == digit.colour
  rows, columns = np.mgrid[: ink.shape[1], : ink.shape[2]]
  mass = ink.sum((1, 2))
  path = np.stack([(ink * x).sum((1, 2)) / mass for x in (columns, rows)], -1)
  way = path[-1] - path[0]
  moving = {k: v for k, v in digits.DIRECTIONS.items() if k != digits.STILL}
  assert max(moving, key=lambda k: np.dot(way, moving[k])) == digit.direction


def test_the_packaged_model_is_small():
  size = sum(file.stat().length for file in pipeline.RELEASE.iterdir())
  assert size <= 8_000_000


@pytest.mark.parametrize(
  ("changed", "message"),
  [
    ({}, "no prompt"),
    ({"prompt": ["x"], "out": "a.avi"}, "suffix"),
    ({"prompt": ["x"], "num_videos": "0"}, "at least 1"),
    ({"prompt": ["x"], "batch_size": "0"}, "batch_size must be at least 1"),
    ({"prompt": ["x"], "image": "nowhere.png"}, "is not a file"),
    ({"prompt": ["x"], "checkpoint": "org/model"}, "hf download org/model"),
    ({"prompt": ["x"], "checkpoint": "nowhere"}, "does not exist"),
    ({"prompt": ["a red seven"], "height": "31"}, "multiple of 4, got 31"),
  ],
)
def test_refuses(tmp_path, changed, message):
  if "out" in changed:
    changed = changed | {"out": str(tmp_path / changed["out"])}
  defaults = {"prompt": [], "out": str(tmp_path / "clip.mp4")}
  with flagsaver.as_parsed(**(defaults | changed)):
    with pytest.raises(ValueError, match=message):
      sample.main(["sample.py"])
  assert not list(tmp_path.glob("*.*"))


@pytest.mark.parametrize(
  "needs, count, at",
  [
    ((), 1, [0]),
    ((), 2, [0, 4]),
    ((0,), 1, [0]),
    ((0, -1), 2, [0, 4]),
    ((1, 2, -1), 3, [1, 2, 4]),
    ((0,), 2, None),
    ((0, -1), 1, None),
    ((), 3, None),
  ],
)
def test_images_are_the_frames_that_the_model_is_given(
  needs, count, at, tmp_path
):
  paths = []
  for i in range(count):
    paths.append(tmp_path / f"{i}.png")
    formats.write_image(paths[-1], np.full((8, 8, 3), 50 * i, np.uint8))
  modules = types.SimpleNamespace(needs=needs)
  seen = lambda prompts, **asked: asked
  pipe = types.SimpleNamespace(modules=modules, stream=seen)
  plan = lambda paths: given_files.plan(
    given_files.Files(images=tuple(paths)), pipe, (5, 8, 8), 8.0
  )
  if at is None:
    with pytest.raises(ValueError, match=f"image must be .* got {count} im"):
      plan(paths)
    return
  found = plan(paths).stream(["a", "b"], [0, 1], 2, None)
  assert found["frames"].shape == (2, 5, 8, 8, 3)
  np.testing.assert_array_equal(found["frame_mask"][1].nonzero()[0], at)
  want = np.arange(count) * 50 / 127.5 - 1
  np.testing.assert_allclose(found["frames"][1, at, 0, 0, 0], want, atol=1e-6)
  assert "frames" not in plan([]).stream(["a", "b"], [0, 1], 2, None)


def test_an_empty_line_in_a_prompts_file_is_named(tmp_path):
  path = tmp_path / "prompts.txt"
  path.write_text("a red seven\n\na blue two\n")
  with pytest.raises(ValueError, match="prompts.txt:2 is empty"):
    sample.read_prompts([], str(path))


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path):
  (tmp_path / "file").write_text("")
  out = str(tmp_path / "file" / "clip.mp4")
  with flagsaver.as_parsed(prompt=["a red seven"], out=out):
    with pytest.raises(ValueError, match="cannot be written"):
      sample.main(["sample.py"])


def _run(out, **changed):
  """Sample two prompts twice in one step, each video by itself."""
  given = {"prompt": list(PROMPTS), "num_videos": "2", "steps": "1"}
  given |= {"batch_size": "1", "seed": "7", "out": str(out)} | changed
  with flagsaver.as_parsed(**given):
    sample.main(["sample.py"])


def _files(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, parsed_flags):
  """The files of a run of four videos."""
  folder = tmp_path_factory.mktemp("unbroken")
  _run(folder / "clip.npy")
  return _files(folder)


@pytest.mark.parametrize("written", [0, 1, 3])
def test_a_broken_off_run_goes_on(unbroken, tmp_path, monkeypatch, written):
  """After the last whole video, and to the same files."""
  write, done = formats.write, []

  def killed(path, *args, **kwargs):
    if len(done) == written:
      raise KeyboardInterrupt
    done.append(path.name)
    write(path, *args, **kwargs)

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr(formats, "write", killed)
    _run(tmp_path / "clip.npy")
  names = [f"clip_{i:03d}.npy" for i in range(4)]
  assert sorted(_files(tmp_path)) == ["clip.json", *names[:written]]
  made = []
  with monkeypatch.context() as patch:
    patch.setattr(
      formats, "write", lambda *a, **k: (made.append(a[0].name), write(*a, **k))
    )
    _run(tmp_path / "clip.npy")
  assert made == names[written:] and _files(tmp_path) == unbroken


def test_any_video_is_made_alone_by_its_seed(unbroken, tmp_path):
  (tmp_path / "three.npy").write_bytes(unbroken["clip_003.npy"])
  for i, batch_size in ((1, "1"), (3, "8")):
    name = f"{i}.npy"
    _run(
      tmp_path / name,
      prompt=[PROMPTS[i // 2]],
      num_videos="1",
      seed=f"{7 + i}",
      batch_size=batch_size,
    )
    assert (tmp_path / name).read_bytes() == unbroken[f"clip_{i:03d}.npy"]


def test_a_whole_run_is_not_made_again(unbroken, tmp_path, monkeypatch):
  for name, data in unbroken.items():
    (tmp_path / name).write_bytes(data)
  monkeypatch.setattr(pipeline.Pipeline, "stream", None)
  _run(tmp_path / "clip.npy")
  assert _files(tmp_path) == unbroken


@pytest.mark.parametrize(
  "changed, differs",
  [
    ({"steps": "2"}, "clip_000.npy: its steps is 1, not 2"),
    ({"seed": "8"}, "clip_000.npy: it is of prompt .* and seed 7"),
    ({"prompt": ["a blue two"] * 2}, "clip_000.npy: it is of prompt 'a red se"),
    ({"prompt": PROMPTS[:1]}, "clip_002.npy: it is of prompt"),
    ({"negative_prompt": "a two"}, "its negative_prompt is None, not 'a two'"),
    ({"fps": "4"}, "its fps is 8.0, not 4.0"),
  ],
)
def test_videos_of_other_settings_are_not_taken(
  unbroken, tmp_path, changed, differs
):
  for name, data in unbroken.items():
    (tmp_path / name).write_bytes(data)
  with pytest.raises(ValueError, match=f"^out has .*{differs}.*--overwrite"):
    _run(tmp_path / "clip.npy", **changed)
  assert _files(tmp_path) == unbroken


def test_more_prompts_are_added_to_what_is_there(unbroken, tmp_path):
  for name, data in unbroken.items():
    (tmp_path / name).write_bytes(data)
  _run(tmp_path / "clip.npy", prompt=[*PROMPTS, "a blue two"])
  files = _files(tmp_path)
  assert len(json.loads(files["clip.json"])["videos"]) == 6
  same = [name for name in unbroken if files[name] == unbroken[name]]
  assert sorted(same) == [f"clip_{i:03d}.npy" for i in range(4)]


def test_others_are_overwritten_if_asked(unbroken, tmp_path):
  for name in ("clip_000.npy", "clip_005.npy"):
    (tmp_path / name).write_bytes(b"another's")
  with pytest.raises(ValueError, match="clip_000.npy: clip.json does not tell"):
    _run(tmp_path / "clip.npy")
  _run(tmp_path / "clip.npy", overwrite="true")
  files = _files(tmp_path)
  assert files.pop("clip_005.npy") == b"another's" and files == unbroken


def test_prompts_are_escaped_in_logs(tmp_path, caplog):
  prompt = "a red seven\x1b[2J\u202e\nmoving left"
  _run(tmp_path / "clip.npy", prompt=[prompt], num_videos="1")
  (said,) = (
    r.getMessage() for r in caplog.records if "seed 7" in r.getMessage()
  )
  assert "seven\\x1b[2J\\u202e\\nmoving" in said and said.isprintable()


def test_the_empty_prompt_is_taken(tmp_path):
  _run(tmp_path / "clip.npy", prompt=[""], num_videos="1")
  assert np.isfinite(np.load(tmp_path / "clip.npy")).all()
