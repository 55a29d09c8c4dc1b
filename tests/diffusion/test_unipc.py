"""UniPC: its weights, its order, and whole runs beside diffusers' class."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax.convert import schedulers
from vdit_jax.diffusion import objectives, samplers, schedules, unipc

SHAPE = (2, 3, 4, 4, 2)  # B f h w c
CLASS = "UniPCMultistepScheduler"
FLOW = dict(use_flow_sigmas=True, prediction_type="flow_prediction")
V = dict(prediction_type="v_prediction")
BETAS = dict(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
RUNS = (
  FLOW,
  FLOW | dict(flow_shift=3.0),
  FLOW | dict(flow_shift=8.0, solver_order=3),
  FLOW | dict(flow_shift=5.0, solver_order=1),
  BETAS,
  BETAS | V | dict(solver_order=3, timestep_spacing="trailing"),
  BETAS | V | dict(rescale_betas_zero_snr=True),
  BETAS | dict(timestep_spacing="leading", steps_offset=1, solver_order=1),
  V | dict(final_sigmas_type="sigma_min", lower_order_final=False),
  dict(prediction_type="sample", beta_end=0.01, solver_order=3),
)
MU, STD = 1.5, 0.5  # of a Gaussian, whose x0 is linear


def network(xp, x, t):
  return xp.sin(2 * x + 0.5) * (0.5 + t) + 0.3 * xp.tanh(x)


def noise():
  return np.random.default_rng(0).standard_normal(SHAPE, np.float32)


def recipe(fields):
  config = {"_class_name": CLASS, **fields}
  return schedulers.recipe_fields(config, schedulers.UNIPC)


def table_of(found, steps):
  return schedules.sampling_table(
    schedules.Schedule(**found["schedule"]),
    steps,
    found.get("shift", 1.0),
    spacing=schedules.Spacing(**found["spacing"]),
  )


def released_run(fields, steps):
  """Run diffusers' loop; return its states [steps, ...] and its timesteps."""
  diffusers = pytest.importorskip("diffusers")
  torch = pytest.importorskip("torch")
  scheduler = getattr(diffusers, CLASS)(**fields)
  scheduler.set_timesteps(steps)
  x, states = torch.from_numpy(noise()), []
  for n in scheduler.timesteps:
    x = scheduler.step(network(torch, x, n / 1000), n, x, return_dict=False)[0]
    states.append(x.numpy())
  return np.stack(states), scheduler.timesteps.numpy()


@pytest.mark.parametrize(
  "fields, steps",
  [(f, n) for i, f in enumerate(RUNS) for n in ((4, 50), (7, 20))[i % 2]],
  ids=lambda x: "-".join(map(str, x)) if isinstance(x, dict) else str(x),
)
def test_trajectories_are_the_released_ones(fields, steps):
  want, timesteps = released_run(fields, steps)
  found = recipe(fields)
  table = table_of(found, steps)
  np.testing.assert_allclose(table.t[:-1] * 1000, timesteps, atol=1e-4)

  def denoise(x, row):
    output = network(jnp, x, row.t)
    to = found["objective"], output, x, row.alpha, row.sigma
    return objectives.to_x0(*to)

  assert found["sampler"] == "unipc"
  sampler = samplers.make("unipc", found["sampler_options"])
  run = jax.jit(lambda x: sampler(denoise, x, table, trace=True))
  got, states = run(jnp.asarray(noise()))
  np.testing.assert_array_equal(states[-1], got)
  for i, (a, b) in enumerate(zip(states, want, strict=True)):
    error = np.linalg.norm(a - b) / np.linalg.norm(b)
    assert error <= 2e-5, (i, error)


def spread(row):
  return jnp.sqrt((row.alpha * STD) ** 2 + row.sigma**2)


def denoise(x, row):
  gain = row.alpha * STD**2 / spread(row) ** 2
  return MU + gain * (x - row.alpha * MU)


