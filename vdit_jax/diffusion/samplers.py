"""Samplers: from noise to latents, each one pure function over a denoiser.

  sampler(denoise, x, table, key) -> x0
  sampler(..., trace=True) -> x0, the state after each step [steps, ...]

`denoise(x, row) -> x0` predicts the clean latents; `row` is a
`schedules.Table` of scalars: the level of x and the t to show the network. A
sampler sees no objective, no text and no guidance. Its loop is one lax.scan
with one call of the denoiser, so a network is traced and compiled once; the
state is float32 whatever the network computes in. A table's last row is data;
a piece of a table (`[i : j + 1]` of its rows) ends at its last level. Pieces
of Euler and DDIM compose exactly; the others, which look back, take steps of
less order there. A `Piece` of a run keeps what they look back on, so that a run
is the same in several programs, one for each of two experts for example.

DDIM and DPM-Solver++ follow a table whose steps end off its rows
(`schedules.Spacing`). So over such a table `ddim` is diffusers' DDIM scheduler
and `dpmpp_2m_sde` the DPM scheduler beside it; the others refuse it. Fresh
noise is drawn from a key, a fold of it a step, so that each piece of a run
needs a key of its own; or from a key for each clip; or it is given.

All but DDIM with eta > 0 and `dpmpp_2m_sde`, which solve the reverse SDE, solve
the probability-flow ODE. Euler and Heun solve it on the straight
path: with tau = sigma / (alpha + sigma),

  z = x / (alpha + sigma) = (1 - tau) x0 + tau eps,

so that any schedule becomes rectified flow by a change of scale and of time
(the scale-time transformations of arXiv:2310.19075, section 2), and the ODE is
dz/dtau = eps - x0 = (z - x0) / tau. Nothing in it is singular at pure noise
(alpha = 0, tau = 1), and on rectified flow z = x and tau = t.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from vdit_jax.diffusion import schedules
from vdit_jax.diffusion import unipc as unipcs

Array = jax.Array
Denoise = Callable[[Array, schedules.Table], Array]

# What a recipe may set, by sampler.
_OPTIONS = {"ddim": {"eta"}, "unipc": {"order", "lower_order_final"}}


class Piece(flax.struct.PyTreeNode):
  """Steps of a run that are taken by themselves.

  A sampler that is given one returns its carry after them, x0 after the last.

  Attributes:
    start, stop: the steps, [start, stop) of the table's.
    carry: what the piece before returned; None for the first.
  """

  start: int = flax.struct.field(pytree_node=False)
  stop: int = flax.struct.field(pytree_node=False)
  carry: Any = None


def get(name: str) -> Callable[..., Array | tuple[Array, Any]]:
  """Return the sampler that a config names; an unknown name is refused."""
  every = (euler, heun, ddim, dpmpp_2m, dpmpp_2m_sde, unipc)
  known = {f.__name__: f for f in every}
  if name not in known:
    raise ValueError(f"sampler must be one of {sorted(known)}, got {name!r}")
  return known[name]


def make(
  name: str, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
  """Return a sampler with its options, which a recipe may set.

  Args:
    name: of the sampler.
    options: its arguments by name, such as eta of `ddim`; None is none.
  """
  options = dict(options or {})
  taken = _OPTIONS.get(name, set())
  if unknown := sorted(set(options) - taken):
    raise ValueError(
      f"sampler_options of {name} must be of {sorted(taken)}, got {unknown}"
    )
  return functools.partial(get(name), **options)


def draws_noise(name: str, options: Mapping[str, Any] | None = None) -> bool:
  """Tell whether a sampler draws fresh noise at its steps."""
  eta = (options or {}).get("eta", 0.0)
  return name == "dpmpp_2m_sde" or (name == "ddim" and eta > 0)


def euler(
  denoise: Denoise,
  x: Array,
  table: schedules.Table,
  key: Array | None = None,
  trace: bool = False,
  piece: Piece | None = None,
) -> Any:
  """Take Euler steps on the straight path; first order.

  Args:
    denoise: (x [B, f, h, w, c], row) -> x0 [B, f, h, w, c].
    x: latents at the table's first level [B, f, h, w, c].
    table: `schedules.Table` of [steps + 1].
    key: unused; every sampler takes one.
    trace: whether to return the states too.
    piece: of the run; None is all of it. Not with `trace`.

  Returns:
    x at the table's last level, which is x0, float32 [B, f, h, w, c]; with
    `trace` also x after each step [steps, B, f, h, w, c].
  """
  del key
  scale, tau = _straight(table)

  def step(z, at):
    row, scale, tau, next_tau = at
    slope = (z - _predict(denoise, scale * z, row)) / tau
    z = z + (next_tau - tau) * slope
    return z, z if trace else None

  x = _state(x)
  rows = (_but_last(table), scale[:-1], tau[:-1], tau[1:])
  finish = lambda z: scale[-1] * z
  x, states = _loop(step, x / scale[0], rows, finish, piece)
  return (x, _factors(scale[1:], x) * states) if trace else x


def heun(
  denoise: Denoise,
  x: Array,
  table: schedules.Table,
  key: Array | None = None,
  trace: bool = False,
  piece: Piece | None = None,
) -> Array | tuple[Array, Any]:
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
    trace, piece: as of `euler`.

  Returns:
    As `euler`.
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
    carry = jnp.where(corrects, end, start), end, slope
    return carry, end if trace else None

  row = jax.tree.map(lambda v: v[step + corrects], table)
  width = tau[step + 1] - tau[step]
  rows = (row, scale[step + corrects], tau[step + corrects], width, corrects)
  z = _state(x) / scale[0]
  carry, finish = (z, z, jnp.zeros_like(z)), lambda carry: scale[-1] * carry[1]
  x, ends = _loop(evaluate, carry, rows, finish, piece, calls=2)
  if not trace:
    return x
  # A step ends with its second call, the last one with its only call.
  states = jnp.concatenate([ends[1::2], ends[-1:]])
  return x, _factors(scale[1:], x) * states


def ddim(
  denoise: Denoise,
  x: Array,
  table: schedules.Table,
  key: Array | None = None,
  eta: float = 0.0,
  noise: Array | None = None,
  trace: bool = False,
  piece: Piece | None = None,
) -> Array | tuple[Array, Any]:
  """Take DDIM steps (arXiv:2010.02502, eq. 12); first order.

  The fresh noise of a step has eta times the standard deviation of the
  posterior q(x_next | x, x0), written for any alpha and sigma: eta = 0 is the
  ODE, eta = 1 is ancestral sampling.

  Args:
    denoise: (x [B, f, h, w, c], row) -> x0 [B, f, h, w, c].
    x: latents at the table's first level [B, f, h, w, c].
    table: `schedules.Table` of [steps + 1].
    key: PRNG key of the fresh noise, or one for each clip [B]; required when
      eta > 0 without noise.
    eta: share of fresh noise, in [0, 1].
    noise: fresh noise of each step [steps, B, f, h, w, c], in place of the
      key's.
    trace, piece: as of `euler`.

  Returns:
    As `euler`.
  """
  if not 0 <= eta <= 1:
    raise ValueError(f"eta must be in [0, 1], got {eta}")
  x = _state(x)
  source, draw = _fresh(x, table, key, noise) if eta > 0 else (None, None)

  def step(x, at):
    row, end, source = at
    x0 = _predict(denoise, x, row)
    eps = (x - row.alpha * x0) / row.sigma
    if eta > 0:
      # Rounding may carry `_kept` past 1 where two levels are close.
      fresh = eta**2 * jnp.maximum(1 - _kept(row, end) ** 2, 0)
      eps = jnp.sqrt(1 - fresh) * eps + jnp.sqrt(fresh) * draw(source)
    x = end.alpha * x0 + end.sigma * eps
    return x, x if trace else None

  rows = (_but_last(table), _ends(table), source)
  found = _loop(step, x, rows, lambda x: x, piece)
  return found if trace else found[0]


def dpmpp_2m(
  denoise: Denoise,
  x: Array,
  table: schedules.Table,
  key: Array | None = None,
  trace: bool = False,
  piece: Piece | None = None,
) -> Array | tuple[Array, Any]:
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
    trace, piece: as of `euler`.

  Returns:
    As `euler`.
  """
  del key

  def step(carry, at):
    x, previous = carry
    row, end, extrapolation = at
    x0 = _predict(denoise, x, row)
    guess = x0 + extrapolation * (x0 - previous)
    ratio = end.sigma / row.sigma
    x = ratio * x + (end.alpha - row.alpha * ratio) * guess
    return (x, x0), x if trace else None

  x = _state(x)
  rows = (_but_last(table), _ends(table), _extrapolation(table))
  carry = x, jnp.zeros_like(x)
  found = _loop(step, carry, rows, lambda carry: carry[0], piece)
  return found if trace else found[0]


