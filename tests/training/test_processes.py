"""Processes that hold different things do not train together."""

import jax
import numpy as np
import pytest

from vdit_jax.training import processes

HELD = {"records": "48", "code": "1", "config.seed": "0"}


def test_what_differs_is_named_with_its_processes():
  other = HELD | {"records": "16"}
  assert processes.differences([HELD, HELD]) == []
  assert processes.differences([HELD, other, HELD]) == [
    "records: '48' on processes 0, 2, '16' on process 1"
  ]
  del other["code"]
  lines = processes.differences([other, HELD])
  assert lines == [
    "code: 'nothing' on process 0, '1' on process 1",
    "records: '16' on process 0, '48' on process 1",
  ]


def _gathering(monkeypatch, texts):
  """Let other processes' texts come with what this one gives."""
  from vdit_jax.training.processes import multihost_utils

  def gather(mine):
    mine = np.asarray(mine)
    if mine.ndim == 0:
      return np.array([int(mine), *map(len, texts)])
    longest = len(mine)
    rows = [np.frombuffer(t.encode(), np.uint8) for t in texts]
    return np.stack([mine, *[np.pad(r, (0, longest - len(r))) for r in rows]])

  monkeypatch.setattr(jax, "process_count", lambda: 1 + len(texts))
  monkeypatch.setattr(multihost_utils, "process_allgather", gather)


def test_all_are_asked_and_texts_may_be_of_any_length(monkeypatch):
  _gathering(monkeypatch, ['{"records": "4", "code": "1"}'])
  with pytest.raises(ValueError) as error:
    processes.check_same({"records": "48", "code": "1"})
  message = str(error.value)
  assert "records: '48' on process 0, '4' on process 1" in message
  assert "code" not in message.splitlines()[1]
  assert "the same command, code and data" in message
  _gathering(monkeypatch, ['{"records": "48"}', '{"records": "48"}'])
  processes.check_same({"records": "48"})


def test_a_process_alone_holds_what_it_holds():
  processes.check_same(HELD)


def test_the_code_is_named_by_its_content():
  assert processes.code() == processes.code()
  assert f"jax {jax.__version__}" in processes.code()
