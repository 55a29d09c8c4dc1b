import os
import signal
import subprocess
import sys
import time

import pytest

from vdit_jax.data.build import pool


def square(x):
  if x in (7, 8):
    os._exit(3)  # as a decoder that crashes
  if x < 0:
    raise ValueError("below 0")
  return x * x


def test_process_that_dies_costs_its_own_item_alone():
  found = dict(pool.each(square, range(20), 2))
  assert found == {x: None if x in (7, 8) else x * x for x in range(20)}


@pytest.mark.parametrize("workers", [0, 1])
def test_exceptions_are_raised_here(workers):
  with pytest.raises(ValueError, match="below 0"):
    list(pool.each(square, [1, -1, 2], workers))
  assert list(pool.each(square, [], workers)) == []


_PARENT = """
from vdit_jax.data.build import pool
from tests.data.build import test_pool
if __name__ == "__main__":
  list(pool.each(test_pool.say_and_wait, range(2), 2))
"""


def say_and_wait(_):
  print(os.getpid(), flush=True)
  time.sleep(600)


def test_processes_end_with_a_parent_that_is_killed(tmp_path):
  script = tmp_path / "parent.py"
  script.write_text(_PARENT)
  path = {"PYTHONPATH": os.pathsep.join(sys.path + [os.getcwd()])}
  parent = subprocess.Popen(
    [sys.executable, script], stdout=subprocess.PIPE, env=os.environ | path
  )
  children = [int(parent.stdout.readline()) for _ in range(2)]
  parent.kill()
  assert parent.wait() == -signal.SIGKILL
  # They hold the other end of this pipe: it ends when they do.
  assert parent.stdout.read() == b""
  assert not any(os.path.exists(f"/proc/{pid}/exe") for pid in children)
