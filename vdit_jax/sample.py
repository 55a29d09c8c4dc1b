"""Sample videos from prompts.

  python sample.py --prompt="a red seven moving left" --out=seven.mp4

uses the small model that the package carries; --checkpoint=WORKDIR takes one
trained here, --checkpoint=DIR a released pipeline in diffusers' layout, of
which one network is in memory at a time. --image=FILE is the first frame, for
an image-to-video model; given twice, the first and the last. --lora=FILE:0.8
adds low-rank adapters to a released pipeline, their product 0.8 times; it may
be repeated. The suffix of --out is the format: .mp4, .gif, .png (a contact
sheet) or .npy.

Several videos are numbered, and written when they are made. Beside them lies
OUT.json, which has the settings, and the prompt and seed of each, and at the
end a contact sheet. The same command again goes on after the last video that is
there. Each has a seed of its own, --seed and the ones after it: with its prompt
and its seed any of them is made alone, bit for bit in batches of the same size
(--batch_size=1), else but for the rounding of another program.
"""

import dataclasses
import hashlib
import os
from collections.abc import Iterator
from typing import Any

import numpy as np
from absl import flags, logging
from etils import epath

from vdit_jax import batches as batching
from vdit_jax import given_files, pipeline, tool, writing
from vdit_jax.data import prompt_files
from vdit_jax.diffusion import guidance
from vdit_jax.media import formats, reels
from vdit_jax.text import escapes
from vdit_jax.weights import adapters

_MOST = 2**16  # of what is counted: more is a slip of the finger

_PROMPT = flags.DEFINE_multi_string("prompt", [], "Prompt; may be repeated.")
_PROMPTS_FILE = flags.DEFINE_string(
  "prompts_file", None, "One prompt a line, or VBench's JSON."
)
_NEGATIVE = flags.DEFINE_string(
  "negative_prompt",
  None,
  "What to lead away from; default: the recipe's, or the learned null.",
)
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint",
  None,
  "Workdir, release or released pipeline; default: the packaged model.",
)
_IMAGE = flags.DEFINE_multi_string(
  "image",
  [],
  "First frame of every video; given twice, its first and its last, and so on "
  "as the model is given frames.",
)
_KEYFRAME = flags.DEFINE_multi_string(
  "keyframe", [], "FILE@SECONDS, a frame at its time; may be repeated."
)
_VIDEO = flags.DEFINE_string(
  "video", None, "A clip to go on with, to change, or to make more around."
)
_SECONDS = {
  "extend": flags.DEFINE_float("extend", 0.0, "Seconds behind --video."),
  "extend_back": flags.DEFINE_float(
    "extend_back", 0.0, "Seconds before --video."
  ),
  "between": flags.DEFINE_float("between", 1.0, "Seconds between --join's."),
}
_JOIN = flags.DEFINE_list("join", [], "Two clips, A.mp4,B.mp4, to join.")
_LOOP = flags.DEFINE_bool(
  "loop", False, "Let the first frame, perhaps --image, follow the last."
)
_STRENGTH = flags.DEFINE_float(
  "strength", None, "How much of --video is made anew, up to 1.", 0, 1
)
_EXPAND = flags.DEFINE_list(
  "expand", [], "LEFT,TOP,RIGHT,BOTTOM pixels of the video around --video."
)
_REFRAME = flags.DEFINE_string(
  "reframe", None, "HEIGHTxWIDTH in whose middle --video lies."
)
_CAMERA = flags.DEFINE_string(
  "camera",
  None,
  "still, left, right, up, down, in, out, or X,Y,ZOOM in pixels and percent a "
  "frame; for a model that was told of cameras.",
)
_MOTION = flags.DEFINE_string(
  "motion",
  None,
  "LEFT,TOP,RIGHT,BOTTOM:DX,DY in pixels: what is in the box goes that way.",
)
_LORA = flags.DEFINE_multi_string(
  "lora",
  [],
  "Adapters for a released pipeline: FILE, FILE:SCALE or FILE:SCALE:NETWORK, "
  "where FILE may be its folder and NETWORK is one of the pipeline's folders; "
  "may be repeated, or be several with commas between.",
)
_TILED = flags.DEFINE_bool(
  "tiled", False, "Decode in overlapping tiles: less memory, other numbers."
)
_ONE_EXPERT = flags.DEFINE_bool(
  "one_expert_in_memory",
  False,
  "Of a released pipeline's several denoisers, read each when its steps begin: "
  "less memory, the same numbers.",
)
_PARAM_DTYPE = flags.DEFINE_string(
  "param_dtype", None, "Of the weights; default: as stored."
)
_DTYPE = flags.DEFINE_string(
  "dtype", None, "Of computations; default: as trained or stored."
)
_OUT = flags.DEFINE_string("out", None, "File to write.", required=True)
_OVERWRITE = flags.DEFINE_bool(
  "overwrite", False, "Replace the videos that are there, of any settings."
)
_NUM_VIDEOS = flags.DEFINE_integer("num_videos", 1, "Videos a prompt.")
_BATCH = flags.DEFINE_integer(
  "batch_size",
  None,
  "Videos sampled at once; default: 8, of a released pipeline 1.",
  upper_bound=_MOST,
)
_SEED = flags.DEFINE_integer(
  "seed", 0, "Of the first video's noise; each next one has the next."
)
_ENLARGE = flags.DEFINE_integer(
  "enlarge",
  None,
  "Factor of nearest-neighbour enlargement; default: to 256.",
  lower_bound=1,
)
_FPS = flags.DEFINE_float("fps", None, "Frames a second; default: trained.")
_SIZES = {
  name: flags.DEFINE_integer(
    name, None, "Default: as trained.", upper_bound=_MOST
  )
  for name in ("num_frames", "height", "width")
}
_NUMBERS = flags.DEFINE_multi_string(
  "number",
  [],
  "NAME=VALUE, what to tell a denoiser that was told numbers in training, such "
  "as motion_score=5; may be repeated.",
)
_STEPS = flags.DEFINE_integer(
  "steps", None, "Default: as recommended.", upper_bound=_MOST
)
_GUIDANCE = flags.DEFINE_multi_float(
  "guidance",
  None,
  "Scale; 1 is none. Of two denoisers, once for both or, from low noise to "
  "high, twice.",
)
_KIND = flags.DEFINE_enum(
  "guidance_kind",
  None,
  guidance.KINDS,
  "How guidance goes with the steps; default: as recommended.",
)
_DYNAMIC = flags.DEFINE_boolean(
  "dynamic_guidance", False, "The same as --guidance_kind=dynamic."
)
_SAMPLER = flags.DEFINE_string(
  "sampler", None, "euler, heun, ddim, dpmpp_2m, dpmpp_2m_sde, unipc."
)


