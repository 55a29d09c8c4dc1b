"""Sample videos from prompts.

  python sample.py --prompt="a red seven moving left" --out=seven.mp4

uses the small model that the package carries; --checkpoint=WORKDIR takes one
trained here, --checkpoint=DIR a released pipeline in diffusers' layout, of
which one network is in memory at a time. --image=FILE is the first frame, for
an image-to-video model. --lora=FILE:0.8 adds low-rank adapters to a released
pipeline, their product 0.8 times; it may be repeated. The suffix of --out is
the format: .mp4, .gif, .png (a contact sheet) or .npy. Several videos are
numbered, and a contact sheet of all of them is written beside them.
"""

import time

import numpy as np
from absl import flags, logging
from etils import epath

from vdit_jax import conditioning, pipeline, tool
from vdit_jax.data import prompt_files
from vdit_jax.diffusion import guidance
from vdit_jax.media import formats, sheets

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
_IMAGE = flags.DEFINE_string("image", None, "First frame of every video.")
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
_PARAM_DTYPE = flags.DEFINE_string(
  "param_dtype", None, "Of the weights; default: as stored."
)
_DTYPE = flags.DEFINE_string(
  "dtype", None, "Of computations; default: as trained or stored."
)
_OUT = flags.DEFINE_string("out", None, "File to write.", required=True)
_NUM_VIDEOS = flags.DEFINE_integer("num_videos", 1, "Videos a prompt.")
_BATCH = flags.DEFINE_integer(
  "batch_size",
  None,
  "Videos sampled at once; default: 8, of a released pipeline 1.",
)
_SEED = flags.DEFINE_integer("seed", 0, "Of the initial noise.")
_ENLARGE = flags.DEFINE_integer(
  "enlarge", None, "Factor of nearest-neighbour enlargement; default: to 256."
)
_FPS = flags.DEFINE_float("fps", None, "Frames a second; default: trained.")
_SIZES = {
  name: flags.DEFINE_integer(name, None, "Default: as trained.")
  for name in ("num_frames", "height", "width")
}
_NUMBERS = flags.DEFINE_multi_string(
  "number",
  [],
  "NAME=VALUE, what to tell a denoiser that was told numbers in training, such "
  "as motion_score=5; may be repeated.",
)
_STEPS = flags.DEFINE_integer("steps", None, "Default: as recommended.")
_GUIDANCE = flags.DEFINE_float("guidance", None, "Scale; 1 is none.")
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
  "sampler", None, "euler, heun, ddim, dpmpp_2m, dpmpp_2m_sde."
)


def main(argv: list[str]) -> None:
  """Check everything, load, generate, write."""
  tool.no_arguments(argv)
  logging.set_verbosity(logging.INFO)
  prompts = read_prompts(_PROMPT.value, _PROMPTS_FILE.value)
  prompts = [p for p in prompts for _ in range(_NUM_VIDEOS.value)]
  formats.check_writable(_OUT.value, "out")
  if _IMAGE.value is not None:
    formats.read_still(_IMAGE.value)
  if _NUM_VIDEOS.value < 1:
    raise ValueError("num_videos must be at least 1")
  pipe = pipeline.load(
    _CHECKPOINT.value or pipeline.RELEASE,
    param_dtype=_PARAM_DTYPE.value,
    dtype=_DTYPE.value,
    adapters=_LORA.value or None,
    tiled=_TILED.value,
  )
  sizes = {name: flag.value for name, flag in _SIZES.items()}
  batch_size = _BATCH.value
  if batch_size is None:
    batch_size = 1 if pipe.sequential else 8
  negative, start = _NEGATIVE.value, time.perf_counter()
  videos = pipe.generate(
    prompts,
    negative_prompts=None if negative is None else [negative] * len(prompts),
    steps=_STEPS.value,
    guidance=_GUIDANCE.value,
    guidance_kind="dynamic" if _DYNAMIC.value else _KIND.value,
    sampler=_SAMPLER.value,
    seed=_SEED.value,
    batch_size=batch_size,
    numbers=read_numbers(_NUMBERS.value),
    **sizes,
    **given(_IMAGE.value, len(prompts), pipe.size(**sizes)),
  )
  seconds = time.perf_counter() - start
  logging.info("%d videos, %.1f s", len(videos), seconds)
  write(videos, prompts, epath.Path(_OUT.value), _FPS.value or pipe.recipe.fps)


def given(
  path: str | None, number: int, size: tuple[int, int, int]
) -> dict[str, np.ndarray]:
  """Let an image be the first frame of a number of videos of a size."""
  if path is None:
    return {}
  image = formats.read_image(path, *size[1:])
  images = np.broadcast_to(image, (number, *image.shape))
  video, mask = conditioning.first(images, size[0])
  return {"frames": video, "frame_mask": mask}


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


def write(
  videos: np.ndarray, prompts: list[str], out: epath.Path, fps: float
) -> None:
  """Write one file for each video and, of several, one contact sheet."""
  enlarge = _ENLARGE.value or max(1, 256 // min(videos[0].shape[1:3]))
  for i, video in enumerate(videos):
    name = f"{out.stem}_{i:03d}{out.suffix}" if len(videos) > 1 else out.name
    formats.write(out.parent / name, video, fps, enlarge=enlarge)
    logging.info("%s: %s", out.parent / name, prompts[i])
  if len(videos) > 1:
    sheet = sheets.draw(videos, prompts, columns=9, factor=max(1, enlarge // 3))
    formats.write_image(out.parent / f"{out.stem}_sheet.png", sheet)
    logging.info("contact sheet: %s", out.parent / f"{out.stem}_sheet.png")


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
