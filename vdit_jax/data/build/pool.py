"""Calls a function in processes that may die of what they are given."""

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from typing import Any

_AHEAD = 4  # calls that wait for each process


def each(
  function: Callable[[Any], Any], items: Iterable[Any], workers: int
) -> Iterator[tuple[Any, Any]]:
  """Call a function with each item, and yield both as they come.

  Args:
    function: of a module, so that it can be found in another process.
    items: taken as they are needed.
    workers: processes; 0 calls the function in this one.

  Returns:
    Pairs of an item and its result; None where the process died of it. An
    exception that a call raises is raised here.
  """
  if not workers:
    yield from ((item, function(item)) for item in items)
    return
  items = iter(items)
  while suspects := (yield from _run(function, items, workers)):
    for item in suspects:  # one of them killed its process: which, alone?
      killers = yield from _run(function, iter([item]), 1)
      yield from ((killer, None) for killer in killers)


def _run(
  function: Callable[[Any], Any], items: Iterator[Any], workers: int
) -> Generator[tuple[Any, Any], None, list[Any]]:
  """Yield results until a process dies; return the items that it had then."""
  waiting: dict[int, tuple[Any, concurrent.futures.Future | None]] = {}
  # Forked, a process could inherit a lock that a thread of this one holds.
  context = multiprocessing.get_context("spawn")
  with concurrent.futures.ProcessPoolExecutor(
    workers, context, initializer=_follow_parent
  ) as pool:
    try:
      for number, item in enumerate(items):
        waiting[number] = item, None
        waiting[number] = item, pool.submit(function, item)
        if len(waiting) == workers * _AHEAD:
          yield from _finished(waiting)
      while waiting:
        yield from _finished(waiting)
    except concurrent.futures.process.BrokenProcessPool:
      return [item for item, _ in waiting.values()]
    finally:
      pool.shutdown(wait=False, cancel_futures=True)
  return []


def _finished(waiting) -> Iterator[tuple[Any, Any]]:
  """Wait for a result; take those there are out of what waits."""
  futures = [future for _, future in waiting.values()]
  first = concurrent.futures.FIRST_COMPLETED
  concurrent.futures.wait(futures, return_when=first)
  for number, (item, future) in list(waiting.items()):
    if future.done():
      result = future.result()
      del waiting[number]
      yield item, result


def _follow_parent() -> None:
  """End this process when its parent is killed, which tells it nothing."""
  parent = multiprocessing.parent_process()

  def follow():
    parent.join()
    os._exit(1)

  threading.Thread(target=follow, daemon=True).start()
