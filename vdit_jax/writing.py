"""Files and folders that appear whole or not at all: the package's one writer.

  bytes --write, opened--> a file      files --folder--> a folder

What is written goes under a name of its own, made exclusively, to the disk, and
then by renaming to its place; what fails removes it. So no reader sees half a
file, two writers do not meet, and what was there before stays until the new is
whole. A writer holds what it writes: what a killed one left is held by none,
and the next writer of the same path removes it. `check_file` and `check_folder`
refuse, before anything is computed, what could not be written. A path may be
remote, such as gs://, where an object appears whole by itself.
"""

import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from typing import BinaryIO

from etils import epath


def absolute(path: epath.PathLike) -> epath.Path:
  """Make a path absolute; `resolve` would take gs:// for a local folder."""
  try:
    path = epath.Path(path).expanduser()
  except KeyError as error:
    raise ValueError(
      f"path {os.fspath(path)!r} is of an unknown store; known is gs://"
    ) from error
  return path if is_remote(path) else epath.Path(os.path.abspath(path))


def is_remote(path: epath.PathLike) -> bool:
  """Whether a path is of an object store, and not of a file system."""
  return "://" in os.fspath(path)


def check_file(path: epath.PathLike, name: str = "path") -> epath.Path:
  """Refuse a path that no file could be written to; nothing is made.

  Args:
    path: of the file; what folders are missing would be made.
    name: what the path is called where it comes from.

  Returns:
    It, absolute.

  Raises:
    ValueError: if it is no name of a file, there is something else, a parent
      is a file, or the folder cannot be written to: says which.
  """
  if not os.fspath(path) or os.fspath(path).endswith("/"):
    raise ValueError(f"{name} must be a file's name, got {os.fspath(path)!r}")
  path, mode = _look(path, name)
  if mode is not None and stat.S_ISDIR(mode):
    raise ValueError(f"{name} {path} is a folder; name a file in it")
  if mode is not None and not stat.S_ISREG(mode):
    raise ValueError(f"{name} {path} is a device or pipe; name a file")
  _check_parent(path, name)
  return path


def check_folder(
  path: epath.PathLike, name: str = "path", free: bool = True
) -> epath.Path:
  """Refuse a path that no folder could be written to; nothing is made.

  Args:
    path: of the folder; what folders are missing would be made.
    name: what the path is called where it comes from.
    free: whether it must not be there, or be empty.

  Returns:
    It, absolute.

  Raises:
    ValueError: if a file is there, a parent is one, the folder is not free or
      cannot be written to: says which.
  """
  if not os.fspath(path):
    raise ValueError(f"{name} must be a folder's name, got none")
  path, mode = _look(path, name)
  if mode is not None and not stat.S_ISDIR(mode):
    raise ValueError(f"{name} {path} is a file; name a folder")
  if free and mode is not None and any(path.iterdir()):
    raise ValueError(
      f"{name} {path} is there and not an empty folder; remove it, or give "
      "another"
    )
  _check_parent(path / "file", name)
  return path


def write(path: epath.PathLike, data: bytes | str) -> None:
  """Write a file, and the folders above it; an older one is replaced."""
  with opened(path) as file:
    file.write(data.encode() if isinstance(data, str) else data)


@contextlib.contextmanager
def opened(path: epath.PathLike) -> Iterator[BinaryIO]:
  """Give a file to write to, which becomes `path` if all goes well."""
  path = epath.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  if is_remote(path):
    with _removed_on_failure(path), path.open("wb") as file:
      yield file
    return
  with _temporary(path) as file:
    yield file
    file.flush()
    os.fsync(file.fileno())
    os.replace(file.name, path)  # still held
  _sync(path.parent)


@contextlib.contextmanager
def folder(
  path: epath.PathLike,
  *,
  over: bool = False,
  first: bool = True,
  wait: Callable[[str], None] = lambda name: None,
) -> Iterator[epath.Path]:
  """Give a folder to write to, which becomes `path` if all goes well.

  Args:
    path: of the folder.
    over: whether one that is there is replaced, its other files kept; else it
      must be free.
    first: whether this process makes and renames it, where several write.
    wait: called by all of several processes, waits until each has come to
      the same name.
  """
  path = check_folder(path, free=not over)
  temporary = path.with_name(f".{path.name}.unfinished")
  with contextlib.ExitStack() as held:
    if first:
      held.enter_context(_made(temporary, path))
    wait("made")
    yield temporary
    wait("written")
    if first:
      _swap(temporary, path)
  wait("renamed")


@contextlib.contextmanager
def locked(path: epath.PathLike) -> Iterator[None]:
  """Hold a folder for this process; one that is killed holds it no longer.

  An object store has no locks: there nothing is held.

  Raises:
    BlockingIOError: if another process holds it.
  """
  if is_remote(path):
    yield
    return
  handle = os.open(path, os.O_RDONLY)
  try:
    _hold(handle, fcntl.LOCK_NB)
    yield
  finally:
    os.close(handle)


def beside(path: epath.PathLike) -> epath.Path:
  """Name a temporary file in the folder of a path that nobody else names."""
  path = epath.Path(path)
  return path.parent / f".{_mark(path)}.{uuid.uuid4().hex}.tmp"


