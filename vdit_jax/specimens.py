"""Clips to measure: generated from prompts, and the real ones beside them.

  prompts of a file, held-out prompts of digits, or captions --groups--> Group
  Group --generate--> generated clips;  --real--> real clips

Clips are [B, F, H, W, 3], float in [-1, 1], a batch in memory at a time.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterator, Mapping

import numpy as np
import tqdm
from etils import epath

from vdit_jax import pipeline
from vdit_jax.data import digits, moving_digits, prompts, reading


@dataclasses.dataclass(frozen=True)
class Group:
  """Prompts to generate clips from, and which real clips to set beside them.

  Attributes:
    suffix: of the names of what is measured of them.
    prompts: of the generated clips.
    digits: number of digits in the real clips; None takes any clip.
  """

  suffix: str
  prompts: tuple[prompts.Prompt, ...]
  digits: int | None = None

  @property
  def texts(self) -> list[str]:
    """Texts of the prompts."""
    return [prompt.text for prompt in self.prompts]


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
  given: tuple[prompts.Prompt, ...] | None,
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
    return [Group("", tuple(map(prompts.Prompt, texts)))]
  found = []
  for count in counts:
    suffix = "" if count == 1 else f"_{digits.DIGITS[count]}"
    texts = digits.held_out_prompts(number, seed, count)
    found.append(Group(suffix, tuple(map(prompts.Prompt, texts)), count))
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
  source: reading.Source, keys: Mapping[str, str], batch_size: int, name: str
) -> Iterator[np.ndarray]:
  """Yield real clips, in whole batches but for the last.

  Args:
    source: of the clips.
    keys: of their records.
    batch_size: clips at once.
    name: of the progress bar.
  """
  held, left = [], len(keys)
  batches = reading.evaluation_batches(source, None, batch_size, 1)
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
        yield np.asarray(pipeline.to_float(clips))
      if batch is None:
        return


def generate(
  pipe: pipeline.Pipeline,
  texts: list[str],
  source: reading.Source,
  batch_size: int,
  seed: int,
  seconds: list[float],
) -> Iterator[np.ndarray]:
  """Yield generated clips of a source's size.

  Args:
    pipe: what generates.
    texts: prompts.
    source: whose clips' size to take.
    batch_size: clips at once.
    seed: of the noise.
    seconds: gets the time that each batch took.
  """
  for i in tqdm.trange(0, len(texts), batch_size, desc="sampling"):
    start = time.perf_counter()
    clips = pipe.generate(
      texts[i : i + batch_size],
      num_frames=source.num_frames,
      height=source.height,
      width=source.width,
      seed=seed + i,
    )
    seconds.append(time.perf_counter() - start)
    yield clips