def dpmpp_2m_sde(
  denoise: Denoise,
  x: Array,
  table: schedules.Table,
  key: Array | None = None,
  noise: Array | None = None,
  trace: bool = False,
  piece: Piece | None = None,
) -> Array | tuple[Array, Any]:
  """Take SDE-DPM-Solver++(2M) steps (arXiv:2211.01095).

  `dpmpp_2m` for the reverse SDE: with q = exp(-h), which is 0 at pure noise
  and at data,

    x' = (sigma' / sigma) q x + alpha' (1 - q^2) x0 + sigma' sqrt(1 - q^2) eps

  where x0 is extrapolated as there and eps is fresh. One call a step; the
  spread of a Gaussian is of second order where lambda is finite.

  Args:
    denoise: (x [B, f, h, w, c], row) -> x0 [B, f, h, w, c].
    x: latents at the table's first level [B, f, h, w, c].
    table: `schedules.Table` of [steps + 1].
    key: PRNG key of the fresh noise, or one for each clip [B]; required
      without noise.
    noise: fresh noise of each step [steps, B, f, h, w, c], in place of the
      key's.
    trace, piece: as of `euler`.

  Returns:
    As `euler`.
  """
  x = _state(x)
  source, draw = _fresh(x, table, key, noise)

  def step(carry, at):
    x, previous = carry
    row, end, extrapolation, source = at
    x0 = _predict(denoise, x, row)
    guess = x0 + extrapolation * (x0 - previous)
    kept = _kept(row, end)
    fresh = jnp.maximum(1 - kept**2, 0)
    x = end.sigma * (kept / row.sigma * x + jnp.sqrt(fresh) * draw(source))
    x = x + end.alpha * fresh * guess
    return (x, x0), x if trace else None

  rows = (_but_last(table), _ends(table), _extrapolation(table), source)
  carry = x, jnp.zeros_like(x)
  found = _loop(step, carry, rows, lambda carry: carry[0], piece)
  return found if trace else found[0]


