"""A feed gives the same batches ahead of time, errors in their places."""

import threading
import time

import pytest

from vdit_jax.training import feed


def _items(number, seen=None):
  for i in range(number):
    if seen is not None:
      seen.append(i)
    yield i, [f"record {i}"]


def test_batches_come_in_order_and_placed_elsewhere():
  threads = set()

  def place(batch):
    threads.add(threading.current_thread())
    return 10 * batch

  with feed.Feed(_items(20), place) as fed:
    found = list(fed)
  assert found == [(10 * i, [f"record {i}"]) for i in range(20)]
  assert len(threads) == 1 and threading.current_thread() not in threads


def _until(condition):
  deadline = time.monotonic() + 10
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.001)


def test_a_few_are_ready_ahead_and_no_more():
  seen = []
  with feed.Feed(_items(20, seen), lambda batch: batch) as fed:
    _until(fed.ready)
    time.sleep(0.05)
    assert len(seen) == 2  # one waits, one is held
    assert next(fed)[0] == 0
    _until(lambda: len(seen) == 3)
  time.sleep(0.2)
  assert len(seen) <= 4  # and the thread has ended


def test_what_reading_raises_is_raised_in_its_place():
  def items():
    yield from _items(3)
    raise RuntimeError("the disk is gone")

  with feed.Feed(items(), lambda batch: batch) as fed:
    assert [next(fed)[0] for _ in range(3)] == [0, 1, 2]
    with pytest.raises(RuntimeError, match="the disk is gone"):
      next(fed)


def test_a_reader_without_end_does_not_keep_the_run(monkeypatch):
  monkeypatch.setattr(feed, "_PATIENCE", 0.1)
  hold = threading.Event()

  def items():
    yield from _items(1)
    hold.wait()

  start = time.monotonic()
  with feed.Feed(items(), lambda batch: batch) as fed:
    next(fed)
    assert not fed.ready()
  assert time.monotonic() - start < 5
  hold.set()
