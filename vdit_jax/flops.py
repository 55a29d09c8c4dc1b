"""Count the matmul FLOPs of a function from its jaxpr, without running it.

What a compiler reports counts a loop's body once and a Pallas kernel not at
all; here every matmul and convolution counts as often as it runs. What is
computed again in a backward pass is in that pass' jaxpr, so it counts too:
these are hardware FLOPs. Model FLOPs of a training step are three times those
of its loss.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def flops(fn: Callable, *args: Any) -> int:
  """Count the FLOPs of matmuls and convolutions in fn(*args).

  Args:
    fn: any traceable function.
    args: arrays or `jax.ShapeDtypeStruct`s; nothing is computed.

  Returns:
    Two for each multiplication and addition, over all devices. Zeros that
    padding or dilation put into a convolution count like any other number.

  Raises:
    ValueError: a matmul runs in a loop or grid whose length is not known.
  """
  return jaxpr_flops(jax.make_jaxpr(fn)(*args).jaxpr)


def jaxpr_flops(jaxpr: core.Jaxpr) -> int:
  """Count the FLOPs of a jaxpr, those of the jaxprs within included."""
  return sum(_equation(equation) for equation in jaxpr.eqns)


def _equation(equation: core.JaxprEqn) -> int:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    return _dot(equation)
  if name == "conv_general_dilated":
    return _convolution(equation)
  inner = [jaxpr_flops(jaxpr) for jaxpr in _jaxprs(params)]
  if not any(inner):
    return 0
  if name == "cond":
    return max(inner)
  return sum(inner) * _times(name, params)


def _dot(equation: core.JaxprEqn) -> int:
  (contracted, _), _ = equation.params["dimension_numbers"]
  shape = equation.invars[0].aval.shape
  summed = math.prod(shape[axis] for axis in contracted)
  return 2 * equation.outvars[0].aval.size * summed


def _convolution(equation: core.JaxprEqn) -> int:
  kernel = equation.invars[1].aval
  features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
  return 2 * equation.outvars[0].aval.size * (kernel.size // features)


def _times(name: str, params: dict[str, Any]) -> int:
  """How often an equation runs the jaxprs within."""
  if name == "scan":
    return params["length"]
  if name == "shard_map":  # its jaxpr is one device's
    shape = dict(params["mesh"].shape)
    return math.prod(shape[axis] for axis in params["newly_manual_axes"])
  if name == "pallas_call":
    grid = params["grid_mapping"].grid
    if not all(isinstance(n, int) for n in grid):
      raise ValueError(f"pallas_call's grid must be static, got {grid}")
    return math.prod(grid)
  if name == "while":
    raise ValueError(
      "a while loop with matmuls must have a known length; write it as "
      "jax.lax.scan, or as fori_loop with Python ints as bounds"
    )
  return 1


def _jaxprs(params: dict[str, Any]) -> list[core.Jaxpr]:
  """The jaxprs among an equation's parameters, closed ones opened."""
  kinds = core.Jaxpr, core.ClosedJaxpr
  leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, kinds))
  return [getattr(x, "jaxpr", x) for x in leaves if isinstance(x, kinds)]
