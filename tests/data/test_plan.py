import numpy as np
import pytest

from vdit_jax.data import plan


@pytest.mark.parametrize("num_records, batch_size", [(10, 4), (7, 7), (3, 8)])
def test_every_epoch_shows_each_record_once(num_records, batch_size):
  steps = range(5 * num_records)
  shown = np.concatenate(
    [plan.batch_indices(0, step, num_records, batch_size) for step in steps]
  )
  epochs = shown.reshape(-1, num_records)  # batches run on with no gap
  for epoch in epochs:
    assert sorted(epoch) == list(range(num_records))


def test_epochs_and_seeds_have_orders_of_their_own():
  orders = {
    tuple(plan.batch_indices(seed, step, 100, 100))
    for seed in range(3)
    for step in range(3)
  }
  assert len(orders) == 9


@pytest.mark.parametrize("num_hosts", [1, 2, 3, 6])
def test_hosts_share_the_global_batch(num_hosts):
  whole = plan.batch_indices(1, 5, 50, 12)
  shares = [plan.host_slice(whole, h, num_hosts) for h in range(num_hosts)]
  assert {len(share) for share in shares} == {12 // num_hosts}
  np.testing.assert_array_equal(np.concatenate(shares), whole)


def test_a_step_does_not_depend_on_those_before():
  unbroken = [plan.batch_indices(2, step, 9, 4) for step in range(8)]
  plan._permutation.cache_clear()
  for step in reversed(range(8)):
    np.testing.assert_array_equal(
      plan.batch_indices(2, step, 9, 4), unbroken[step]
    )


def test_sizes_that_do_not_divide_are_refused():
  with pytest.raises(ValueError, match="batch_size=10 .* num_hosts=4; try 12"):
    plan.host_slice(np.arange(10), 0, 4)
  with pytest.raises(ValueError, match="host must be 0..3"):
    plan.host_slice(np.arange(8), 4, 4)
  with pytest.raises(ValueError, match="num_records must be at least 1"):
    plan.batch_indices(0, 0, 0, 4)
  with pytest.raises(ValueError, match="step must be at least 0, got -1"):
    plan.batch_indices(0, -1, 8, 4)


def test_record_seeds_are_repeatable_and_distinct():
  def draw(*place):
    return np.random.default_rng(plan.record_seed(*place)).random()

  assert draw(0, 3, 1) == draw(0, 3, 1)
  places = [(s, t, p) for s in range(3) for t in range(3) for p in range(3)]
  assert len({draw(*place) for place in places}) == len(places)
