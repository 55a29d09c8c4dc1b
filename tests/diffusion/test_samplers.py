"""Laws of the samplers, on a Gaussian whose score and ODE are known.

For data N(mu, s^2) the level (alpha, sigma) has the marginal
N(alpha mu, alpha^2 s^2 + sigma^2), the prediction E[x0 | x_t] is linear, and
the probability-flow ODE keeps the standardised x_t: from z deviations off the
mean it ends z deviations off the data's mean.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax.diffusion import samplers, schedules

MU, STD = 1.5, 0.5
ALL = (
  *(samplers.euler, samplers.heun, samplers.ddim),
  *(samplers.dpmpp_2m, samplers.unipc),
)
FLOW = schedules.Schedule()
COSINE = schedules.Schedule("cosine", zero_terminal_snr=True)
SCHEDULES = (FLOW, COSINE, schedules.Schedule("scaled_linear"))


def label(value):
  return getattr(value, "kind", None) or getattr(value, "__name__", None)


def rows(table, start, stop):
  """Return the piece of a table whose steps are start..stop-1."""
  return jax.tree.map(lambda v: v[start : stop + 1], table)


def spread(row):
  return jnp.sqrt((row.alpha * STD) ** 2 + row.sigma**2)


def denoise(x, row):
  gain = row.alpha * STD**2 / spread(row) ** 2
  return MU + gain * (x - row.alpha * MU)


def start_of(table, z):
  first = jax.tree.map(lambda v: v[0], table)
  return first.alpha * MU + spread(first) * z


def errors(sampler, schedule, counts, eighths):
  """Return the largest error of the ODE's end for each count of steps.

  Of the run only the steps between two eighths of it are taken.
  """
  z = jnp.linspace(-2.0, 2.0, 9, dtype=float)
  result = []
  for steps in counts:
    start, stop = (steps * e // 8 for e in eighths)
    table = rows(schedules.sampling_table(schedule, steps), start, stop)
    last = jax.tree.map(lambda v: v[-1], table)
    got = sampler(denoise, start_of(table, z), table)
    want = last.alpha * MU + spread(last) * z
    result.append(float(jnp.abs(got - want).max()))
  return np.array(result)


# A VP schedule in equal steps of t has sigma^2 ~ t at its data end, where its
# last step is first order under any sampler; so its run stops short of it.
# The order of DPM-Solver++ is that of a finite log-SNR: neither end is in it.
@pytest.mark.parametrize(
  "sampler, order, schedule, eighths",
  (
    (samplers.euler, 1, FLOW, (0, 8)),
    (samplers.euler, 1, COSINE, (0, 8)),
    (samplers.ddim, 1, FLOW, (0, 8)),
    (samplers.ddim, 1, COSINE, (0, 8)),
    (samplers.heun, 2, FLOW, (0, 8)),
    (samplers.heun, 2, COSINE, (0, 7)),
    (samplers.dpmpp_2m, 2, FLOW, (1, 6)),
    (samplers.dpmpp_2m, 2, COSINE, (1, 6)),
  ),
  ids=label,
)
def test_order_of_convergence(sampler, order, schedule, eighths):
  counts = (32, 64, 128, 256)
  with jax.enable_x64(True):
    error = errors(sampler, schedule, counts, eighths)
  slope = -np.polyfit(np.log(counts), np.log(error), 1)[0]
  assert abs(slope - order) < 0.15, (slope, error)


@pytest.mark.parametrize("schedule", (FLOW, COSINE), ids=label)
@pytest.mark.parametrize(
  "sampler", (samplers.heun, samplers.dpmpp_2m, samplers.unipc), ids=label
)
def test_second_order_pays_from_pure_noise_to_data(sampler, schedule):
  (error,) = errors(sampler, schedule, (128,), (0, 8))
  (first_order,) = errors(samplers.euler, schedule, (128,), (0, 8))
  assert error < first_order / 10


@pytest.mark.parametrize("schedule", SCHEDULES, ids=label)
@pytest.mark.parametrize("sampler", (samplers.euler, samplers.ddim), ids=label)
def test_pieces_of_a_run_compose(sampler, schedule):
  table = schedules.sampling_table(schedule, 9)
  x = jax.random.normal(jax.random.key(0), (4, 3))
  whole = sampler(denoise, x, table)
  x = sampler(denoise, x, rows(table, 0, 4))
  np.testing.assert_allclose(
    sampler(denoise, x, rows(table, 4, 9)), whole, rtol=1e-5, atol=1e-6
  )


@pytest.mark.parametrize("schedule", SCHEDULES, ids=label)
@pytest.mark.parametrize("sampler", ALL, ids=label)
def test_every_sampler_reaches_the_data_on_every_schedule(sampler, schedule):
  z = jnp.linspace(-2.0, 2.0, 9)
  table = schedules.sampling_table(schedule, 250)
  got = sampler(denoise, start_of(table, z), table)
  assert got.dtype == jnp.float32
  np.testing.assert_allclose(got, MU + STD * z, atol=0.03)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=label)
@pytest.mark.parametrize("steps", (1, 2))
@pytest.mark.parametrize("sampler", ALL, ids=label)
def test_few_steps_are_finite(sampler, steps, schedule):
  table = schedules.sampling_table(schedule, steps)
  got = sampler(denoise, start_of(table, jnp.ones(3)), table)
  assert np.all(np.isfinite(got))
  if steps == 1:
    first = jax.tree.map(lambda v: v[0], table)
    want = denoise(start_of(table, jnp.ones(3)), first)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=label)
def test_ddim_is_euler_on_the_straight_path(schedule):
  table = schedules.sampling_table(schedule, 12, shift=2.0)
  x = jax.random.normal(jax.random.key(0), (2, 3, 2, 2, 4))

  def bent(x, row):
    return jnp.sin(3 * x) + row.t

  ddim = samplers.ddim(bent, x, table)
  euler = samplers.euler(bent, x, table)
  tolerance = 1e-6 if schedule is FLOW else 1e-5
  worst = float(jnp.abs(ddim - euler).max() / jnp.abs(euler).max())
  assert worst < tolerance


def test_euler_on_flow_is_the_plain_loop():
  table = schedules.sampling_table(FLOW, 8)
  x = want = jax.random.normal(jax.random.key(0), (4, 3))
  for i in range(8):
    row = jax.tree.map(lambda v, i=i: v[i], table)
    velocity = (want - denoise(want, row)) / row.t
    want = want + (table.t[i + 1] - table.t[i]) * velocity
  got = samplers.euler(denoise, x, table)
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_ancestral_ddim_keeps_the_marginal_and_follows_its_key():
  z = jax.random.normal(jax.random.key(0), (20_000,))
  for schedule in SCHEDULES:
    table = schedules.sampling_table(schedule, 250)
    x = start_of(table, z)
    run = jax.jit(
      lambda key, x=x, table=table: samplers.ddim(denoise, x, table, key, 1.0)
    )
    one, same, other = map(run, map(jax.random.key, (1, 1, 2)))
    np.testing.assert_array_equal(one, same)
    # Fresh noise forgets the start: two keys end as far apart as two samples.
    assert abs(float(jnp.std(one - other)) / (2**0.5 * STD) - 1) < 0.1
    np.testing.assert_allclose(one.mean(), MU, atol=0.02)
    np.testing.assert_allclose(one.std(), STD, rtol=0.05)


def test_a_constant_denoiser_is_reached_exactly():
  x = jax.random.normal(jax.random.key(0), (2, 3, 2, 2, 4))
  want = jax.random.normal(jax.random.key(1), x.shape)
  for schedule in SCHEDULES:
    table = schedules.sampling_table(schedule, 6, t_start=0.7)
    for sampler in ALL:
      got = sampler(lambda x, row: want, x, table)
      np.testing.assert_allclose(got, want, atol=2e-6)


@pytest.mark.parametrize("sampler", ALL, ids=label)
def test_the_network_is_traced_once_for_all_steps(sampler):
  traces, calls = [], []

  def network(x, row):
    traces.append(row.t.shape)
    jax.debug.callback(calls.append, row.t, ordered=True)
    return denoise(x, row)

  table = schedules.sampling_table(FLOW, 20)
  # jit: a scan run outside of it may trace its body again to find its types.
  jax.jit(lambda x: sampler(network, x, table))(jnp.ones(3))
  jax.effects_barrier()
  assert traces == [()]
  assert len(calls) == (39 if sampler is samplers.heun else 20)


@pytest.mark.parametrize("sampler", ALL, ids=label)
def test_the_state_is_float32_under_a_bfloat16_network(sampler):
  seen = set()

  def network(x, row):
    seen.add(x.dtype)
    return denoise(x, row).astype(jnp.bfloat16)

  table = schedules.sampling_table(FLOW, 4)
  got = sampler(network, jnp.ones(3, jnp.bfloat16), table)
  assert seen == {got.dtype} == {jnp.dtype("float32")}


def test_names_find_their_samplers_and_others_are_refused():
  assert [samplers.get(f.__name__) for f in ALL] == list(ALL)
  with pytest.raises(ValueError, match="dpmpp_2m"):
    samplers.get("plms")
  table = schedules.sampling_table(FLOW, 2)
  with pytest.raises(ValueError, match="key"):
    samplers.ddim(denoise, jnp.ones(3), table, eta=1.0)
  with pytest.raises(ValueError, match="eta"):
    samplers.ddim(denoise, jnp.ones(3), table, eta=-1.0)


@pytest.mark.parametrize("sampler", ALL, ids=label)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=label)
def test_traced_states_lie_on_the_way(sampler, schedule):
  """Where the prediction never changes every step is exact."""
  table = schedules.sampling_table(schedule, 5)
  x0, eps = jax.random.normal(jax.random.key(0), (2, 4, 3))
  way = [
    a * x0 + s * eps for a, s in zip(table.alpha, table.sigma, strict=True)
  ]
  got, states = sampler(lambda x, row: x0, way[0], table, trace=True)
  np.testing.assert_allclose(states, np.stack(way[1:]), atol=1e-5)
  np.testing.assert_array_equal(states[-1], got)
  np.testing.assert_array_equal(got, sampler(lambda x, row: x0, way[0], table))


@pytest.mark.parametrize("sampler", (*ALL, samplers.dpmpp_2m_sde), ids=label)
def test_a_run_in_pieces_is_the_run(sampler):
  table, key = schedules.sampling_table(COSINE, 9), jax.random.key(3)
  x = jax.random.normal(jax.random.key(0), (4, 3))
  whole, carry = sampler(denoise, x, table, key), None
  for start, stop in ((0, 2), (2, 6), (6, 9)):
    piece = samplers.Piece(start, stop, carry)
    carry = sampler(denoise, x, table, key, piece=piece)
  np.testing.assert_allclose(carry, whole, rtol=1e-5, atol=1e-6)


def test_a_clip_with_its_own_key_does_not_depend_on_the_others():
  table = schedules.sampling_table(COSINE, 4)
  x, keys = jnp.ones((3, 5)), jax.random.split(jax.random.key(0), 3)
  whole, states = samplers.dpmpp_2m_sde(denoise, x, table, keys, trace=True)
  np.testing.assert_array_equal(states[-1], whole)
  for i in range(3):
    part = slice(i, i + 1)
    alone = samplers.dpmpp_2m_sde(denoise, x[part], table, keys[part])
    np.testing.assert_allclose(alone, whole[part], rtol=1e-5)
  assert np.abs(whole[0] - whole[1]).max() > 0.1
