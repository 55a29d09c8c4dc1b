"""Rows of results in a JSON file that is whole after each of them.

  {"about": {...}, "rows": [{"name": ..., ...}, ...], "done": true}

Imports neither jax nor torch.
"""

import json
import traceback
from collections.abc import Callable
from typing import Any

from etils import epath

from vdit_jax import writing


class Rows:
  """Collects rows, going on from those that are in the file already.

  Args:
    path: of the JSON file.
    about: the machine, the versions and all else that rows have in common.

  Raises:
    ValueError: if the rows in the file are of something else.
  """

  def __init__(self, path: epath.PathLike, about: dict[str, Any]):
    self._path = epath.Path(path)
    self._found = read(self._path) or {"about": about, "rows": []}
    old = self._found["about"]
    if changed := [k for k in old | about if old.get(k) != about.get(k)]:
      raise ValueError(
        f"{path} has rows of another {', '.join(changed)}: "
        f"{[old.get(k) for k in changed]}, now "
        f"{[about.get(k) for k in changed]}; write to another place"
      )

  def __contains__(self, name: str) -> bool:
    """Whether there is a row of a name that did not fail."""
    return any(r["name"] == name and "error" not in r for r in self.rows)

  @property
  def rows(self) -> list[dict[str, Any]]:
    """All rows, in the order in which they came."""
    return self._found["rows"]

  def add(self, name: str, **values: Any) -> None:
    """Add a row, in the place of an older one of its name."""
    print(name, values, flush=True)
    others = [row for row in self.rows if row["name"] != name]
    self._found["rows"] = [*others, {"name": name} | values]
    write(self._path, self._found)

  def attempt(self, name: str, run: Callable[[], dict[str, Any]]) -> None:
    """Add the row that a function returns, or what it fails with."""
    try:
      self.add(name, **run())
    except Exception as error:  # the other rows are worth having
      traceback.print_exc()
      self.add(name, error=f"{type(error).__name__}: {error}"[:600])

  def done(self) -> None:
    """Say that no row is to come."""
    self._found["done"] = True
    write(self._path, self._found)


def read(path: epath.PathLike) -> dict[str, Any]:
  """Read a JSON file; nothing if there is none."""
  path = epath.Path(path)
  return json.loads(path.read_text()) if path.exists() else {}


def write(path: epath.PathLike, found: Any) -> None:
  """Write a JSON file, whole or not at all."""
  writing.write(path, json.dumps(found, indent=1) + "\n")
