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
  plan._orders.cache_clear()
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


def buckets(*sizes, seed=0):
  """Plans buckets of (records, batch size), their positions apart."""
  starts = np.cumsum([0] + [records for records, _ in sizes[:-1]])
  return plan.Plan(
    seed,
    tuple(
      plan.Bucket((n, 4, 4), np.arange(start, start + records), batch_size)
      for n, (start, (records, batch_size)) in enumerate(
        zip(starts, sizes, strict=True)
      )
    ),
  )


SIZES = (37, 4), (5, 5), (90, 16), (11, 2)


def test_one_shape_has_the_batches_of_all_records():
  planned = plan.of_one_shape(3, 10, 4, (9, 32, 32))
  for step in (0, 1, 2, 7, 1000):
    shape, positions = plan.batch(planned, step)
    assert shape == (9, 32, 32)
    wanted = plan.batch_indices(3, step, 10, 4)
    np.testing.assert_array_equal(positions, wanted)
  # As resumed runs had it before there were buckets.
  assert plan.batch_indices(3, 2, 10, 4).tolist() == [0, 7, 6, 5]


def test_every_bucket_is_an_even_part_of_every_epoch():
  planned = buckets(*SIZES)
  epochs = 12
  steps = sum(epochs * n // size for n, size in SIZES)
  shown = np.zeros(sum(n for n, _ in SIZES), int)
  numbers = []
  for step in range(steps):
    number, earlier = plan.choose(planned, step)
    assert earlier == numbers.count(number)
    numbers.append(number)
    shape, positions = plan.batch(planned, step)
    assert shape == planned.buckets[number].shape
    assert len(positions) == planned.buckets[number].batch_size
    shown[positions] += 1
  counts = np.bincount(numbers).tolist()
  assert counts == [epochs * n // size for n, size in SIZES]
  # All records the same number of times, but for the last part of a batch.
  assert shown.max() == epochs and shown.min() >= epochs - 1
  assert np.sum(epochs - shown) < sum(size for _, size in SIZES)
  assert numbers[:30] != sorted(numbers[:30])


def test_a_bucket_shows_each_record_once_an_epoch():
  planned = buckets(*SIZES)
  found = {i: [] for i in range(len(SIZES))}
  for step in range(200):
    number, _ = plan.choose(planned, step)
    found[number] += plan.batch(planned, step)[1].tolist()
  for number, shown in found.items():
    records = planned.buckets[number].positions
    for start in range(0, len(shown) - len(records) + 1, len(records)):
      assert sorted(shown[start : start + len(records)]) == records.tolist()


def test_buckets_do_not_depend_on_the_steps_before():
  planned = buckets(*SIZES)
  steps = [*range(60), 10**6, 10**9]
  forwards = [plan.batch(planned, step)[1] for step in steps]
  plan._turns.cache_clear()
  plan._orders.cache_clear()
  for step, want in reversed(list(zip(steps, forwards, strict=True))):
    np.testing.assert_array_equal(plan.batch(planned, step)[1], want)


def test_seeds_and_buckets_have_orders_of_their_own():
  first, second = (buckets(*SIZES, seed=seed) for seed in (0, 1))
  orders = [
    [plan.choose(planned, step)[0] for step in range(40)]
    for planned in (first, second)
  ]
  assert orders[0] != orders[1]
  even = buckets((64, 4), (64, 4))
  numbers = [plan.choose(even, step)[0] for step in range(64)]
  assert numbers[:32] != numbers[32:]  # two epochs
  twins = buckets((16, 16), (16, 16))
  first = {plan.choose(twins, step)[0]: step for step in (1, 0)}
  a, b = (plan.batch(twins, step)[1] % 16 for step in first.values())
  assert a.tolist() != b.tolist()


def test_an_empty_bucket_is_refused():
  with pytest.raises(ValueError, match="num_records must be at least 1"):
    buckets((0, 4))
