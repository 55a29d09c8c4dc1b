"""UniPC's coefficients (arXiv:2302.04867), the B2(h) kind that predicts x0.

Over a step of width h in lambda = log(alpha / sigma), from level s to level e,

  x_e = (sigma_e / sigma_s) x_s + (alpha_e - alpha_s sigma_e / sigma_s) guess

where the guess is a mean of predictions of x0, of weights that add up to 1.
The predictor's are the p newest ones, from the step's start backwards, which
is exact where x0 is a polynomial in lambda of degree p - 1. When the next one
is there, the corrector takes the step again with that one beside them.

The weights of predictions at r_j = (lambda_j - lambda_s) / h solve

  sum_j w_j r_j^k = b_k,  b_k = k! phi_(k+1)(-h) / phi_1(-h),  k = 1..p

with phi_k(z) = sum_i z^i / (i + k)!. As published and as diffusers has it, the
one weight of the predictor of order 2 and of the corrector of order 1 is 1/2.
"""

import math

import flax.struct
import jax
import jax.numpy as jnp

from vdit_jax.diffusion import schedules

Array = jax.Array

ORDERS = (1, 2, 3)
_TERMS = 18  # of phi's series below a width of 1: exact in float64


class Steps(flax.struct.PyTreeNode):
  """How a sampler takes its steps; [steps] unless said otherwise.

  Attributes:
    kept, gain: of the state and of the guess, over the step from each row.
    predictor: weights of the predictions at this row and those before it,
      [steps, order].
    kept_before, gain_before: of the step that ended at each row, which the
      corrector takes again; 1 and 0 where there is none.
    corrector: weights of the predictions at this row and those before it,
      [steps, order + 1].
  """

  kept: Array
  gain: Array
  predictor: Array
  kept_before: Array
  gain_before: Array
  corrector: Array


def steps(table: schedules.Table, order: int, lower_order_final: bool) -> Steps:
  """Return the coefficients of all steps of a table.

  A step that begins or ends at infinite lambda is of order 1, and one that
  would look back to such a level is of the order that it has without it.

  Args:
    table: of [steps + 1], whose steps end at its rows.
    order: of the predictor, one of `ORDERS`; the first steps have less.
    lower_order_final: whether the last steps have less too, down to 1.
  """
  if order not in ORDERS:
    raise ValueError(f"order must be one of {ORDERS}, got {order!r}")
  lam = jnp.log(table.alpha) - jnp.log(table.sigma)
  h = jnp.diff(lam)
  of = _orders(lam, order, lower_order_final)
  # lambda of the rows before each step's start, the nearest one first.
  back = [jnp.roll(lam, k)[:-1] for k in range(1, order)]
  nodes = [(x - lam[:-1]) / h for x in back]
  predictor = _pick(of, [_predictor(nodes[:p], h, order) for p in range(order)])
  corrector = _pick(of, [_corrector(nodes[:p], h, order) for p in range(order)])
  kept = table.sigma[1:] / table.sigma[:-1]
  gain = table.alpha[1:] - table.alpha[:-1] * kept
  none = jnp.zeros_like(corrector[:1])
  before = lambda first, x: jnp.concatenate([first, x[:-1]])
  return Steps(
    kept=kept,
    gain=gain,
    predictor=predictor,
    kept_before=before(jnp.ones_like(kept[:1]), kept),
    gain_before=before(jnp.zeros_like(gain[:1]), gain),
    corrector=before(none, corrector),
  )


def _orders(lam: Array, order: int, lower_order_final: bool) -> Array:
  """Return the order of each step, int [steps]."""
  count = lam.shape[0] - 1
  i = jnp.arange(count)
  most = jnp.minimum(order, i + 1)
  if lower_order_final:
    most = jnp.minimum(most, count - i)
  finite = jnp.isfinite(lam)
  reach = finite[:-1] & finite[1:]  # whether the levels that far are finite
  found = jnp.ones(count, int)
  for k in range(1, order):
    reach = reach & jnp.roll(finite, k)[:-1]
    found = found + reach
  return jnp.minimum(found, most)


def _predictor(nodes: list[Array], h: Array, order: int) -> Array:
  """Weights of predictions at the step's start and at nodes, [steps, order]."""
  half = [jnp.full_like(h, 0.5)]
  found = half if len(nodes) == 1 else _solve(nodes, h)
  return _stack([_rest(found, nodes, h), *_over(found, nodes)], order)


def _corrector(nodes: list[Array], h: Array, order: int) -> Array:
  """The same with one at the step's end before them, [steps, order + 1]."""
  ends = [jnp.ones_like(h), *nodes]
  found = _solve(ends, h) if nodes else [jnp.full_like(h, 0.5)]
  end, *others = _over(found, ends)
  return _stack([end, _rest(found, ends, h), *others], order + 1)


def _solve(nodes: list[Array], h: Array) -> list[Array]:
  """Solve sum_j w_j r_j^(k - 1) = b_k for each step, by Lagrange's basis."""
  b, found = _moments(h, len(nodes)), []
  for j, node in enumerate(nodes):
    basis = [jnp.ones_like(h)]  # coefficients of the polynomial, from x^0 on
    for other in (r for i, r in enumerate(nodes) if i != j):
      scaled = [c / (node - other) for c in basis]
      zero = jnp.zeros_like(h)
      up, down = [zero, *scaled], [*scaled, zero]
      basis = [a - other * c for a, c in zip(up, down, strict=True)]
    found.append(sum(c * x for c, x in zip(basis, b, strict=True)))
  return found


def _over(weights: list[Array], nodes: list[Array]) -> list[Array]:
  """Weights of differences from the start's prediction, by their distance."""
  return [w / r for w, r in zip(weights, nodes, strict=True)]


def _rest(weights: list[Array], nodes: list[Array], h: Array) -> Array:
  """Weight of the start's prediction itself: what is left of 1, [steps]."""
  return sum((-w for w in _over(weights, nodes)), jnp.ones_like(h))


def _stack(weights: list[Array], size: int) -> Array:
  """Stack weights of [steps], with zeros behind them: [steps, size]."""
  zeros = [jnp.zeros_like(weights[0])] * (size - len(weights))
  return jnp.stack([*weights, *zeros], -1)


def _moments(h: Array, count: int) -> list[Array]:
  """Return b_1 .. b_count, each [steps]."""
  phi = _phi(-h, count + 1)
  return [math.factorial(k) * phi[k] / phi[0] for k in range(1, count + 1)]


def _phi(z: Array, count: int) -> list[Array]:
  """Return phi_1 .. phi_count of z <= 0, each [steps]."""
  found, value = [], jnp.exp(z)
  for k in range(1, count + 1):
    value = (value - 1 / math.factorial(k - 1)) / z
    # The difference of what is nearly alike loses its digits near 0.
    series = jnp.zeros_like(z)
    for i in reversed(range(k, k + _TERMS)):
      series = 1 / math.factorial(i) + z * series
    found.append(jnp.where(z > -1, series, value))
  return found


def _pick(order: Array, weights: list[Array]) -> Array:
  """Take of weights [steps, n], one for each order, those of a step's own."""
  found = weights[0]
  for p, other in enumerate(weights[1:], 2):
    found = jnp.where((order == p)[:, None], other, found)
  return found
