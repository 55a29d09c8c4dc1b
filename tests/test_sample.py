"""The command-line tool on the packaged model, as a new user runs it."""

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver

from vdit_jax import pipeline, sample
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
  assert names == ["clip_000.mp4", "clip_001.mp4", "clip_sheet.png"]
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