def unipc(
  denoise: Denoise,
  x: Array,
  table: schedules.Table,
  key: Array | None = None,
  order: int = 2,
  lower_order_final: bool = True,
  trace: bool = False,
  piece: Piece | None = None,
) -> Array | tuple[Array, Any]:
  """Take UniPC steps (arXiv:2302.04867); order + 1 with one call a step.

  Each step is predicted by the last `order` predictions, and taken again when
  the one at its end is there, which the next step begins with. The last step's
  end is not corrected, and at infinite lambda steps are of first order. See
  `diffusion.unipc`; diffusers' UniPCMultistepScheduler of kind bh2.

  Args:
    denoise: (x [B, f, h, w, c], row) -> x0 [B, f, h, w, c].
    x: latents at the table's first level [B, f, h, w, c].
    table: `schedules.Table` of [steps + 1].
    key: unused; every sampler takes one.
    order: of the predictor, 1 to 3.
    lower_order_final: whether the last steps are of less order, down to 1.
    trace, piece: as of `euler`; states are those that are predicted.

  Returns:
    As `euler`.
  """
  del key
  _refuse_ends(table, "unipc")
  steps = unipcs.steps(table, order, lower_order_final)

  def step(carry, at):
    before, x, past = carry
    row, now = at
    known = jnp.concatenate([_predict(denoise, x, row)[None], past])
    guess = jnp.sum(_factors(now.corrector, x) * known, 0)
    x = now.kept_before * before + now.gain_before * guess
    guess = jnp.sum(_factors(now.predictor, x) * known[:-1], 0)
    after = now.kept * x + now.gain * guess
    return (x, after, known[:-1]), after if trace else None

  x = _state(x)
  past = jnp.zeros((order, *x.shape), x.dtype)
  rows = (_but_last(table), steps)
  found = _loop(step, (x, x, past), rows, lambda carry: carry[1], piece)
  return found if trace else found[0]


