"""Samplers: from noise to latents, each one pure function over a denoiser.

  sampler(denoise, x, table, key) -> x0

`denoise(x, row) -> x0` predicts the clean latents; `row` is a
`schedules.Table` of scalars: the level of x and the t to show the network. A
sampler sees no objective, no text and no guidance. Its loop is one lax.scan
with one call of the denoiser, so a network is traced and compiled once; the
state is float32 whatever the network computes in. A table's last row is data;
a piece of a table (`[i : j + 1]` of its rows) ends at its last level, so that
a run may be divided, between two experts for example. Pieces of Euler and DDIM
compose exactly; Heun and DPM-Solver++ take one first-order step more.

All solve the probability-flow ODE. Euler and Heun solve it on the straight
path: with tau = sigma / (alpha + sigma),

  z = x / (alpha + sigma) = (1 - tau) x0 + tau eps,

so that any schedule becomes rectified flow by a change of scale and of time
(the scale-time transformations of arXiv:2310.19075, section 2), and the ODE is
dz/dtau = eps - x0 = (z - x0) / tau. Nothing in it is singular at pure noise
(alpha = 0, tau = 1), and on rectified flow z = x and tau = t.
"""

import jax
import jax.numpy as jnp


def get(name):
  """Return the sampler that a config names; an unknown name is refused."""
  known = {f.__name__: f for f in (euler, heun, ddim, dpmpp_2m)}
  if name not in known:
    raise ValueError(f"sampler must be one of {sorted(known)}, got {name!r}")
  return known[name]


def euler(denoise, x, table, key=None):
  """Take Euler steps on the straight path; first order.

  Args:
    denoise: (x [B, f, h, w, c], row) -> x0 [B, f, h, w, c].
    x: latents at the table's first level [B, f, h, w, c].
    table: `schedules.Table` of [steps + 1].
    key: unused; every sampler takes one.

  Returns:
    x at the table's last level, which is x0, float32 [B, f, h, w, c].
  """
  del key
  scale, tau = _straight(table)

  def step(z, at):
    row, scale, tau, next_tau = at
    slope = (z - _predict(denoise, scale * z, row)) / tau
    return z + (next_tau - tau) * slope, None

  x = _state(x)
  rows = (_but_last(table), scale[:-1], tau[:-1], tau[1:])
  return scale[-1] * jax.lax.scan(step, x / scale[0], rows)[0]


def heun(denoise, x, table, key=None):
  """Take Heun steps on the straight path; second order, two calls a step.

  Algorithm 1 of arXiv:2206.00364 on the straight path. The last step ends at
  data, where the slope has no value, and is an Euler step; so there are
  2 steps - 1 calls. The scan is over calls: even ones begin a step, odd ones
  correct it.

  Args:
    denoise: (x [B, f, h, w, c], row) -> x0 [B, f, h, w, c].
    x: latents at the table's first level [B, f, h, w, c].
    table: `schedules.Table` of [steps + 1].
    key: unused; every sampler takes one.

  Returns:
    x at the table's last level, which is x0, float32 [B, f, h, w, c].
  """
  del key
  scale, tau = _straight(table)
  call = jnp.arange(2 * (tau.shape[0] - 1) - 1)
  step = call // 2
  corrects = call % 2 == 1

  def evaluate(carry, at):
    start, end, first = carry
    row, scale, tau, width, corrects = at
    z = jnp.where(corrects, end, start)
    slope = (z - _predict(denoise, scale * z, row)) / tau
    slope = jnp.where(corrects, (first + slope) / 2, slope)
    end = start + width * slope
    return (jnp.where(corrects, end, start), end, slope), None

  row = jax.tree.map(lambda v: v[step + corrects], table)
  width = tau[step + 1] - tau[step]
  rows = (row, scale[step + corrects], tau[step + corrects], width, corrects)
  z = _state(x) / scale[0]
  (_, z, _), _ = jax.lax.scan(evaluate, (z, z, jnp.zeros_like(z)), rows)
  return scale[-1] * z