# The last step of a run is not corrected; with `lower` its order is 1.
@pytest.mark.parametrize(
  "order, lower, wanted, kind",
  [
    (1, False, 2, "rectified_flow"),
    (2, False, 3, "rectified_flow"),
    (3, False, 4, "rectified_flow"),
    (3, False, 4, "cosine"),
    (3, True, 2, "rectified_flow"),
  ],
)
def test_order_of_convergence(order, lower, wanted, kind):
  schedule = schedules.Schedule(kind, zero_terminal_snr=kind == "cosine")
  counts, errors, z = (64, 256), [], jnp.linspace(-2.0, 2.0, 9)
  with jax.enable_x64(True):
    for steps in counts:
      table = schedules.sampling_table(schedule, steps)
      piece = slice(steps // 8, 6 * steps // 8 + 1)
      table = jax.tree.map(lambda v, p=piece: v[p].astype(float), table)
      first, last = (jax.tree.map(lambda v, i=i: v[i], table) for i in (0, -1))
      x = first.alpha * MU + spread(first) * z.astype(float)
      run = jax.jit(
        lambda x, t: samplers.unipc(denoise, x, t, None, order, lower)
      )
      want = last.alpha * MU + spread(last) * z
      errors.append(float(jnp.abs(run(x, table) - want).max()))
  slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
  assert -0.2 < slope - wanted < 0.5, (slope, errors)


@pytest.mark.parametrize("order", unipc.ORDERS)
def test_weights_add_up_and_are_exact_on_polynomials(order):
  """Of degree order - 1 in lambda, where nothing is simplified."""
  with jax.enable_x64(True):
    table = schedules.sampling_table(schedules.Schedule(), 12)
    table = jax.tree.map(lambda v: v[2:10].astype(float), table)
    found = unipc.steps(table, order, False)
    for weights in (found.predictor, found.corrector[1:]):
      np.testing.assert_allclose(weights.sum(1), 1, atol=1e-12)
    lam = np.log(table.alpha / table.sigma)
    for weights, shift, degree in (
      (found.predictor, 0, order - 1 if order != 2 else 0),
      (found.corrector, 1, order if order > 1 else 0),
    ):
      for i in range(order, len(lam) - 2):
        at = lam[i + shift - np.arange(weights.shape[1])]
        start, end = lam[i], lam[i + 1]
        # The integral of exp(lambda - end) f(lambda), over its own for 1.
        grid = np.linspace(start, end, 20_001)
        weight = np.exp(grid - end)
        want = np.trapezoid(weight * (grid - start) ** degree, grid)
        want /= np.trapezoid(weight, grid)
        got = weights[i + shift] @ (at - start) ** degree
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("order", unipc.ORDERS)
def test_infinite_ends_are_finite(order):
  for steps in (1, 2, 4):
    table = schedules.sampling_table(schedules.Schedule(), steps)
    got = samplers.unipc(denoise, jnp.ones(3), table, None, order, False)
    assert np.isfinite(got).all()


@pytest.mark.parametrize(
  "fields, message",
  [
    (
      {"solver_order": 4},
      "solver_order must be a whole number from 1 to 3, got",
    ),
    ({"final_sigmas_type": "last"}, "final_sigmas_type .* got 'last'"),
    (FLOW | {"final_sigmas_type": "sigma_min"}, "final_sigmas_type .*'zero'"),
    (FLOW | {"prediction_type": "epsilon"}, "prediction_type .* got 'epsil"),
    ({"beta_schedule": "squaredcos_cap_v2"}, "beta_schedule .* got 'squared"),
    ({"solver_type": "bh1"}, "solver_type='bh1' .only 'bh2'"),
    ({"use_dynamic_shifting": True}, "use_dynamic_shifting=True"),
    ({"disable_corrector": [0]}, r"disable_corrector=\[0\]"),
    ({"unheard": 1}, "unheard"),
  ],
)
def test_what_is_not_honoured_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    recipe(fields)


def test_other_orders_and_tables_are_refused():
  table = schedules.sampling_table(schedules.Schedule(), 4)
  with pytest.raises(ValueError, match=r"order must be one of \(1, 2, 3\)"):
    samplers.unipc(denoise, jnp.ones(3), table, order=4)
  schedule, spacing = schedules.Schedule("linear"), schedules.Spacing()
  table = schedules.sampling_table(schedule, 7, spacing=spacing)
  with pytest.raises(ValueError, match="end at its rows for unipc; take ddim"):
    samplers.unipc(denoise, jnp.ones(3), table)
