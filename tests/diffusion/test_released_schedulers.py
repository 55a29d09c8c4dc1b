"""Released schedulers in our form, beside diffusers' classes.

The laws that need no other library stand at the end.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax.diffusion import guidance, objectives, samplers, schedules

SHAPE = (2, 3, 4, 4, 2)  # B f h w c
PUBLISHED = dict(
  num_train_timesteps=1000,
  beta_start=0.00085,
  beta_end=0.012,
  beta_schedule="scaled_linear",
  prediction_type="v_prediction",
  clip_sample=False,
  rescale_betas_zero_snr=True,
  set_alpha_to_one=True,
  snr_shift_scale=3.0,
  steps_offset=0,
  timestep_spacing="trailing",
)
CLASSES = {
  "ddim": "CogVideoXDDIMScheduler",
  "dpmpp_2m_sde": "CogVideoXDPMScheduler",
}
# What nobody publishes but the classes can do.
QUIRKS = (
  dict(timestep_spacing="leading", steps_offset=1),
  dict(timestep_spacing="leading", set_alpha_to_one=False),
  dict(timestep_spacing="linspace"),
  dict(timestep_spacing="linspace", set_alpha_to_one=False),
  dict(set_alpha_to_one=False),
  dict(rescale_betas_zero_snr=False, snr_shift_scale=1.0),
)


def released(sampler, config, steps):
  diffusers = pytest.importorskip("diffusers")
  scheduler = getattr(diffusers, CLASSES[sampler])(**config)
  scheduler.set_timesteps(steps)
  return scheduler


def schedule_of(config):
  return schedules.Schedule(
    config["beta_schedule"],
    config["num_train_timesteps"],
    config["beta_start"],
    config["beta_end"],
    config["rescale_betas_zero_snr"],
    config["snr_shift_scale"],
  )


def table_of(config, steps, t_start=1.0):
  spacing = schedules.Spacing(
    config["timestep_spacing"],
    config["steps_offset"],
    config["set_alpha_to_one"],
  )
  schedule = schedule_of(config)
  return schedules.sampling_table(schedule, steps, 1.0, t_start, spacing)


def normal(seed, *leading):
  shape = (*leading, *SHAPE)
  return np.random.default_rng(seed).standard_normal(shape, np.float32)


# The stand-ins for a network: its text is a constant added to x.
def network(xp, x, t, text):
  return xp.sin(2 * x + text) * (0.5 + t) + 0.3 * xp.tanh(x)


def released_run(sampler, config, steps, *, kept=None, scale=None, dynamic=0):
  """Run diffusers' loop; return the states [steps + 1, ...] and the noises.

  The noise of a step is the last that it draws: the second of two where it
  uses the previous prediction.
  """
  torch = pytest.importorskip("torch")
  scheduler = released(sampler, config, steps)
  timesteps = scheduler.timesteps[steps - (kept or steps) :]
  generator = torch.Generator().manual_seed(1)
  witness = torch.Generator().manual_seed(1)
  x, old, states, noises = torch.from_numpy(normal(0)), None, [], []
  for i, n in enumerate(timesteps):
    states.append(x.numpy())
    v = network(torch, x, n / 1000, 0.5)
    if scale is not None:
      now = scale
      if dynamic:
        power = ((len(timesteps) - n.item()) / len(timesteps)) ** 5.0
        now = 1 + scale * ((1 - math.cos(math.pi * power)) / 2)
      null = network(torch, x, n / 1000, 0.0)
      v = null + now * (v - null)
    if sampler == "ddim":
      # eta is taken and ignored.
      x = scheduler.step(v, n, x, eta=0.7, return_dict=False)[0]
      continue
    back = timesteps[i - 1] if i else None
    second = old is not None and n >= 1000 // steps
    for _ in range(1 + second):
      noise = torch.randn(SHAPE, generator=witness)
    noises.append(noise.numpy())
    x, old = scheduler.step(v, old, n, back, x, generator=generator)
  return np.stack([*states, x.numpy()]), np.array(noises)


def our_run(sampler, table, noises, guided=None):
  """Run our sampler from the same start; return its states."""
  states = []

  def denoise(x, row):
    text = jnp.zeros((len(x), 1, 1, 1, 1)).at[-SHAPE[0] :].set(0.5)
    v = network(jnp, x, row.t, text)
    return objectives.to_x0("v", v, x, row.alpha, row.sigma)

  whole = denoise if guided is None else guidance.guide(denoise, guided)

  def watched(x, row):
    jax.debug.callback(lambda x: states.append(np.array(x)), x, ordered=True)
    return whole(x, row)

  given = {} if sampler == "ddim" else {"noise": jnp.asarray(noises)}
  run = jax.jit(
    lambda x: samplers.get(sampler)(watched, x, table, None, **given)
  )
  x0 = run(jnp.asarray(normal(0)))
  jax.effects_barrier()
  return np.stack([*states, x0])


def assert_same_states(got, want):
  assert got.shape == want.shape
  for i, (a, b) in enumerate(zip(got, want, strict=True)):
    error = np.linalg.norm(a - b) / np.linalg.norm(b)
    assert error <= 1e-5, (i, error)


@pytest.mark.parametrize("snr_shift", (1.0, 3.0))
@pytest.mark.parametrize("zero", (False, True))
@pytest.mark.parametrize("sampler", CLASSES)
def test_levels_are_the_rounded_float64_ones(sampler, zero, snr_shift):
  config = PUBLISHED | dict(
    rescale_betas_zero_snr=zero, snr_shift_scale=snr_shift
  )
  abar = released(sampler, config, 50).alphas_cumprod.numpy()
  assert abar.dtype == np.float64
  t = np.arange(1000, dtype=np.float32) / 1000
  alpha, sigma = schedules.alpha_sigma(schedule_of(config), t)
  for got, want in ((alpha, np.sqrt(abar)), (sigma, np.sqrt(1 - abar))):
    want = want.astype(np.float32)
    np.testing.assert_array_max_ulp(np.asarray(got), want, maxulp=1)


@pytest.mark.parametrize("kind", schedules.DISCRETE_SPACINGS)
def test_rows_are_the_released_timesteps(kind):
  config = PUBLISHED | dict(timestep_spacing=kind)
  for steps in (1, 2, 3, 7, 16, 48, 50, 61, 144, 333, 999, 1000):
    want = released("ddim", config, steps).timesteps.numpy()
    got = np.asarray(table_of(config, steps).t) * 1000
    if kind == "trailing" and steps == 61:
      # diffusers gives 62 timesteps here, of which the last means the last
      # training timestep: pure noise.
      assert len(want) == 62 and want[-1] == -1
      want = want[:-1]
    np.testing.assert_array_equal(np.round(got[:-1]), want)


@pytest.mark.parametrize("steps", (4, 7, 20, 50))
@pytest.mark.parametrize("snr_shift", (1.0, 3.0))
@pytest.mark.parametrize("sampler", CLASSES)
def test_trajectories_are_the_released_ones(sampler, snr_shift, steps):
  config = PUBLISHED | dict(snr_shift_scale=snr_shift)
  want, noises = released_run(sampler, config, steps)
  assert_same_states(our_run(sampler, table_of(config, steps), noises), want)


@pytest.mark.parametrize("quirk", QUIRKS, ids=lambda q: "-".join(map(str, q)))
@pytest.mark.parametrize("steps", (4, 7))
@pytest.mark.parametrize("sampler", CLASSES)
def test_other_settings_are_the_released_ones(sampler, steps, quirk):
  config = PUBLISHED | quirk
  want, noises = released_run(sampler, config, steps)
  assert_same_states(our_run(sampler, table_of(config, steps), noises), want)


@pytest.mark.parametrize("sampler", CLASSES)
def test_an_edit_takes_the_last_of_the_released_steps(sampler):
  want, noises = released_run(sampler, PUBLISHED, 7, kept=int(7 * 0.8))
  table = table_of(PUBLISHED, 7, t_start=0.8)
  assert table.t.shape == (6,)
  assert_same_states(our_run(sampler, table, noises), want)


@pytest.mark.parametrize("dynamic", (False, True))
@pytest.mark.parametrize("sampler", CLASSES)
def test_guided_trajectories_are_the_released_ones(sampler, dynamic):
  want, noises = released_run(
    sampler, PUBLISHED, 20, scale=6.0, dynamic=dynamic
  )
  scale = guidance.dynamic(6.0, 20) if dynamic else 6.0
  table = table_of(PUBLISHED, 20)
  assert_same_states(our_run(sampler, table, noises, scale), want)


def test_dynamic_scale_is_upstreams_at_every_timestep():
  for steps in (7, 50):
    at = jax.jit(guidance.dynamic(6.0, steps))
    for n in (0, 1, steps - 1, steps, 2 * steps, 500, 998, 999):
      row = schedules.Table(*map(jnp.float32, (0.5, 0.5, n / 1000)))
      power = math.pi * ((steps - n) / steps) ** 5.0
      want = 1 + 6.0 * (1 - math.cos(power)) / 2
      np.testing.assert_allclose(at(row), want, rtol=1e-6)


def test_training_pairs_are_the_released_ones():
  torch = pytest.importorskip("torch")
  scheduler = released("ddim", PUBLISHED, 50)
  n = np.array([0, 1, 19, 57, 500, 731, 998, 999])
  x0, eps = (np.stack([normal(s + i)[0] for i in range(8)]) for s in (0, 10))
  arguments = torch.from_numpy(x0), torch.from_numpy(eps), torch.from_numpy(n)
  t = schedules.snap(schedule_of(PUBLISHED), (n + 0.5) / 1000)
  level = schedules.alpha_sigma(schedule_of(PUBLISHED), t)
  dpm = released("dpmpp_2m_sde", PUBLISHED, 50)
  np.testing.assert_allclose(
    objectives.add_noise(x0, eps, *level),
    scheduler.add_noise(*arguments),
    atol=2e-5,  # diffusers' levels are float32 here, 1 - abar with them
  )
  np.testing.assert_allclose(
    objectives.target("v", x0, eps, *level),
    dpm.get_velocity(*arguments),
    atol=2e-5,
  )
  with pytest.raises(ValueError, match="'v' or 'flow'"):
    objectives.check("eps", schedule_of(PUBLISHED))


def test_drawn_times_are_the_tables_and_each_as_likely():
  schedule = schedule_of(PUBLISHED)
  table = schedules.sampling_table(schedule, 1000)
  for n in (0, 1, 500, 999):
    t = schedules.snap(schedule, np.float32((n + 0.3) / 1000))
    assert t == table.t[999 - n] == np.float32(n / 1000)
    alpha, sigma = schedules.alpha_sigma(schedule, t)
    assert (alpha, sigma) == (table.alpha[999 - n], table.sigma[999 - n])
  assert schedules.snap(schedule, 1.0) == np.float32(0.999)
  # Two of each in a batch of 2000; the sums' rounding may move a few.
  drawn = objectives.sample_t(jax.random.key(0), (2000,))
  n = np.round(np.asarray(schedules.snap(schedule, drawn)) * 1000).astype(int)
  counts = np.bincount(n, minlength=1000)
  assert counts.shape == (1000,) and np.mean(counts == 2) > 0.95
  flow = schedules.Schedule()
  np.testing.assert_array_equal(schedules.snap(flow, drawn), drawn)


def test_explicit_uniform_times_fill_each_ranks_interval():
  for strata in (1, 4, 16):
    t = objectives.sample_t(jax.random.key(1), (16, 2), strata=strata)
    part = np.sort(np.floor(np.asarray(t) * strata), axis=0)
    want = np.repeat(np.arange(strata), 16 // strata)
    np.testing.assert_array_equal(part, np.stack([want, want], 1))
  key = jax.random.key(2)
  np.testing.assert_array_equal(
    objectives.sample_t(key, (16,)), objectives.sample_t(key, (16,), strata=16)
  )
  for strata in (0, 3, 32):
    with pytest.raises(ValueError, match="strata"):
      objectives.sample_t(key, (16,), strata=strata)


def test_steps_that_divide_the_timesteps_end_on_the_rows():
  for steps in (1, 4, 20, 50, 1000):
    table = table_of(PUBLISHED, steps)
    assert table.end is None
    plain = schedules.sampling_table(schedule_of(PUBLISHED), steps)
    jax.tree.map(np.testing.assert_array_equal, table, plain)
  table = table_of(PUBLISHED, 7)
  np.testing.assert_allclose(table.end.t[-2:], 0, atol=1e-7)
  assert table.sigma[-1] == table.end.sigma[-2] > 0
  x = jnp.ones(3)
  for sampler in (samplers.euler, samplers.heun):
    with pytest.raises(ValueError, match="divide"):
      sampler(denoise, x, table)
  assert np.all(np.isfinite(samplers.dpmpp_2m(denoise, x, table)))


FLOW_CLASSES = {
  "flow_euler": lambda diffusers, shift: (
    diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
  ),
  "flow_unipc": lambda diffusers, shift: diffusers.UniPCMultistepScheduler(
    prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
  ),
}


@pytest.mark.parametrize("kind", schedules.FLOW_SPACINGS)
@pytest.mark.parametrize("shift", (1.0, 3.0, 12.0))
@pytest.mark.parametrize("steps", (1, 2, 7, 50))
def test_the_rows_of_a_flow_are_those_of_the_class(kind, shift, steps):
  diffusers = pytest.importorskip("diffusers")
  scheduler = FLOW_CLASSES[kind](diffusers, shift)
  scheduler.set_timesteps(steps)
  table = schedules.sampling_table(
    schedules.Schedule(), steps, shift, spacing=schedules.Spacing(kind)
  )
  sigma, t = (v.numpy() for v in (scheduler.sigmas, scheduler.timesteps))
  np.testing.assert_allclose(table.sigma, sigma, atol=1e-6)
  np.testing.assert_allclose(table.t[:-1] * 1000, t, atol=1e-4)
  np.testing.assert_allclose(table.alpha, 1 - sigma, atol=1e-6)
  assert table.end is None and table.sigma[-1] == table.t[-1] == 0


@pytest.mark.parametrize("shift", (1.0, 3.0))
def test_euler_over_a_flow_is_the_class(shift):
  diffusers = pytest.importorskip("diffusers")
  torch = pytest.importorskip("torch")
  scheduler = FLOW_CLASSES["flow_euler"](diffusers, shift)
  scheduler.set_timesteps(7)
  x = torch.from_numpy(normal(0))
  for n in scheduler.timesteps:
    v = network(torch, x, n / 1000, 0.5)
    x = scheduler.step(v, n, x, return_dict=False)[0]
  table = schedules.sampling_table(
    schedules.Schedule(), 7, shift, spacing=schedules.Spacing("flow_euler")
  )

  def denoise(x, row):
    return x - row.sigma * network(jnp, x, row.t, 0.5)

  ours = samplers.euler(denoise, jnp.asarray(normal(0)), table)
  np.testing.assert_allclose(ours, x.numpy(), atol=1e-5)


@pytest.mark.parametrize("kind", schedules.FLOW_SPACINGS)
def test_an_edit_keeps_the_last_levels_of_a_flow(kind):
  schedule, spacing = schedules.Schedule(), schedules.Spacing(kind)
  whole, kept = (
    schedules.sampling_table(schedule, 10, 3.0, t_start, spacing)
    for t_start in (1.0, 0.45)
  )
  jax.tree.map(
    lambda a, b: np.testing.assert_array_equal(a[6:], b), whole, kept
  )


def test_bad_spacings_are_refused():
  with pytest.raises(ValueError, match="linspace"):
    schedules.Spacing("karras")
  with pytest.raises(ValueError, match="offset"):
    schedules.Spacing("leading", -1)
  schedule, spacing = schedule_of(PUBLISHED), schedules.Spacing()
  for bad, steps, shift, t_start, word in (
    (schedules.Schedule(), 4, 1.0, 1.0, "spacing=None"),
    (schedule, 4, 3.0, 1.0, "shift 1"),
    (schedule, 1001, 1.0, 1.0, "num_timesteps"),
    (schedule, 4, 1.0, 0.2, "0.25"),
  ):
    with pytest.raises(ValueError, match=word):
      schedules.sampling_table(bad, steps, shift, t_start, spacing)
  for kind in schedules.FLOW_SPACINGS:
    with pytest.raises(ValueError, match="rectified_flow"):
      schedules.sampling_table(schedule, 4, spacing=schedules.Spacing(kind))
  with pytest.raises(ValueError, match="offset"):
    leading = schedules.Spacing("leading", 1)
    schedules.sampling_table(schedule, 1000, spacing=leading)
  with pytest.raises(ValueError, match="steps"):
    guidance.dynamic(6.0, 0)


def test_a_spaced_table_is_the_same_inside_jit():
  inside = jax.jit(lambda: table_of(PUBLISHED, 7))()
  jax.tree.map(np.testing.assert_array_equal, inside, table_of(PUBLISHED, 7))


# A Gaussian N(MU, STD^2), whose levels are Gaussians and whose x0 is linear.
MU, STD = 1.5, 0.5


def spread(row):
  return jnp.sqrt((row.alpha * STD) ** 2 + row.sigma**2)


def denoise(x, row):
  gain = row.alpha * STD**2 / spread(row) ** 2
  return MU + gain * (x - row.alpha * MU)


def moment_errors(table):
  """Return how far the SDE's mean and deviation end from the level's own.

  The end is linear in the start and in each step's noise, so that a unit of
  each, in a row of the batch of its own, gives the variance without chance.
  """
  steps = len(table.t) - 1
  first, last = (jax.tree.map(lambda v, i=i: v[i], table) for i in (0, -1))
  unit = jnp.eye(steps + 2, dtype=float)  # [start and noises and none, batch]
  x = first.alpha * MU + spread(first) * unit[0]
  got = samplers.dpmpp_2m_sde(denoise, x, table, noise=unit[1:-1])
  mean, deviation = got[-1], jnp.linalg.norm(got[:-1] - got[-1])
  return abs(mean - last.alpha * MU), abs(deviation - spread(last))


def piece(table, start, stop):
  return jax.tree.map(lambda v: v[start : stop + 1], table)


def order(counts, errors):
  return -np.polyfit(np.log(counts), np.log(np.array(errors, float)), 1)[0]


# The order is that of a finite log-SNR: neither end of the run is in it.
def test_sde_order_of_convergence():
  cosine = schedules.Schedule("cosine", zero_terminal_snr=True)
  counts, errors = (32, 64, 128, 256), []
  with jax.enable_x64(True):
    for steps in counts:
      table = schedules.sampling_table(cosine, steps)
      table = piece(table, steps // 8, 6 * steps // 8)
      mean, deviation = moment_errors(table)
      assert mean < 1e-6
      errors.append(deviation)
  slope = order(counts, errors)
  assert abs(slope - 2) < 0.15, (slope, errors)


@pytest.mark.parametrize("steps", (25, 50, 100))
def test_published_sde_ends_in_the_data(steps):
  mean, deviation = moment_errors(table_of(PUBLISHED, steps))
  assert mean < 1e-5 and deviation < 2.5 / steps


# From pure noise to the level of timestep 199, a row of all these tables.
def test_published_ddim_is_first_order_on_the_gaussian():
  z, counts, errors = jnp.linspace(-2.0, 2.0, 9), (20, 50, 100, 200), []
  for steps in counts:
    table = piece(table_of(PUBLISHED, steps), 0, 4 * steps // 5)
    last = jax.tree.map(lambda v: v[-1], table)
    want = last.alpha * MU + spread(last) * z
    errors.append(jnp.abs(samplers.ddim(denoise, z, table) - want).max())
  slope = order(counts, errors)
  assert abs(slope - 1) < 0.15, (slope, errors)


@pytest.mark.parametrize("sampler", CLASSES)
def test_a_constant_denoiser_is_reached_exactly(sampler):
  x, want = jnp.asarray(normal(0)), jnp.asarray(normal(1))
  for steps in (1, 4, 50):
    table, key = table_of(PUBLISHED, steps), jax.random.key(0)
    got = samplers.get(sampler)(lambda x, row: want, x, table, key)
    np.testing.assert_allclose(got, want, atol=2e-6)


def test_given_noise_is_the_keys_when_it_is_the_same():
  table, x = table_of(PUBLISHED, 7), jnp.asarray(normal(0))
  key = jax.random.key(3)
  draw = jax.vmap(
    lambda i: jax.random.normal(jax.random.fold_in(key, i), SHAPE)
  )
  noise = draw(jnp.arange(7))
  for sampler in (
    samplers.dpmpp_2m_sde,
    lambda *args, **given: samplers.ddim(*args, eta=1.0, **given),
  ):
    drawn = sampler(denoise, x, table, key)
    given = sampler(denoise, x, table, noise=noise)
    # Of numbers of size 1, some of which are sums near zero.
    np.testing.assert_allclose(drawn, given, rtol=1e-6, atol=1e-6)
    other = sampler(denoise, x, table, jax.random.key(4))
    assert not np.allclose(drawn, other, atol=0.1)
    with pytest.raises(ValueError, match="noise"):
      sampler(denoise, x, table, noise=noise[1:])
    with pytest.raises(ValueError, match="key"):
      sampler(denoise, x, table)


def test_sde_traces_its_network_once_and_keeps_float32():
  traces = []

  def network(x, row):
    traces.append(x.dtype)
    return denoise(x, row).astype(jnp.bfloat16)

  table, key = table_of(PUBLISHED, 20), jax.random.key(0)
  run = jax.jit(lambda x: samplers.dpmpp_2m_sde(network, x, table, key))
  assert run(jnp.ones(3, jnp.bfloat16)).dtype == jnp.float32
  assert traces == [jnp.dtype("float32")]
