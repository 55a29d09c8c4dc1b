"""Batches that are read and placed on the devices ahead of their steps."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

from vdit_jax import types

_AHEAD = 1  # batches that wait, beside the one that the thread holds
_POLL = 0.1  # seconds between two looks whether all has ended
_PATIENCE = 5.0  # seconds that the end waits for a batch in the making

Keyed = tuple[types.Batch, list[str]]


class Feed:
  """Reads and places batches in a thread, so that a step finds its own ready.

  An iterator from `__enter__` to `__exit__`; what the thread raises is raised
  where its batch would be.

  Args:
    batches: with their keys; read by the thread alone.
    place: a batch -> the batch on the devices.
  """

  def __init__(
    self, batches: Iterator[Keyed], place: Callable[[types.Batch], types.Batch]
  ):
    self._batches, self._place = batches, place
    self._ready, self._ended = queue.Queue(_AHEAD), threading.Event()
    self._thread = threading.Thread(target=self._run, daemon=True)

  def __enter__(self) -> "Feed":
    self._thread.start()
    return self

  def __exit__(self, *_):
    self._ended.set()
    # At an interpreter's end, a thread that is in the runtime brings it down.
    self._thread.join(_PATIENCE)

  def __iter__(self) -> "Feed":
    return self

  def __next__(self) -> Keyed:
    """Wait for the next batch."""
    found = self._ready.get()
    if isinstance(found, BaseException):
      raise found
    return found

  def ready(self) -> bool:
    """Tell whether the next batch needs no waiting for."""
    return not self._ready.empty()

  def _run(self) -> None:
    try:
      for batch, keys in self._batches:
        if not self._put((self._place(batch), keys)):
          return
      self._put(StopIteration())
    except BaseException as error:  # is raised by `__next__`
      self._put(error)

  def _put(self, found: Any) -> bool:
    """Hand something over, unless all has ended."""
    while not self._ended.is_set():
      try:
        self._ready.put(found, timeout=_POLL)
        return True
      except queue.Full:
        continue
    return False
