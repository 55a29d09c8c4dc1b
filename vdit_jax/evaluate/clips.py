"""Clips to measure: generated from prompts, and the real ones beside them.

  prompts of a file, held-out prompts of digits, or captions --groups--> Group
  Group --generate--> generated clips;  --real--> real clips

Clips are [B, F, H, W, 3], float in [-1, 1], a batch in memory at a time.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import tqdm
from etils import epath

from vdit_jax import encoding, pipeline, types
from vdit_jax.data import digits, moving_digits, prompt_files, reading
from vdit_jax.models import frame_positions


@dataclasses.dataclass(frozen=True)
class Group:
  """Prompts to generate clips from, and which real clips to set beside them.

  Attributes:
    suffix: of the names of what is measured of them.
    prompts: of the generated clips.
    digits: number of digits in the real clips; None takes any clip.
  """

  suffix: str
  prompts: tuple[prompt_files.Prompt, ...]
  digits: int | None = None

  @property
  def texts(self) -> list[str]:
    """Texts of the prompts."""
    return [prompt.text for prompt in self.prompts]


@dataclasses.dataclass(frozen=True)
class Data:
  """A split of a dataset, and how its clips are looked at.

  Attributes:
    source: the split.
    size: frames, height and width of the clips.
    fps: frames a second to take of clips of any rate; 0 is as they are.
  """

  source: reading.Source
  size: tuple[int, int, int]
  fps: float = 0.0

  def batches(
    self,
    batch_size: int,
    words: Mapping[str, reading.Words] | None = None,
    given: bool = False,
  ) -> reading.Batches:
    """Read every clip once; see `reading.evaluation_batches`."""
    own = self.source.shape is not None
    options = reading.Options(fps=self.fps)
    return reading.evaluation_batches(
      self.source,
      reading.Wanted(words or {}, options, given=given),
      batch_size,
      None if own else self.size,
    )


def look_at(source: reading.Source, recipe: types.Recipe) -> Data:
  """Look at clips as they are, or as a recipe has them if their size varies."""
  if source.shape is not None:
    return Data(source, source.shape[:3])
  size = recipe.num_frames, recipe.height, recipe.width
  return Data(source, size, recipe.fps)


def is_digits(data: str) -> bool:
  """Tell whether a dataset is of moving digits."""
  return data.startswith(moving_digits.MovingDigits.name + "/")


def open_real(data: str, data_dir: epath.PathLike) -> reading.Source:
  """Open the test split, or the validation split where there is none."""
  try:
    return reading.open_source(data, "test", data_dir)
  except ValueError:
    return reading.open_source(data, "validation", data_dir)


def groups(
  source: reading.Source,
  given: tuple[prompt_files.Prompt, ...] | None,
  number: int,
  counts: tuple[int, ...],
  seed: int,
) -> list[Group]:
  """Say what to generate.

  Args:
    source: of the real clips.
    given: the prompts, if any are.
    number: of the prompts that are not given: of each count of digits, or
      captions.
    counts: numbers of digits, a group each. The suffix of other counts than
      one is "_two" and so on.
    seed: of held-out prompts.
  """
  if given:
    return [Group("", given)]
  if not is_digits(source.name):
    texts = captions(source, None, number).values()
    return [Group("", tuple(map(prompt_files.Prompt, texts)))]
  found = []
  for count in counts:
    suffix = "" if count == 1 else f"_{digits.DIGITS[count]}"
    texts = digits.held_out_prompts(number, seed, count)
    found.append(Group(suffix, tuple(map(prompt_files.Prompt, texts)), count))
  return found


def captions(
  source: reading.Source, count: int | None, number: int
) -> dict[str, str]:
  """Find the first real clips, of so many digits if asked: key -> caption."""
  found = (
    (record["key"], record["caption"])
    for record in reading.records(source)
    if count is None or len(digits.parse(record["caption"])) == count
  )
  first = dict(itertools.islice(found, number))
  if not first:
    wanted = "" if count is None else f" of {count} digits"
    raise ValueError(
      f"{source.name}/{source.split} has no clips{wanted}; leave {count} out "
      "of --digit_counts, or name another dataset"
    )
  return first


def real(
  data: Data, keys: Mapping[str, str], batch_size: int, name: str
) -> Iterator[np.ndarray]:
  """Yield real clips, in whole batches but for the last.

  Args:
    data: where the clips are.
    keys: of their records.
    batch_size: clips at once.
    name: of the progress bar.
  """
  held, left = [], len(keys)
  batches = data.batches(batch_size)
  with tqdm.tqdm(total=left, desc=name) as progress:
    while left:
      batch, names = next(batches, (None, ()))
      if batch is not None:
        chosen = np.array([key in keys for key in names])
        held.extend(batch.video[chosen & (batch.weight > 0)])
      while held and (len(held) >= min(batch_size, left) or batch is None):
        clips = np.stack(held[:batch_size])
        del held[: len(clips)]
        left -= len(clips)
        progress.update(len(clips))
        yield np.asarray(encoding.to_float(clips))
      if batch is None:
        return


def generate(
  pipe: pipeline.Pipeline,
  texts: list[str],
  size: tuple[int, int, int],
  batch_size: int,
  seed: int,
  seconds: list[float],
  images: Iterable[np.ndarray] | None = None,
) -> Iterator[np.ndarray]:
  """Yield generated clips.

  Args:
    pipe: what generates.
    texts: prompts.
    size: frames, height and width.
    batch_size: clips at once.
    seed: of the first clip's noise; the next ones have the next, as in
      `vdit_jax.sample`.
    seconds: gets the time that each batch took.
    images: real clips, in batches of that size, of which the frames are given
      that the denoiser needs; None gives none.
  """
  num_frames, height, width = size
  given = {}
  if images is not None:
    shown = iter(images)
    mask = frame_positions.mask(pipe.modules.needs, num_frames)
    mask = np.tile(mask, (len(texts), 1))
    given = {"frames": lambda rows: next(shown), "frame_mask": mask}
  batches = pipe.stream(
    texts,
    num_frames=num_frames,
    height=height,
    width=width,
    seed=seed,
    batch_size=batch_size,
    **given,
  )
  start = time.perf_counter()
  for clips in batches:
    seconds.append(time.perf_counter() - start)
    yield clips
    start = time.perf_counter()
