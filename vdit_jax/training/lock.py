"""One run a workdir: a second one is refused while the first is alive.

On a file system the kernel holds the lock, of the folder itself, and lets go of
it with the process, however that ends. A file says who has it, and locks
nothing. An object store has no locks. There the newest run takes the workdir,
and an older one that still runs sees it at its next checkpoint and ends before
it saves.
"""

import contextlib
import datetime
import os
import socket
import uuid
from collections.abc import Iterator

import jax
from absl import logging
from etils import epath

from vdit_jax import writing

FILE = ".lock"  # of the workdir: who has it


class Lock:
  """A workdir that this run has; process 0 alone asks and is asked."""

  def claim(self) -> None:
    """Take a workdir for good, right before something is written to it."""

  def check(self) -> None:
    """Refuse to go on where another run has taken the workdir since."""


class _Claim(Lock):
  """What stands for a lock on an object store: the newest run's id."""

  def __init__(self, path: epath.Path):
    self._path, self._mine = path, f"{_me()}, run {uuid.uuid4().hex}"

  def claim(self) -> None:
    if self._path.exists():
      logging.warning(
        "%s had this workdir; if it still runs, it ends at its next checkpoint",
        self._path.read_text(),
      )
    self._path.write_text(self._mine)

  def check(self) -> None:
    holder = _holder(self._path)
    if holder != self._mine:
      raise ValueError(
        f"workdir {self._path.parent} was taken over by {holder}; this run "
        "ends before it saves: let one of them have it"
      )

  def release(self) -> None:
    """Let go of it, unless another run has it by now."""
    if _holder(self._path) == self._mine:
      self._path.unlink()


@contextlib.contextmanager
def held(workdir: epath.PathLike) -> Iterator[Lock]:
  """Hold a workdir, of which nothing is left if nothing is written to it.

  Args:
    workdir: of the run, local or of an object store; made if it is not there.

  Raises:
    ValueError: another process holds it, which is named; or it can't be made.
  """
  if jax.process_index() > 0:
    yield Lock()
    return
  folder = writing.check_folder(workdir, "workdir", free=False)
  if writing.is_remote(folder):
    claim = _Claim(folder / FILE)
    try:
      yield claim
    finally:
      claim.release()
    return
  with _made(folder):
    try:
      with writing.locked(folder), _signed(folder / FILE):
        yield Lock()
    except BlockingIOError:
      raise ValueError(
        f"workdir {folder} is in use by {_holder(folder / FILE)}; wait for it "
        "or end it, or use another workdir"
      ) from None


@contextlib.contextmanager
def _made(folder: epath.Path) -> Iterator[None]:
  """Make a folder and those above it; at the end, remove what is empty."""
  missing = [path for path in (folder, *folder.parents) if not path.exists()]
  try:
    folder.mkdir(parents=True, exist_ok=True)
    yield
  finally:
    for path in missing:
      with contextlib.suppress(OSError):  # something is in it, and may stay
        os.rmdir(path)


@contextlib.contextmanager
def _signed(path: epath.Path) -> Iterator[None]:
  """Write into a file who holds its folder, as long as that is so."""
  path.write_text(_me())
  try:
    yield
  finally:
    path.unlink(missing_ok=True)


def _holder(path: epath.Path) -> str:
  text = path.read_text() if path.exists() else ""
  return text or "another run"


def _me() -> str:
  now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
  return f"process {os.getpid()} on {socket.gethostname()} since {now}"
