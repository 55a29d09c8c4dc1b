"""The videos of one command: of what each is made, and which are there.

  prompts, seed --clips--> Clip: file, prompt, seed
  settings --find--> which are still to be made; or a refusal

Beside CLIP_000.mp4, CLIP_001.mp4, ... lies CLIP.json, the record: the settings
that all were made with, and the prompt and seed of each. A video appears whole
or not at all, so one that the record names and that is there is done. One that
it does not name, or of other settings, is neither taken for it nor replaced,
unless that is asked for. A video that is alone has no record and is replaced.
"""

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from vdit_jax import schema, strict_json, writing
from vdit_jax.media import formats, sheets

_MOST_VIDEOS = 10**6  # of a prompt
_COLUMNS = 9  # frames of a video on the contact sheet
_MOST_PIXELS = 2**26  # of the contact sheet
_RECORD = {
  "settings": schema.Field(dict),
  "videos": schema.Field(list, each=schema.Field(dict)),
}
_VIDEO = {
  "file": schema.Field(str),
  "prompt": schema.Field(str),
  "seed": schema.Field(int),
}


@dataclasses.dataclass(frozen=True)
class Clip:
  """A video of the command.

  Attributes:
    file: its name.
    prompt: that it is made of.
    seed: of its noise; with it alone the same video is made.
  """

  file: str
  prompt: str
  seed: int


def clips(
  out: epath.PathLike, prompts: Sequence[str], num_videos: int, seed: int
) -> list[Clip]:
  """Name the videos: of each prompt several, one after another.

  Args:
    out: file to write; of several videos, what their names are made of.
    prompts: texts.
    num_videos: of a prompt.
    seed: of the first video; each next one has the next.
  """
  if not 1 <= num_videos <= _MOST_VIDEOS:
    raise ValueError(
      f"num_videos must be at least 1 and at most {_MOST_VIDEOS}, got "
      f"{num_videos}"
    )
  out = epath.Path(out)
  said = [prompt for prompt in prompts for _ in range(num_videos)]
  names = [f"{out.stem}_{i:03d}{out.suffix}" for i in range(len(said))]
  names = names if len(said) > 1 else [out.name]
  return [
    Clip(name, prompt, seed + i)
    for i, (name, prompt) in enumerate(zip(names, said, strict=True))
  ]


def find(
  out: epath.PathLike,
  clips: Sequence[Clip],
  settings: Mapping[str, Any],
  overwrite: bool = False,
) -> list[Clip]:
  """Tell which videos are still to be made; nothing is written.

  Args:
    out: as of `clips`.
    clips: all videos.
    settings: that they are made with, JSON.
    overwrite: whether those of other settings are replaced.

  Raises:
    ValueError: if others are there: says what differs.
  """
  if len(clips) == 1:
    return list(clips)
  path = record_path(out)
  found = _read(path)
  if overwrite:
    return list(clips)
  there = {c.file for c in clips if (path.parent / c.file).exists()}
  if found is None:
    known, wrong = set(), {}
  else:
    difference = _difference(found["settings"], _plain(settings))
    known = {video["file"] for video in found["videos"]}
    there |= {name for name in known if (path.parent / name).exists()}
    asked = {clip.file: dataclasses.asdict(clip) for clip in clips}
    wrong = {
      video["file"]: difference or _of_video(video)
      for video in found["videos"]
      if difference or video != asked.get(video["file"])
    }
  wrong |= dict.fromkeys(there - known, f"{path.name} does not tell of it")
  if others := sorted(there & set(wrong)):
    raise ValueError(
      f"out has {path.parent / others[0]}: {wrong[others[0]]}; give another "
      "--out, or --overwrite"
    )
  return [clip for clip in clips if clip.file not in there]


def begin(
  out: epath.PathLike,
  clips: Sequence[Clip],
  settings: Mapping[str, Any],
  left: Sequence[Clip],
) -> None:
  """Write the record; first remove videos of another, if all are to be made.

  Args:
    out, clips, settings: as of `find`.
    left: what that gave.
  """
  if len(clips) == 1:
    return
  path = record_path(out)
  if len(left) == len(clips):
    found = _read(path) or {"videos": []}
    names = {video["file"] for video in found["videos"]}
    for name in (
      *sorted(names | {c.file for c in clips}),
      sheet_path(out).name,
    ):
      (path.parent / name).unlink(missing_ok=True)
  videos = [dataclasses.asdict(clip) for clip in clips]
  record = {"settings": _plain(settings), "videos": videos}
  if record != _read(path):
    writing.write(path, strict_json.dumps(record, indent=1))


def draw_sheet(
  out: epath.PathLike, clips: Sequence[Clip], enlarged: int
) -> None:
  """Draw a contact sheet of the videos as they were written.

  Of many large ones it has the first.

  Args:
    out, clips: as of `find`.
    enlarged: factor of the videos' enlargement.
  """
  path = sheet_path(out)
  # What is written as one picture, or as numbers, is shown as it is.
  step = enlarged if epath.Path(out).suffix in (".mp4", ".gif") else 1
  factor = max(1, enlarged // 3) if epath.Path(out).suffix != ".png" else 1
  shown, pixels = [], 0
  for clip in clips:
    frames, _ = formats.read(path.parent / clip.file)
    frames = frames[sheets.spaced(len(frames), _COLUMNS), ::step, ::step]
    pixels += frames[..., 0].size * factor**2
    if shown and pixels > _MOST_PIXELS:
      break
    shown.append(frames)
  prompts = [clip.prompt for clip in clips[: len(shown)]]
  image = sheets.draw(np.stack(shown), prompts, factor=factor)
  formats.write_image(path, image)
  logging.info("contact sheet of %d videos: %s", len(shown), path)


def record_path(out: epath.PathLike) -> epath.Path:
  """Name the record of the videos of a path."""
  return writing.absolute(out).with_suffix(".json")


def sheet_path(out: epath.PathLike) -> epath.Path:
  """Name the contact sheet of the videos of a path."""
  out = writing.absolute(out)
  return out.with_name(f"{out.stem}_sheet.png")


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
  """Give settings as JSON has them."""
  return json.loads(strict_json.dumps(dict(settings)))


def _read(path: epath.Path) -> dict[str, Any] | None:
  """Read a record; None if there is none; refuse a file that is another."""
  if not path.exists():
    return None
  try:
    found = json.loads(path.read_text())
    schema.check(f"{path}", found, _RECORD)
    for video in found["videos"]:
      schema.check(f"{path}", video, _VIDEO)
      name = video["file"]
      if name != os.path.basename(name) or not name.startswith(f"{path.stem}_"):
        raise ValueError("a file that is none of its videos")
    _ = found["settings"]
  except (ValueError, TypeError, LookupError, RecursionError) as error:
    raise ValueError(
      f"out has {path}, which is no record of videos; give another --out"
    ) from error
  return found


def _difference(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
  """Say in what settings differ; "" if in nothing."""
  for name in sorted({*old, *new}):
    before, now = old.get(name), new.get(name)
    if strict_json.dumps(before) != strict_json.dumps(now):
      said = f"{schema.quote(before)}, not {schema.quote(now)}"
      return f"its {name} is {said}"
  return ""


def _of_video(video: Mapping[str, Any]) -> str:
  said = schema.quote(video["prompt"])
  return f"it is of prompt {said} and seed {video['seed']}, which is not asked"
