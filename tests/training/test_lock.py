"""One run a workdir, and a lock that nobody leaves behind."""

import os
import signal
import subprocess
import sys
import time

import jax
import pytest

from vdit_jax.training import lock


def test_a_second_run_is_told_who_has_the_workdir(tmp_path):
  with lock.held(tmp_path / "run"):
    with (
      pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on "),
      lock.held(tmp_path / "run"),
    ):
      pass
    assert [p.name for p in (tmp_path / "run").iterdir()] == [lock.FILE]
  with lock.held(tmp_path / "run"):
    pass


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path):
  with (
    pytest.raises(KeyError),
    lock.held(tmp_path / "a" / "b" / "run"),
  ):
    raise KeyError("x")
  assert not list(tmp_path.iterdir())
  with lock.held(tmp_path / "a" / "b"):
    (tmp_path / "a" / "b" / "config.json").touch()
  assert [p.name for p in (tmp_path / "a" / "b").iterdir()] == ["config.json"]


_HOLD = """
import contextlib, sys, time
from vdit_jax import writing
with writing.locked(sys.argv[1]):
  print("held", flush=True)
  time.sleep(60)
"""


def test_a_killed_run_leaves_no_lock(tmp_path):
  (tmp_path / lock.FILE).write_text("process 1 on elsewhere")
  command = [sys.executable, "-c", _HOLD, str(tmp_path)]
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    assert process.stdout.readline() == "held\n"
    with (
      pytest.raises(ValueError, match="in use by process 1 on elsewhere; wait"),
      lock.held(tmp_path),
    ):
      pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    begun = time.monotonic()
    with lock.held(tmp_path):
      assert time.monotonic() - begun < 5


def test_what_cannot_be_a_workdir_is_refused(tmp_path):
  (tmp_path / "file").touch()
  for path in (tmp_path / "file", tmp_path / "file" / "run"):
    with pytest.raises(ValueError, match="workdir .*file"), lock.held(path):
      pass


def test_other_processes_of_a_run_do_not_ask(tmp_path, monkeypatch):
  monkeypatch.setattr(jax, "process_index", lambda: 1)
  with lock.held(tmp_path / "run") as held:
    held.claim()
    held.check()
  assert not (tmp_path / "run").exists()


def test_on_a_store_the_newest_run_has_the_workdir(bucket):
  with lock.held(bucket) as first:
    assert not (bucket / lock.FILE).exists()  # a start that fails takes nothing
    first.claim()
    first.check()
    with lock.held(bucket) as second:
      first.check()
      second.claim()
      with pytest.raises(ValueError, match="taken over by process .*, run "):
        first.check()
      second.check()
    assert not (bucket / lock.FILE).exists()
    with pytest.raises(ValueError, match="taken over by"):
      first.check()