def ddim(denoise, x, table, key=None, eta=0.0):
  """Take DDIM steps (arXiv:2010.02502, eq. 12); first order.

  The fresh noise of a step has eta times the standard deviation of the
  posterior q(x_next | x, x0), written for any alpha and sigma: eta = 0 is the
  ODE, eta = 1 is ancestral sampling.

  Args:
    denoise: (x [B, f, h, w, c], row) -> x0 [B, f, h, w, c].
    x: latents at the table's first level [B, f, h, w, c].
    table: `schedules.Table` of [steps + 1].
    key: PRNG key of the fresh noise; required when eta > 0.
    eta: share of fresh noise, in [0, 1].

  Returns:
    x at the table's last level, which is x0, float32 [B, f, h, w, c].
  """
  if not 0 <= eta <= 1:
    raise ValueError(f"eta must be in [0, 1], got {eta}")
  if eta > 0 and key is None:
    raise ValueError(f"key must be given when eta > 0, got None with eta={eta}")

  def step(x, at):
    row, end, i = at
    x0 = _predict(denoise, x, row)
    eps = (x - row.alpha * x0) / row.sigma
    if eta == 0:
      return end.alpha * x0 + end.sigma * eps, None
    kept = row.alpha * end.sigma / (end.alpha * row.sigma)
    # Rounding may carry `kept` past 1 where two levels are close.
    fresh = eta**2 * jnp.maximum(1 - kept**2, 0)
    noise = jax.random.normal(jax.random.fold_in(key, i), x.shape, x.dtype)
    mixed = jnp.sqrt(1 - fresh) * eps + jnp.sqrt(fresh) * noise
    return end.alpha * x0 + end.sigma * mixed, None

  rows = (_but_last(table), _but_first(table), jnp.arange(_steps(table)))
  return jax.lax.scan(step, _state(x), rows)[0]


def dpmpp_2m(denoise, x, table, key=None):
  """Take DPM-Solver++(2M) steps (arXiv:2211.01095, algorithm 2).

  Second order with one call a step: x0 is extrapolated linearly in
  lambda = log(alpha / sigma) from this and the previous prediction. A step
  that begins or ends at infinite lambda (pure noise, data), and the one after
  pure noise, take this prediction alone. The paper's coefficients are written
  without lambda, -alpha' (exp(-h) - 1) = alpha' - alpha sigma' / sigma, and
  stay finite at both ends.

  Args:
    denoise: (x [B, f, h, w, c], row) -> x0 [B, f, h, w, c].
    x: latents at the table's first level [B, f, h, w, c].
    table: `schedules.Table` of [steps + 1].
    key: unused; every sampler takes one.

  Returns:
    x at the table's last level, which is x0, float32 [B, f, h, w, c].
  """
  del key

  def step(carry, at):
    x, previous = carry
    row, end, extrapolation = at
    x0 = _predict(denoise, x, row)
    guess = x0 + extrapolation * (x0 - previous)
    ratio = end.sigma / row.sigma
    x = ratio * x + (end.alpha - row.alpha * ratio) * guess
    return (x, x0), None

  x = _state(x)
  rows = (_but_last(table), _but_first(table), _extrapolation(table))
  return jax.lax.scan(step, (x, jnp.zeros_like(x)), rows)[0][0]


def _extrapolation(table):
  """Return 1 / (2 r) = h_i / (2 h_(i-1)) of each step, 0 for first order."""
  h = jnp.diff(jnp.log(table.alpha) - jnp.log(table.sigma))
  previous = jnp.concatenate([jnp.full(1, jnp.inf, h.dtype), h[:-1]])
  second_order = jnp.isfinite(h) & jnp.isfinite(previous)
  return jnp.where(second_order, h / (2 * previous), 0)


def _straight(table):
  """Return the scale and the time of the straight path, both [steps + 1]."""
  scale = table.alpha + table.sigma
  return scale, table.sigma / scale


def _state(x):
  # bfloat16 latents would lose each step's change, some 1/steps of x.
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _predict(denoise, x, row):
  return denoise(x, row).astype(x.dtype)


def _steps(table):
  return table.alpha.shape[0] - 1


def _but_last(table):
  return jax.tree.map(lambda v: v[:-1], table)


def _but_first(table):
  return jax.tree.map(lambda v: v[1:], table)