def _loop(
  step: Callable[..., Any],
  carry: Any,
  rows: Any,
  finish: Callable[[Any], Array],
  piece: Piece | None,
  calls: int = 1,
) -> tuple[Any, Any]:
  """Take the steps of a run, or a piece: x0, or the carry, and the states.

  Args:
    step: (carry, row) -> carry, state.
    carry: of the first step.
    rows: arrays of the steps' calls.
    finish: carry after the last step -> x0.
    piece: of the run; None is all of it.
    calls: of a step; the last step has but one.
  """
  last = True
  if piece is not None:
    count = jax.tree.leaves(rows)[0].shape[0]
    span = slice(calls * piece.start, calls * piece.stop)
    rows, last = jax.tree.map(lambda v: v[span], rows), span.stop >= count
    carry = carry if piece.start == 0 else piece.carry
  carry, states = jax.lax.scan(step, carry, rows)
  return (finish(carry) if last else carry), states


def _extrapolation(table):
  """Return 1 / (2 r) = h_i / (2 h_(i-1)) of each step, 0 for first order.

  h_i is the width of step i in lambda, h_(i-1) the distance of its row from
  the row before. A step past training timestep 0 is first order too.
  """
  row, end = _but_last(table), _ends(table)
  start = jnp.log(row.alpha) - jnp.log(row.sigma)
  h = jnp.log(end.alpha) - jnp.log(end.sigma) - start
  previous = jnp.concatenate([jnp.full(1, jnp.inf, h.dtype), jnp.diff(start)])
  second_order = jnp.isfinite(h) & jnp.isfinite(previous) & (end.t >= 0)
  return jnp.where(second_order, h / (2 * previous), 0)


def _kept(row, end):
  """Return exp(-h), the share of a step's noise that it has before it."""
  return row.alpha * end.sigma / (end.alpha * row.sigma)


def _fresh(x, table, key, noise):
  """Return what a scan over the steps draws fresh noise from, and by what."""
  steps = table.alpha.shape[0] - 1
  if noise is not None:
    if noise.shape != (steps, *x.shape):
      raise ValueError(
        f"noise must be {(steps, *x.shape)}, one for each step, got "
        f"{noise.shape}"
      )
    return noise, lambda given: given.astype(x.dtype)
  if key is None:
    raise ValueError("key must be given where noise is not, got None for both")
  shape = x.shape[key.ndim :]
  fold, draw = jax.random.fold_in, _normal(shape, x.dtype)
  if key.ndim:  # [B]
    fold, draw = jax.vmap(fold, (0, None)), jax.vmap(draw)
  return jax.vmap(lambda i: fold(key, i))(jnp.arange(steps)), draw


def _normal(shape, dtype):
  return lambda key: jax.random.normal(key, shape, dtype)


def _straight(table):
  """Return the scale and the time of the straight path, both [steps + 1]."""
  _refuse_ends(table, "euler and heun")
  scale = table.alpha + table.sigma
  return scale, table.sigma / scale


def _refuse_ends(table, name):
  """Refuse a table whose steps end off its rows."""
  if table.end is not None:
    raise ValueError(
      f"table's steps must end at its rows for {name}; take ddim, dpmpp_2m or "
      "dpmpp_2m_sde, or as many steps as divide the schedule's num_timesteps"
    )


def _factors(scale, z):
  """Let factors [n] broadcast against states or predictions [n, *z]."""
  return scale.reshape(-1, *[1] * z.ndim)


def _state(x):
  # bfloat16 latents would lose each step's change, some 1/steps of x.
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _predict(denoise, x, row):
  return denoise(x, row).astype(x.dtype)


def _but_last(table):
  return jax.tree.map(lambda v: v[:-1], table)


def _ends(table):
  """Return the levels at which the steps end, [steps]."""
  if table.end is not None:
    return _but_last(table.end)
  return jax.tree.map(lambda v: v[1:], table)
