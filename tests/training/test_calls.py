"""Several steps a call are the steps that each call alone makes."""

import jax
import numpy as np
import pytest

from vdit_jax import types
from vdit_jax.training import calls, journal


def _batch(i, B=4):
  return types.Batch(
    video=None,
    captions={
      "text_encoder": types.Captions(
        mask=np.ones((B, 2), bool), tokens=np.full((B, 2), i, np.int32)
      )
    },
    weight=np.ones(B, np.float32),
  )


def test_batches_are_stacked_in_order_with_their_keys():
  pairs = [(_batch(i), [f"record {i}"]) for i in range(6)]
  found = list(calls.stack(iter(pairs), 3))
  assert [keys for _, keys in found] == [
    [["record 0"], ["record 1"], ["record 2"]],
    [["record 3"], ["record 4"], ["record 5"]],
  ]
  tokens = found[1][0].captions["text_encoder"].tokens
  assert tokens.shape == (3, 4, 2)
  np.testing.assert_array_equal(tokens[:, 0, 0], [3, 4, 5])
  assert list(calls.stack(iter(pairs), 1)) == pairs


def test_rows_are_those_of_each_step():
  metrics = {"loss": np.array([1.0, 2.0], np.float32)}
  assert list(calls.rows(metrics, [["a"], ["b"]], 2)) == [
    ({"loss": 1.0}, ["a"]),
    ({"loss": 2.0}, ["b"]),
  ]


def test_work_is_that_of_one_step():
  one = lambda batch: journal.Work(*batch.weight.shape, 7)
  stacked = jax.tree.map(lambda x: np.stack([x, x]), _batch(0))
  assert calls.work(one, 2)(stacked) == one(_batch(0))


@pytest.mark.parametrize(
  "n, intervals, traced, message",
  [
    (0, {}, range(0), "at least 1"),
    (4, {"log_every": 6}, range(0), "log_every 6; try steps_a_call=2"),
    (4, {"a": 8, "b": 10, "c": 3}, range(0), "b 10, c 3; try steps_a_call=1"),
    (4, {"a": 8}, range(10, 13), "profile.steps' first 9"),
    (4, {"a": 8}, range(9, 12), "profile.steps' end 11"),
  ],
)
def test_what_does_not_divide_is_refused(n, intervals, traced, message):
  with pytest.raises(ValueError, match=message):
    calls.check(n, intervals, traced)


def test_what_divides_is_not_refused():
  calls.check(4, {"a": 8, "b": 0}, range(9, 13))
  calls.check_step(4, 8)
  calls.check_shapes(4, 1)
  calls.check_shapes(1, 3)


def test_a_step_inside_of_a_call_and_buckets_are_refused():
  with pytest.raises(ValueError, match="step 6, .* try steps_a_call=2"):
    calls.check_step(4, 6)
  with pytest.raises(ValueError, match="3 buckets; set steps_a_call=1"):
    calls.check_shapes(4, 3)
