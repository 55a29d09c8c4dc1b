"""TFDS builder of captioned clips of moving digits; needs no TensorFlow.

  python -m vdit_jax.data.moving_digits --config=one --data_dir=DATA

writes array_record files that `reading` reads. Scans of digits are real and
divided by split; the training split never shows a held-out combination, the
test split shows nothing else (see `digits`). A record is a pure function of
(config, split, index).
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow_datasets as tfds
import tqdm
from absl import flags, logging

from vdit_jax import tool, writing
from vdit_jax.data import digit_worlds, digits

FPS = 8.0

_SHARD = 2_000  # clips of a file
_TRIES = 32  # draws of paths until digits of a clip keep apart
_PLAIN = 4  # of a clip's captions are the same, in the words of `digits`


@dataclasses.dataclass(eq=False, kw_only=True)
class MovingDigitsConfig(tfds.core.BuilderConfig):
  """One size and motion of the clips.

  Attributes:
    num_frames, height, width: of a clip in pixels.
    digit_size: side of a digit's box in pixels.
    speeds: pixels a frame, one drawn for each digit.
    counts: digits in a clip, one drawn for each clip.
    clips: number of clips of each split.
    seed: of everything that is drawn.
  """

  num_frames: int = 9
  height: int = 32
  width: int = 32
  digit_size: int = 16
  speeds: tuple[float, ...] = (0.75, 1.0, 1.25, 1.5)
  counts: tuple[int, ...] = (1,)
  clips: dict[str, int]
  seed: int = 0


@dataclasses.dataclass(eq=False, kw_only=True)
class WorldsConfig(MovingDigitsConfig):
  """Clips of many shapes: walls, ground and a camera; several captions.

  Attributes:
    shapes: (num_frames, height, width), one drawn for each clip.
    grounds: share of clips with grey ground.
    cameras: share of clips whose camera moves over it; long ones have none.
    numbers: shares of clips that tell of the camera, and of a box if they have
      one (`digit_worlds.CAMERA` and `BOX`).
  """

  digit_size: int = 14
  counts: tuple[int, ...] = (1, 1, 2)
  shapes: tuple[tuple[int, int, int], ...] = tuple(
    (frames, *size)
    for frames in (1, 5, 9, 9, 13, 17, 33)
    for size in ((32, 32), (32, 32), (32, 48), (48, 32))
  )
  grounds: float = 0.1
  cameras: float = 0.2
  numbers: tuple[float, float] = (0.5, 0.3)


class MovingDigits(tfds.core.ShardBasedBuilder):
  """Captioned clips of coloured handwritten digits that move.

  Written shard by shard: TFDS's other builder gathers a whole split in memory
  and, beyond 1,000 MiB, in temporary files for which it needs TensorFlow.
  """

  VERSION = tfds.core.Version("1.0.0")
  # Nothing is downloaded; and to look for checksums of downloads, TFDS 4.9.10
  # imports importlib_resources, which it doesn't depend on.
  url_infos = None
  BUILDER_CONFIGS = [
    MovingDigitsConfig(
      name="one",
      description="One digit, 9 frames of 32x32.",
      clips={"train": 12_000, "validation": 512, "test": 1_024},
    ),
    MovingDigitsConfig(
      name="mixed",
      description="One or two digits, 9 frames of 32x32.",
      digit_size=14,
      counts=(1, 2),
      clips={"train": 30_000, "validation": 512, "test": 1_024},
    ),
    # In one latent frame, 4 frames, a digit crosses more than a patch of 8
    # pixels: motion can't be followed inside one patch's column.
    MovingDigitsConfig(
      name="fast",
      description="One fast digit, 9 frames of 48x48.",
      height=48,
      width=48,
      speeds=(2.5, 3.0, 3.5),
      clips={"train": 12_000, "validation": 512, "test": 1_024},
    ),
    WorldsConfig(
      name="worlds",
      description="One or two digits, 1 to 33 frames of three sizes.",
      clips={"train": 40_000, "validation": 1_024, "test": 2_048},
    ),
    MovingDigitsConfig(
      name="tiny",
      description="A few clips of one or two digits, for tests.",
      digit_size=14,
      counts=(1, 2),
      clips={"train": 48, "validation": 16, "test": 16},
    ),
    WorldsConfig(
      name="tiny_worlds",
      description="A few clips of many shapes, for tests.",
      clips={"train": 96, "validation": 16, "test": 16},
    ),
  ]

  def _info(self) -> tfds.core.DatasetInfo:
    config = self.builder_config
    shape: Any = (config.num_frames, config.height, config.width, 3)
    features: dict[str, Any] = {
      "key": tfds.features.Text(),
      "fps": tfds.features.Scalar(np.float32),
    }
    if isinstance(config, WorldsConfig):
      shape = (None, None, None, 3)
      features["captions"] = tfds.features.Sequence(tfds.features.Text())
      for name in digit_worlds.CAMERA + digit_worlds.BOX:
        features[name] = tfds.features.Scalar(np.float32)
    else:
      features["caption"] = tfds.features.Text()
    features["video"] = tfds.features.Tensor(
      shape=shape, dtype=np.uint8, encoding=tfds.features.Encoding.BYTES
    )
    return tfds.core.DatasetInfo(
      builder=self,
      description="Coloured handwritten digits that move, with captions.",
      features=tfds.features.FeaturesDict(features),
      disable_shuffling=True,  # records are drawn at random already
    )

  def _shard_iterators_per_split(self, dl_manager) -> dict[str, list]:
    del dl_manager  # nothing to download
    return {
      split: [
        functools.partial(self._records, split, start)
        for start in range(0, clips, _SHARD)
      ]
      for split, clips in self.builder_config.clips.items()
    }

  def _records(self, split: str, start: int) -> Iterator[tuple[int, dict]]:
    config = self.builder_config
    stop = min(start + _SHARD, config.clips[split])
    name = f"{split}, {start}.. of {config.clips[split]}"
    for index in tqdm.trange(start, stop, desc=name, unit="clips"):
      yield index, record(config, split, index)


def record(config: MovingDigitsConfig, split: str, index: int) -> dict:
  """Draw one record: video uint8 [F, H, W, 3], caption, key, fps."""
  seed = [config.seed, list(digits.SPLITS).index(split), index]
  rng = np.random.default_rng(seed)
  key = f"{split}-{index:06d}"
  if isinstance(config, WorldsConfig):
    return _world(rng, config, split) | {"key": key, "fps": FPS}
  scene = _scene(rng, config, split)
  video = digits.render(
    images=_images(rng, scene, split),
    colours=[digits.COLOURS[digit.colour] for digit in scene],
    positions=_paths(rng, config, scene),
    height=config.height,
    width=config.width,
    digit_size=config.digit_size,
  )
  return {
    "video": video,
    "caption": digits.caption(scene),
    "key": key,
    "fps": FPS,
  }


def _world(rng, config: WorldsConfig, split: str) -> dict[str, Any]:
  """Draw a clip of one of many shapes, its captions, what numbers it has."""
  num_frames, height, width = config.shapes[rng.integers(len(config.shapes))]
  size = {"num_frames": num_frames, "height": height, "width": width}
  config = dataclasses.replace(config, **size)
  scene, kind = _scene(rng, config, split), rng.random()
  moves = kind < config.cameras and 1 < num_frames <= digit_worlds.LONGEST
  paths, camera = _world_paths(rng, config, scene, moves)
  ground = None
  if camera.moves or kind >= 1 - config.grounds:
    ground = digit_worlds.ground(rng, camera, num_frames, height, width)
  video = digits.render(
    images=_images(rng, scene, split),
    colours=[digits.COLOURS[digit.colour] for digit in scene],
    positions=camera.project(paths, height, width),
    height=height,
    width=width,
    digit_size=config.digit_size,
    scale=camera.scale(num_frames),
    ground=ground,
  )
  behind = "" if ground is None else digits.ON_GROUND
  said = [digits.caption(scene)] * _PLAIN + digits.rewordings(scene)
  boxed = paths[rng.integers(len(paths))]
  told = {
    digit_worlds.CAMERA: (camera.x, camera.y, camera.zoom),
    digit_worlds.BOX: digit_worlds.box_of(boxed, config.digit_size),
  }
  numbers = dict.fromkeys(digit_worlds.CAMERA + digit_worlds.BOX, np.nan)
  for names, share in zip(told, config.numbers, strict=True):
    if rng.random() < share and not (
      names is digit_worlds.BOX and camera.moves
    ):
      numbers |= dict(zip(names, told[names], strict=True))
  return {
    "video": video,
    "captions": [text + behind for text in said],
    **numbers,
  }


def _world_paths(rng, config, scene, moves):
  """Draw paths [n, F, 2] in the world, and the camera that sees them whole."""
  size = config.height, config.width
  draw = functools.partial(_paths, rng, config, scene)
  for _ in range(_TRIES if moves else 0):
    camera = digit_worlds.draw_camera(rng, config.num_frames)
    paths = draw(digit_worlds.seen_by(camera))
    seen = camera.project(paths, *size)
    if digit_worlds.inside(seen, camera, *size, config.digit_size):
      return paths, camera
  return draw(digit_worlds.bouncing), digit_worlds.Camera()


def _scene(rng, config, split: str) -> digits.Scene:
  """Draw digits of different colours, all held out or none."""
  scene: list[digits.Digit] = []
  for _ in range(rng.choice(config.counts)):
    used = {digit.colour for digit in scene}
    every = _choices(held_out=split == "test")
    free = [digit for digit in every if digit.colour not in used]
    scene.append(free[rng.integers(len(free))])
  return tuple(scene)


@functools.cache
def _choices(held_out: bool) -> tuple[digits.Digit, ...]:
  every = digits.singles()
  return tuple(d for d in every if digits.held_out(d) == held_out)


def _images(rng, scene: digits.Scene, split: str) -> np.ndarray:
  images, labels = digits.scans(split)
  members = [np.flatnonzero(labels == digit.digit) for digit in scene]
  return images[[rng.choice(indices) for indices in members]]


def _paths(
  rng, config, scene: digits.Scene, draw: Any = digits.trajectory
) -> np.ndarray:
  """Draw paths until each digit is seen whole in some frame [n, F, 2].

  Of paths that never keep apart by a digit's size, takes the most distant.
  """
  best, widest = None, -1.0
  for _ in range(_TRIES):
    paths = np.stack([_path(rng, config, digit, draw) for digit in scene])
    apart = _distance(paths)
    if apart > widest:
      best, widest = paths, apart
    if apart >= config.digit_size:
      break
  return best  # pyright: ignore[reportReturnType]


def _path(rng, config, digit: digits.Digit, draw) -> np.ndarray:
  return draw(
    rng,
    digit.direction,
    rng.choice(config.speeds),
    config.num_frames,
    config.height,
    config.width,
    config.digit_size,
  )


def _distance(paths: np.ndarray) -> float:
  """Largest distance of two paths [n, F, 2] over time, the least of pairs."""
  gaps = np.linalg.norm(paths[:, None] - paths[None], axis=-1).max(-1)
  others = ~np.eye(len(paths), dtype=bool)
  return gaps[others].min(initial=np.inf)


def main(argv: list[str]) -> None:
  """Build the flags' config."""
  tool.no_arguments(argv)
  logging.set_verbosity(logging.INFO)
  builder = MovingDigits(
    config=flags.FLAGS.config,
    data_dir=_local(flags.FLAGS.data_dir),
    file_format="array_record",
  )
  if builder.is_prepared():
    logging.info("already there: %s", builder.data_path)
    return
  builder.download_and_prepare()
  for name, split in builder.info.splits.items():
    size = f"{split.num_bytes / 2**20:.1f} MiB"
    logging.info("%s: %d clips, %s", name, split.num_examples, size)
  logging.info("written: %s", builder.data_path)


def _local(data_dir: str) -> str:
  if "://" in data_dir:
    raise ValueError(
      f"data_dir must be a local folder, got {data_dir}: array_record reads "
      "from gs:// but can't write there; build locally and copy it with "
      "gcloud storage cp -r"
    )
  writing.check_folder(data_dir, "data_dir", free=False)
  return data_dir


if __name__ == "__main__":
  names = list(MovingDigits.builder_configs)
  flags.DEFINE_enum("config", "one", names, "Which clips to make.")
  flags.DEFINE_string(
    "data_dir", None, "TFDS data directory to write, local.", required=True
  )
  tool.run(main)
