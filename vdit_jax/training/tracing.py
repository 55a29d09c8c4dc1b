"""An xprof trace of some steps of a run, for TensorBoard's profile tab."""

import contextlib
import pathlib
import re
import tempfile
from collections.abc import Callable

import jax
from absl import logging
from etils import epath

from vdit_jax import writing


def parse(text: str) -> range:
  """Read "10:13": steps 10, 11 and 12, counted from 1; "" is none."""
  if not text:
    return range(0)
  found = re.fullmatch(r"(\d+):(\d+)", text)
  steps = range(*map(int, found.groups())) if found else range(0)
  if not steps or steps.start < 1:
    raise ValueError(
      "profile.steps must be FIRST:END with 1 <= FIRST < END, END itself left "
      f"out, got {text!r}; try 10:13 for steps 10, 11 and 12"
    )
  return steps


class Tracer:
  """Traces steps into a folder; process 0 alone.

  Args:
    steps: which, see `parse`.
    folder: of the traces, local or gs://.
  """

  def __init__(self, steps: range, folder: epath.PathLike = ""):
    self._steps, self._folder = steps, epath.Path(folder)
    self._stack = contextlib.ExitStack()

  def __enter__(self) -> "Tracer":
    return self

  def __exit__(self, *_):
    self._stack.close()

  def at(self, step: int, settle: Callable[[], None]) -> None:
    """Begin or end the trace, if it is time.

    Args:
      step: the next one.
      settle: completes the steps before, so that the trace has none of them.
    """
    if not self._steps or jax.process_index() > 0:
      return
    if step == self._steps.start:
      settle()
      self._stack.enter_context(_trace(self._folder))
    elif step == self._steps.stop:
      settle()
      self._stack.close()


@contextlib.contextmanager
def _trace(folder: epath.Path):
  """Write a trace; the profiler knows local files only."""
  remote = writing.is_remote(folder)
  with tempfile.TemporaryDirectory() as temporary:
    local = pathlib.Path(temporary if remote else folder)
    jax.profiler.start_trace(local)
    try:
      yield
    finally:
      jax.profiler.stop_trace()
    if remote:
      for path in local.rglob("*"):
        if path.is_file():
          target = folder / path.relative_to(local)
          writing.write(target, path.read_bytes())
    logging.info("trace: %s", folder)
