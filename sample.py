"""Sample videos from prompts.

  python sample.py --prompt="a red seven moving left" --out=seven.mp4

uses the small model that the package carries; --checkpoint=WORKDIR takes one
trained here. The suffix of --out is the format: .mp4, .gif, .png (a contact
sheet) or .npy. Several videos are numbered, and a contact sheet of all of them
is written beside them.
"""

import time

import numpy as np
from absl import app, flags, logging
from etils import epath

from vdit_jax import media, pipeline, sheets

_PROMPT = flags.DEFINE_multi_string("prompt", [], "Prompt; may be repeated.")
_PROMPTS_FILE = flags.DEFINE_string("prompts_file", None, "One prompt a line.")
_NEGATIVE = flags.DEFINE_string(
  "negative_prompt", None, "What to lead away from; default: the learned null."
)
_CHECKPOINT = flags.DEFINE_string(
  "checkpoint", None, "Workdir or release; default: the packaged model."
)
_OUT = flags.DEFINE_string("out", None, "File to write.", required=True)
_NUM_VIDEOS = flags.DEFINE_integer("num_videos", 1, "Videos a prompt.")
_BATCH = flags.DEFINE_integer("batch_size", 8, "Videos sampled at once.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the initial noise.")
_ENLARGE = flags.DEFINE_integer(
  "enlarge", None, "Factor of nearest-neighbour enlargement; default: to 256."
)
_FPS = flags.DEFINE_float("fps", None, "Frames a second; default: trained.")
_SIZES = {
  name: flags.DEFINE_integer(name, None, "Default: as trained.")
  for name in ("num_frames", "height", "width", "steps")
}
_GUIDANCE = flags.DEFINE_float("guidance", None, "Scale; 1 is none.")
_SAMPLER = flags.DEFINE_string("sampler", None, "euler, heun, ddim, dpmpp_2m.")


def main(argv):
  """Check everything, load, sample in batches, write."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  logging.set_verbosity(logging.INFO)
  prompts = read_prompts(_PROMPT.value, _PROMPTS_FILE.value)
  prompts = [p for p in prompts for _ in range(_NUM_VIDEOS.value)]
  media.check_writable(_OUT.value)
  if min(_NUM_VIDEOS.value, _BATCH.value) < 1:
    raise ValueError("num_videos and batch_size must be at least 1")
  pipe = pipeline.load(_CHECKPOINT.value or pipeline.RELEASE)
  sizes = {name: flag.value for name, flag in _SIZES.items()}
  videos = []
  start = time.perf_counter()
  for i in range(0, len(prompts), _BATCH.value):
    batch = prompts[i : i + _BATCH.value]
    negative = _NEGATIVE.value
    videos.extend(
      pipe.generate(
        batch,
        negative_prompts=None if negative is None else [negative] * len(batch),
        guidance=_GUIDANCE.value,
        sampler=_SAMPLER.value,
        seed=_SEED.value + i,
        **sizes,
      )
    )
    done, seconds = len(videos), time.perf_counter() - start
    logging.info("%d of %d videos, %.1f s", done, len(prompts), seconds)
  write(videos, prompts, epath.Path(_OUT.value), _FPS.value or pipe.recipe.fps)


def read_prompts(given: list[str], path: str | None) -> list[str]:
  """Join the prompts of the flags and of a file, refusing to find none."""
  prompts = list(given)
  if path is not None:
    lines = epath.Path(path).read_text().splitlines()
    for number, line in enumerate(lines, 1):
      if not line.strip():
        raise ValueError(f"{path}:{number} is empty; remove the line")
    prompts += lines
  if not prompts:
    raise ValueError("no prompt; pass --prompt or --prompts_file")
  return prompts


def write(
  videos: list[np.ndarray], prompts: list[str], out: epath.Path, fps: float
) -> None:
  """Write one file for each video and, of several, one contact sheet."""
  enlarge = _ENLARGE.value or max(1, 256 // min(videos[0].shape[1:3]))
  for i, video in enumerate(videos):
    name = f"{out.stem}_{i:03d}{out.suffix}" if len(videos) > 1 else out.name
    media.write(out.parent / name, video, fps, enlarge=enlarge)
    logging.info("%s: %s", out.parent / name, prompts[i])
  if len(videos) > 1:
    sheet = sheets.draw(
      np.stack(videos), prompts, columns=9, factor=max(1, enlarge // 3)
    )
    media.write_image(out.parent / f"{out.stem}_sheet.png", sheet)
    logging.info("contact sheet: %s", out.parent / f"{out.stem}_sheet.png")


if __name__ == "__main__":
  app.run(main)