@contextlib.contextmanager
def _temporary(path: epath.Path) -> Iterator[BinaryIO]:
  """Give a new file beside a path, held; a failure removes it."""
  _sweep(path)
  with _make(path) as file, _removed_on_failure(epath.Path(file.name)):
    yield file


def _make(path: epath.Path) -> BinaryIO:
  """Make a file beside a path and hold it."""
  while True:
    file = open(beside(path), "xb")
    _hold(file.fileno())
    if os.path.exists(file.name):
      return file
    file.close()  # another took it for left before it was held


def _sweep(path: epath.Path) -> None:
  """Remove the files beside a path that killed writers of it left."""
  pattern = f".{_mark(path)}.*.tmp"
  for name in glob.glob(pattern, root_dir=os.fspath(path.parent)):
    left = path.parent / name
    with contextlib.suppress(OSError), open(left, "r+b") as file:
      if _hold(file.fileno(), fcntl.LOCK_NB):
        left.unlink()


def _mark(path: epath.Path) -> str:
  """Give what the names of a path's temporary files begin with."""
  return hashlib.sha256(os.fsencode(path.name)).hexdigest()[:16]


def _hold(handle: int, how: int = 0) -> bool:
  """Lock an open file; False where the file system has no locks.

  Raises:
    BlockingIOError: if another holds it, and `how` is not to wait.
  """
  try:
    fcntl.flock(handle, fcntl.LOCK_EX | how)
  except BlockingIOError:
    raise
  except OSError:
    return False
  return True


@contextlib.contextmanager
def _made(temporary: epath.Path, path: epath.Path) -> Iterator[None]:
  """Make the folder that is written to; whatever happens, remove it.

  One that a killed process left is held by none, and is taken over.
  """
  refusal = (
    f"{temporary} is there: {path} is being written; wait, or give another"
  )
  if temporary.exists() and is_remote(temporary):
    raise ValueError(f"{refusal}, or remove it if nothing writes it")
  temporary.mkdir(parents=True, exist_ok=True)
  try:
    with locked(temporary):
      _recover(path)
      for left in temporary.iterdir():
        left.rmtree() if left.is_dir() else left.unlink()
      try:
        yield
      finally:
        temporary.rmtree(missing_ok=True)
  except BlockingIOError as error:
    raise ValueError(refusal) from error


def _swap(new: epath.Path, path: epath.Path) -> None:
  """Put a folder in another's place, with what that alone has."""
  if not path.exists():
    new.rename(path)
    return
  for old in path.iterdir():
    if not (new / old.name).exists():
      _copy(old, new / old.name)
  aside = _aside(path)
  path.rename(aside)
  try:
    new.rename(path)
  except BaseException:
    aside.rename(path)
    raise
  aside.rmtree()


def _copy(old: epath.Path, new: epath.Path) -> None:
  """Copy a file, or a folder with what is in it."""
  if not old.is_dir():
    old.copy(new)
    return
  new.mkdir()
  for inside in old.iterdir():
    _copy(inside, new / inside.name)


def _recover(path: epath.Path) -> None:
  """Put back what a kill left aside, or remove it if the new is in place."""
  aside = _aside(path)
  if path.exists():
    aside.rmtree(missing_ok=True)
  elif aside.exists():
    aside.rename(path)


def _aside(path: epath.Path) -> epath.Path:
  """Name where a folder is while another takes its place."""
  return path.with_name(f".{path.name}.replaced")


@contextlib.contextmanager
def _removed_on_failure(path: epath.Path) -> Iterator[None]:
  try:
    yield
  except BaseException:
    with contextlib.suppress(OSError):
      path.unlink(missing_ok=True)
    raise


def _look(path: epath.PathLike, name: str) -> tuple[epath.Path, int | None]:
  """Make a path absolute; give the mode of what is there, or None."""
  path = absolute(path)
  try:
    if is_remote(path):
      there = path.is_dir() and stat.S_IFDIR
      return path, there or (stat.S_IFREG if path.exists() else None)
    return path, os.stat(path).st_mode
  except FileNotFoundError:
    return path, None
  except (OSError, ValueError, ImportError) as error:
    raise ValueError(
      f"{name} {_cut(path)} cannot be written ({_reason(error)}); give another"
    ) from error


def _check_parent(path: epath.Path, name: str) -> None:
  """Refuse a file whose folder cannot be made or written to."""
  if is_remote(path):
    return
  parent = path.parent
  while not parent.exists():
    parent = parent.parent
  try:
    with _temporary(parent / path.name) as file:
      os.unlink(file.name)  # at once, so that a kill leaves nothing
      file.write(bytes(4096))  # a full disk refuses it here
      file.flush()
      os.fsync(file.fileno())
  except OSError as error:
    raise ValueError(
      f"{name} {_cut(path)} cannot be written: {parent}: {_reason(error)}; "
      "give one in a folder that can be written to"
    ) from error


def _reason(error: Exception) -> str:
  if isinstance(error, OSError) and error.errno == errno.ENOTDIR:
    return "a file stands where a folder should"
  return getattr(error, "strerror", None) or str(error)


def _cut(path: epath.Path) -> str:
  return os.fspath(path)[:200]


def _sync(parent: epath.Path) -> None:
  """See to it that a renaming outlives the machine's end."""
  handle = os.open(parent, os.O_RDONLY)
  try:
    with contextlib.suppress(OSError):  # some file systems cannot
      os.fsync(handle)
  finally:
    os.close(handle)
