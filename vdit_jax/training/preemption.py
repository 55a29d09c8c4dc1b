"""Notice that the machine is wanted back, so that the run saves and leaves.

SIGTERM is the notice: Compute Engine, Kubernetes and Slurm send it before
they take a machine. With several processes JAX passes on what one of them
got, and all agree on the step after which they leave.
"""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator

import jax
from absl import logging
from jax.experimental import multihost_utils


class Preempted(Exception):  # noqa: N818
  """The run was asked to leave; its state of `step` is saved."""

  def __init__(self, step: int):
    super().__init__(f"asked to leave: saved step {step}")
    self.step = step


@contextlib.contextmanager
def notice() -> Iterator[Callable[[int], bool]]:
  """Yield `asked(step)`: whether to leave after this step.

  It must be called for every step, of all processes. A second SIGTERM ends a
  process that is alone as if there were no notice.
  """
  if jax.distributed.is_initialized():
    yield multihost_utils.reached_preemption_sync_point
    return
  asked = threading.Event()
  with _on_sigterm(asked):
    yield lambda step: asked.is_set()


@contextlib.contextmanager
def _on_sigterm(event: threading.Event) -> Iterator[None]:
  """Set an event at SIGTERM; only the main thread can be asked."""
  if threading.current_thread() is not threading.main_thread():
    yield
    return

  def handle(*_):
    signal.signal(signal.SIGTERM, before)
    event.set()
    logging.warning("SIGTERM: saving after this step, then leaving")

  before = signal.getsignal(signal.SIGTERM) or signal.SIG_DFL
  signal.signal(signal.SIGTERM, handle)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)
