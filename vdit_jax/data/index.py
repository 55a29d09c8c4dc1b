"""What is known of a dataset's records without reading them.

  data.build --write--> index-SPLIT.npz --read--> plan of batches

Which records make up a step's batch may depend on their sizes and lengths,
and stays a pure function of (seed, step) over this. It lies beside a split's
files, so that it is read wherever they are, gs:// too. A dataset whose
records are all of one shape needs none: `uniform` says the same of it.
"""

import dataclasses
import hashlib
import io

import numpy as np
from etils import epath

from vdit_jax import writing

_DTYPES = {
  "num_frames": np.int32,
  "height": np.int32,
  "width": np.int32,
  "fps": np.float32,
}


@dataclasses.dataclass(frozen=True)
class Index:
  """Keys, lengths and sizes of a split's records, in their order.

  Attributes:
    keys: of the records, numpy's variable-width strings [R]; an item is str.
    num_frames: int32 [R], of the clip as it is stored; 1 of an image.
    height, width: int32 [R], pixels as displayed, after rotation.
    fps: frames a second, the mean of a clip whose rate varies; float32 [R],
      0 of an image.
  """

  keys: np.ndarray
  num_frames: np.ndarray
  height: np.ndarray
  width: np.ndarray
  fps: np.ndarray

  def __post_init__(self):
    keys = np.asarray(self.keys, np.dtypes.StringDType())
    object.__setattr__(self, "keys", keys)
    for name, dtype in _DTYPES.items():
      values = np.asarray(getattr(self, name), dtype)
      object.__setattr__(self, name, values)
      if values.shape != keys.shape or keys.ndim != 1:
        raise ValueError(
          f"{name} must be [R] as keys are, got {values.shape} and "
          f"{keys.shape}; give one value a record"
        )

  def __len__(self) -> int:
    return len(self.keys)

  def digest(self) -> str:
    """Name the records by all that is known of them."""
    digest = hashlib.sha256("\0".join(self.keys).encode())
    for name in _DTYPES:
      digest.update(np.ascontiguousarray(getattr(self, name)).tobytes())
    return digest.hexdigest()[:16]

  def take(self, positions: np.ndarray | slice) -> "Index":
    """Take some records' rows, such as those of "train[:10%]"."""
    fields = dataclasses.fields(self)
    return Index(**{f.name: getattr(self, f.name)[positions] for f in fields})


def read(builder_dir: epath.PathLike, split: str) -> Index | None:
  """Read a split's index.

  Args:
    builder_dir: folder of the dataset's version, `builder.data_path`.
    split: its name, without a part: "train".

  Returns:
    The index, or None if the dataset has none.
  """
  path = _path(builder_dir, split)
  if not path.exists():
    return None
  with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as stored:
    text = stored["keys"].tobytes()
    ends = stored["key_ends"].tolist()
    begins = [0, *ends][:-1]
    keys = [text[a:b].decode() for a, b in zip(begins, ends, strict=True)]
    return Index(keys, **{name: stored[name] for name in _DTYPES})


def write(builder_dir: epath.PathLike, split: str, index: Index) -> None:
  """Write a split's index; the file appears whole or not at all."""
  keys = [key.encode() for key in index.keys]
  stored = io.BytesIO()
  np.savez_compressed(
    stored,
    keys=np.frombuffer(b"".join(keys), np.uint8),
    key_ends=np.cumsum([len(key) for key in keys], dtype=np.int64),
    **{name: getattr(index, name) for name in _DTYPES},
  )
  writing.write(_path(builder_dir, split), stored.getvalue())


def uniform(
  num_records: int, num_frames: int, height: int, width: int, fps: float = 0.0
) -> Index:
  """Make the index of a dataset of one shape; its keys are "", not known."""
  full = [np.full(num_records, x) for x in (num_frames, height, width, fps)]
  return Index(np.full(num_records, ""), *full)


def _path(builder_dir: epath.PathLike, split: str) -> epath.Path:
  if not split.isidentifier():
    raise ValueError(
      f"split must be a split's name, got {split!r}; take a part of it with "
      "Index.take"
    )
  return epath.Path(builder_dir) / f"index-{split}.npz"
