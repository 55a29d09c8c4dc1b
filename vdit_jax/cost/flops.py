"""Count the matmul FLOPs of a function from its jaxpr, without running it.

What a compiler reports counts a loop's body once and a Pallas kernel not at
all; here every matmul and convolution counts as often as it runs. What is
computed again in a backward pass is in that pass' jaxpr, so `flops` counts it
too. `model_flops` are those that a training step cannot do without: the loss',
and as many again for each side of a matmul that has a gradient, which makes
three times where a layer is trained, twice where it is frozen behind one that
is, once where nothing is trained; and nothing for padding.
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


def model_flops(loss: Callable, params: Any, *args: Any) -> int:
  """Count the FLOPs of a training step, however it is computed.

  A matmul counts once, and once more for each of its sides that depends on the
  params, for its gradient. Traced for a platform for which nothing is written
  in another way than it is defined: call it under the mesh.

  Args:
    loss: of (params, *args). In a function that only runs forwards, pass {}
      for params.
    params: what is differentiated: arrays or `jax.ShapeDtypeStruct`s.
    args: the other arguments, likewise.
  """
  # Without the places of arrays, which are of the mesh as it is.
  params, args = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, args)
  )
  with _as_defined():
    jaxpr = jax.make_jaxpr(loss)(params, *args).jaxpr
  number = len(jax.tree.leaves(params))
  depends = [i < number for i in range(len(jaxpr.invars))]
  return jaxpr_flops(jaxpr) + _gradients(jaxpr, depends)[0]


# Matmuls of cuDNN's attention, by its primitives' names.
_FUSED = {"dot_product_attention_fwd": 2, "dot_product_attention_bwd": 5}


def jaxpr_flops(jaxpr: core.Jaxpr) -> int:
  """Count the FLOPs of a jaxpr, those of the jaxprs within included."""
  return sum(_equation(equation) for equation in jaxpr.eqns)


def _as_defined():
  """Enter the current mesh as if no kernel were for its devices."""
  mesh = jax.sharding.get_abstract_mesh()
  device = jax.sharding.AbstractDevice("", None, "any")
  return jax.sharding.use_abstract_mesh(
    jax.sharding.AbstractMesh(
      mesh.axis_sizes,
      mesh.axis_names,
      mesh.axis_types,
      abstract_device=device,
    )
  )


def _gradients(
  jaxpr: core.Jaxpr, depends: list[bool]
) -> tuple[int, list[bool]]:
  """FLOPs of gradients of what depends on inputs, and which outputs do."""
  known = dict(zip(jaxpr.invars, depends, strict=True))
  look = lambda v: isinstance(v, core.Var) and known.get(v, False)
  total = 0
  for equation in jaxpr.eqns:
    count, outs = 0, [False] * len(equation.outvars)
    if any(ins := [look(v) for v in equation.invars]):
      count, outs = _gradient_equation(equation, ins)
    total += count
    known |= dict(zip(equation.outvars, outs, strict=True))
  return total, [look(v) for v in jaxpr.outvars]


def _gradient_equation(equation: core.JaxprEqn, ins: list[bool]):
  name, params = equation.primitive.name, equation.params
  inner = _jaxprs(params)
  if name == "cond":
    counts, outs = zip(*(_gradients(j, ins[1:]) for j in inner), strict=True)
    return max(counts), [any(some) for some in zip(*outs, strict=True)]
  if name == "scan":
    first, carries = _constants_and_carries(equation, inner[0])
    carry = slice(first, first + carries)
    while True:  # until what a turn makes dependent has gone round
      count, outs = _gradients(inner[0], ins)
      new = [a or b for a, b in zip(ins[carry], outs, strict=False)]
      if new == ins[carry]:
        return count * params["length"], outs
      ins = [*ins[:first], *new, *ins[carry.stop :]]
  if len(inner) == 1 and len(inner[0].invars) == len(ins):
    count, outs = _gradients(inner[0], ins)
    if len(outs) == len(equation.outvars):
      return count * _times(name, params), outs
  sides = sum(ins) if name in ("dot_general", "conv_general_dilated") else 2
  return sides * _equation(equation), [True] * len(equation.outvars)


def _constants_and_carries(equation, inner: core.Jaxpr) -> tuple[int, int]:
  """Count them: a scan stacks all else, so that its shape is another."""
  same = lambda outer, inner: outer.aval.shape == inner.aval.shape
  carries = sum(map(same, equation.outvars, inner.outvars))
  return sum(map(same, equation.invars, inner.invars)) - carries, carries


def _equation(equation: core.JaxprEqn) -> int:
  name, params = equation.primitive.name, equation.params
  if name == "dot_general":
    return _dot(equation)
  if name == "conv_general_dilated":
    return _convolution(equation)
  if name in _FUSED:
    return _FUSED[name] * _attention(equation)
  inner = [jaxpr_flops(jaxpr) for jaxpr in _jaxprs(params)]
  if not any(inner):
    return 0
  if name == "cond":
    return max(inner)
  return sum(inner) * _times(name, params)


def _dot(equation: core.JaxprEqn) -> int:
  (contracted, _), _ = equation.params["dimension_numbers"]
  shape = _array(equation.invars[0]).shape
  summed = math.prod(shape[axis] for axis in contracted)
  return 2 * _array(equation.outvars[0]).size * summed


def _attention(equation: core.JaxprEqn) -> int:
  """FLOPs of one matmul of queries [B, L, N, K] and keys [B, S, N, K]."""
  q, k = (_array(v) for v in equation.invars[:2])
  return 2 * q.size * k.shape[1]


def _convolution(equation: core.JaxprEqn) -> int:
  kernel = _array(equation.invars[1])
  features = kernel.shape[equation.params["dimension_numbers"].rhs_spec[0]]
  return 2 * _array(equation.outvars[0]).size * (kernel.size // features)


def _array(variable: Any) -> Any:
  """What is known of an array of a jaxpr."""
  return variable.aval


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


def _jaxprs(params: dict[str, Any]) -> list[Any]:
  """The jaxprs among an equation's parameters, closed ones opened."""
  kinds = core.Jaxpr, core.ClosedJaxpr
  leaves = jax.tree.leaves(params, is_leaf=lambda x: isinstance(x, kinds))
  return [getattr(x, "jaxpr", x) for x in leaves if isinstance(x, kinds)]