def main(argv: list[str]) -> None:
  """Check everything, load, and write each video when it is made."""
  tool.no_arguments(argv)
  logging.set_verbosity(logging.INFO)
  out = _OUT.value
  prompts = read_prompts(_PROMPT.value, _PROMPTS_FILE.value)
  formats.check_writable(out, "out")
  for path in _IMAGE.value:
    formats.read_still(path)
  files = _given()
  numbers = read_numbers(_NUMBERS.value)
  numbers |= given_files.numbers(_CAMERA.value, _MOTION.value)
  clips = reels.clips(out, prompts, _NUM_VIDEOS.value, _SEED.value)
  pipe = pipeline.load(
    _CHECKPOINT.value or pipeline.RELEASE,
    param_dtype=_PARAM_DTYPE.value,
    dtype=_DTYPE.value,
    adapters=_LORA.value or None,
    tiled=_TILED.value,
    one_expert=_ONE_EXPERT.value,
  )
  fps = _FPS.value or pipe.recipe.fps
  plan = given_files.plan(files, pipe, _size(pipe), fps)
  settings = _settings(pipe, numbers, files, plan.size)
  left = reels.find(out, clips, settings, _OVERWRITE.value)
  wanted = set(left)
  batches = _batches(pipe, clips, wanted)
  if batches:
    again = [clip for batch in batches for clip in batch]
    videos = _stream(plan, again, numbers, len(batches[0]))
    reels.begin(out, clips, settings, left)
    for batch, made in zip(batches, videos, strict=True):
      pairs = zip(batch, made, strict=True)
      _write([(c, v) for c, v in pairs if c in wanted], settings)
  logging.info(
    "%d videos made, %d were there", len(left), len(clips) - len(left)
  )
  sheet = reels.sheet_path(out)
  if len(clips) > 1 and (left or not sheet.exists()):
    reels.draw_sheet(out, clips, settings["enlarge"])


def _scales(given: list[float] | None) -> float | tuple[float, ...] | None:
  """One scale, or one for each denoiser."""
  if given is None:
    return None
  return tuple(given) if len(given) > 1 else given[0]


def read_numbers(pairs: list[str]) -> dict[str, float]:
  """Read NAME=VALUE pairs."""
  numbers = {}
  for pair in pairs:
    name, _, value = pair.partition("=")
    try:
      numbers[name] = float(value)
    except ValueError as error:
      raise ValueError(
        f"number must be NAME=VALUE, got {pair!r}; write motion_score=5"
      ) from error
  return numbers


def read_prompts(given: list[str], path: str | None) -> list[str]:
  """Join the prompts of the flags and of a file, refusing to find none."""
  prompts = list(given)
  if path is not None:
    prompts += [prompt.text for prompt in prompt_files.read(path)]
  if not prompts:
    raise ValueError("no prompt; pass --prompt or --prompts_file")
  return prompts


def _how() -> dict[str, Any]:
  """Say how to sample, as far as flags do."""
  return {
    "steps": _STEPS.value,
    "guidance": _scales(_GUIDANCE.value),
    "guidance_kind": "dynamic" if _DYNAMIC.value else _KIND.value,
    "sampler": _SAMPLER.value,
  }


