"""Files from outside that are read whole: what is no such file is refused.

Every reader of a small file (a config, an index, a tokenizer) begins here, so
that a folder, a pipe, a file that is cut or far too large ends in one line.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from vdit_jax import writing

MOST_BYTES = 16 * 2**20  # of a JSON file, which takes ten times that in memory


def damaged(path: epath.PathLike, why: str) -> ValueError:
  """Make the error of a file that is not what it should be."""
  return ValueError(f"{path} is damaged: {why}; fetch the file again")


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
  """Let a refusal within begin with where the refused is from."""
  try:
    yield
  except ValueError as error:
    raise ValueError(f"{where}: {error}") from error


def check_file(path: epath.PathLike) -> epath.Path:
  """Refuse what is no regular file, which might never end."""
  path = epath.Path(path)
  # epath takes a local pipe for a file.
  if path.is_file() if writing.is_remote(path) else os.path.isfile(path):
    return path
  what = "does not exist"
  if path.exists():
    what = "is a folder" if path.is_dir() else "is none"
  raise ValueError(f"{path} must be a file, but {what}; fetch it again")


def read(path: epath.PathLike, most: int = MOST_BYTES) -> bytes:
  """Read a file.

  Args:
    path: of the file.
    most: bytes that it may have.

  Raises:
    ValueError: if it is none, is larger, or cannot be read.
  """
  try:
    path = check_file(path)
    size = path.stat().length
    if size > most:
      raise ValueError(f"{path} must have at most {most} bytes, got {size}")
    return path.read_bytes()
  except OSError as error:
    raise ValueError(
      f"{path} cannot be read ({error.strerror or error})"
    ) from error


def read_json(path: epath.PathLike) -> dict[str, Any]:
  """Read a file that is one JSON object; refuse a damaged one."""
  value = parse_json(path, read(path))
  if not isinstance(value, dict):
    raise damaged(path, "it is not a JSON object")
  return value


def parse_json(path: epath.PathLike, text: bytes | str, **how: Any) -> Any:
  """Parse JSON that a file holds, as `json.loads` does; refuse what is none."""
  try:
    return json.loads(text, **how)
  except (ValueError, RecursionError) as error:
    raise damaged(path, f"it is not JSON ({str(error)[:100]})") from error
