"""etils says what a PathLike is twice, which a checker takes for a variable."""

import os
import pathlib
from typing import Self, TypeAlias

PathLike: TypeAlias = str | os.PathLike[str]

class _Stat:
  is_directory: bool
  length: int
  mtime: int

class Path(pathlib.Path):
  def copy(self, dst: PathLike, overwrite: bool = ...) -> Self: ...
  def rmtree(self, missing_ok: bool = ...) -> None: ...
  def stat(self) -> _Stat: ...  # pyright: ignore