def _size(pipe: pipeline.Pipeline) -> tuple[int, int, int]:
  return pipe.size(**{name: flag.value for name, flag in _SIZES.items()})


def _given() -> given_files.Files:
  """Read what is given of a clip from the flags."""
  height, _, width = (_REFRAME.value or "").partition("x")
  return given_files.Files(
    images=tuple(_IMAGE.value),
    keyframes=tuple(_KEYFRAME.value),
    video=_VIDEO.value,
    join=tuple(_JOIN.value),
    loop=_LOOP.value,
    strength=_STRENGTH.value,
    expand=_whole("expand", _EXPAND.value),
    reframe=_whole("reframe", [height, width] if _REFRAME.value else []),
    **{name: flag.value for name, flag in _SECONDS.items()},
  )


def _whole(name: str, texts: list[str]) -> tuple[int, ...]:
  """Read whole numbers of pixels."""
  if wrong := [text for text in texts if not text.isdecimal()]:
    raise ValueError(
      f"{name} must be whole numbers of pixels, got {wrong[0]!r}"
    )
  return tuple(map(int, texts))


def _settings(
  pipe: pipeline.Pipeline,
  numbers: dict[str, float],
  given: given_files.Files,
  size: tuple[int, int, int],
) -> dict[str, Any]:
  """Say what else than its prompt and seed decides what a video is."""
  pipe.latent_shape(*size)  # refuses one that does not fit
  files = [_CHECKPOINT.value or pipeline.RELEASE, *given.paths]
  files += [file.path for file in adapters.parse(_LORA.value)]
  return {
    "checkpoint": os.fspath(writing.absolute(files[0])),
    "lora": _LORA.value,
    "given": dataclasses.asdict(given),
    "files": [stamp(path) for path in files if path],
    "param_dtype": _PARAM_DTYPE.value,
    "dtype": _DTYPE.value,
    "tiled": _TILED.value,
    "negative_prompt": _NEGATIVE.value,
    "numbers": numbers,
    "frames, height, width": size,
    **dataclasses.asdict(pipe.settings(**_how())),
    "fps": _FPS.value or pipe.recipe.fps,
    "enlarge": _ENLARGE.value or max(1, 256 // min(size[1:])),
  }


def stamp(path: epath.PathLike) -> str:
  """Give what changes when a file or the files of a folder do.

  Of a workdir it is the newest checkpoint's, which is what is sampled.
  """
  path = writing.absolute(path)
  steps = path / "checkpoints"
  if steps.exists():
    found = [p for p in steps.iterdir() if p.name.isdecimal()]
    path = max(found, key=lambda p: int(p.name), default=path)
  digest = hashlib.sha256()
  for file in sorted(_files(path)):
    state, name = file.stat(), os.fspath(file).removeprefix(os.fspath(path))
    digest.update(f"{name} {state.length} {state.mtime}".encode())
  return digest.hexdigest()[:16]


def _files(path: epath.Path) -> Iterator[epath.Path]:
  if not path.is_dir():
    yield from [path] if path.exists() else []
    return
  for inside in path.iterdir():
    yield from _files(inside)


def _batches(
  pipe: pipeline.Pipeline, clips: list[reels.Clip], left: set[reels.Clip]
) -> list[list[reels.Clip]]:
  """Divide the clips into batches; those remain that have one to be made.

  A batch is made whole, so that in a rerun a video is of the same batch, and
  so of the same program.
  """
  size = _BATCH.value
  if size is None:
    size = 1 if pipe.sequential else 8
  found = [clips[rows] for rows in batching.parts(len(clips), size)]
  return [batch for batch in found if not left.isdisjoint(batch)]


def _stream(
  plan: given_files.Plan,
  clips: list[reels.Clip],
  numbers: dict[str, float],
  batch_size: int,
) -> Iterator[np.ndarray]:
  """Make the videos of clips, batch by batch."""
  return plan.stream(
    [clip.prompt for clip in clips],
    [clip.seed for clip in clips],
    batch_size,
    _NEGATIVE.value,
    numbers=numbers,
    **_how(),
  )


def _write(
  made: list[tuple[reels.Clip, np.ndarray]], settings: dict[str, Any]
) -> None:
  """Write videos."""
  folder = writing.absolute(_OUT.value).parent
  for clip, video in made:
    path, enlarge = folder / clip.file, settings["enlarge"]
    formats.write(path, video, settings["fps"], enlarge=enlarge)
    prompt = escapes.escape(clip.prompt)
    logging.info("%s: %s (seed %d)", path, prompt, clip.seed)


# Flags by what `pipeline` calls them.
FLAGS = {
  "adapters": "--lora",
  "frame_mask": "--image",
  "frames": "--image",
  "negative_prompts": "--negative_prompt",
  "numbers": "--number",
  "path": "--checkpoint",
  "prompts": "--prompt",
}

if __name__ == "__main__":
  tool.run(main, FLAGS)
