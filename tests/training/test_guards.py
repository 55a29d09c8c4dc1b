"""What is not finite is told with its step and records; a long step too."""

import math
import time

import pytest
from absl import logging

from vdit_jax.training import guards


@pytest.fixture
def warnings(monkeypatch):
  found = []
  monkeypatch.setattr(
    logging, "warning", lambda text, *args: found.append(text % args)
  )
  return found


def test_what_is_not_finite_stops_with_step_metric_and_records():
  sentry = guards.Sentry(guards.Guard())
  sentry.check(1, {"loss": 1.0, "kl": 2.0}, ["a", "b"])
  with pytest.raises(FloatingPointError) as error:
    sentry.check(7, {"loss": 1.0, "kl": math.inf}, ["a", "b"])
  assert "step 7: kl is inf in the batch of records ['a', 'b']" in str(
    error.value
  )


def test_skipped_steps_are_reported_until_there_are_too_many(warnings):
  sentry = guards.Sentry(guards.Guard("skip", max_skipped=2))
  bad = {"loss": math.nan, "skipped": 1.0}
  for step, row in enumerate([bad, bad, {"loss": 1.0, "skipped": 0.0}, bad]):
    sentry.check(step, row, ["a"])
  assert sentry.skipped == 3
  assert "skipped step 3: loss is nan in the batch of records" in warnings[-1]
  sentry.check(4, bad, ["a"])
  with pytest.raises(FloatingPointError, match="step 5: .*3 steps in a row"):
    sentry.check(5, bad, ["a"])


@pytest.mark.parametrize(
  "fields", [{"nonfinite": "ignore"}, {"max_skipped": 0}]
)
def test_a_guard_that_cannot_be_is_refused(fields):
  with pytest.raises(ValueError, match=f"guard.{next(iter(fields))}"):
    guards.Guard(**fields)


def _watchdog():
  watchdog = guards.Watchdog(times=5, least=0.1, poll=0.01)
  for step in range(1, 9):
    watchdog.landed(step)
  return watchdog


def test_a_step_without_end_is_reported_but_not_often(warnings):
  with _watchdog() as watchdog, watchdog.waiting_for("its batch"):
    time.sleep(0.6)
  assert 2 <= len(warnings) <= 3  # at 0.1 s, 0.2 s and 0.4 s
  assert "step 9 has taken 0.1 s so far, waiting for its batch" in warnings[0]


def test_a_long_step_is_reported_when_it_is_complete(warnings):
  watchdog = _watchdog()
  time.sleep(0.15)
  watchdog.landed(9)
  watchdog.landed(10)
  assert len(warnings) == 1 and warnings[0].startswith("step 9 took 0.")


def test_pauses_and_the_first_steps_are_not_watched(warnings):
  with _watchdog() as watchdog:
    with watchdog.paused():
      time.sleep(0.3)
    watchdog.landed(9)
  with guards.Watchdog(times=5, least=0.1, poll=0.01) as watchdog:
    time.sleep(0.3)
    watchdog.landed(1)
  assert warnings == []
