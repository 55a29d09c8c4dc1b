"""What tests of parity with PyTorch share: weights, errors, training steps."""

import dataclasses
import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vdit_jax import trees
from vdit_jax.convert import rules
from vdit_jax.weights import component

torch = pytest.importorskip("torch")

LR = 1e-3
# An eps beside which the rounding of the smallest gradients is small.
ADAMW: dict[str, float] = dict(eps=1e-3, weight_decay=0.1)

# Most of the time is LLVM's, which need not try hard on arrays this small.
jit = functools.partial(
  jax.jit, compiler_options={"xla_backend_optimization_level": 0}
)


def error(found: Any, wanted: Any) -> float:
  """Distance of arrays of one shape, relative to the wanted one's norm."""
  found, wanted = np.asarray(found), np.asarray(wanted)
  assert found.shape == wanted.shape
  return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def draw(
  state: dict[str, Any], gains: dict[str, float], seed: int = 0
) -> dict[str, np.ndarray]:
  """Draw all tensors of a torch module so that none hides a path.

  Args:
    state: what has a shape, by key.
    gains: factors by regexes that are searched for in keys.
    seed: of the numbers.
  """
  rng, found = np.random.default_rng(seed), {}
  for key, tensor in state.items():
    x = rng.standard_normal(tuple(tensor.shape))
    if re.search(r"(norm\w*|gamma)(\.weight)?$", key):
      x = 1 + 0.3 * x
    elif x.ndim > 1 and not key.endswith(("table", "embed", "embedding")):
      x = x / np.sqrt(np.prod(x.shape[1:]))
    else:
      x = 0.3 * x
    for pattern, gain in gains.items():
      x = x * gain if re.search(pattern, key) else x
    found[key] = x.astype(np.float32)
  return found


@dataclasses.dataclass(frozen=True)
class Kind:
  """A class of network that is stored as torch's.

  Attributes:
    component: how it is stored.
  """

  component: rules.Component

  def module(self, config: dict[str, Any], dtype: str = "float32") -> nn.Module:
    """Build the network of a config.json."""
    return self.component.build(config, np.dtype(jnp.dtype(dtype)))

  def shapes(self, module: nn.Module) -> dict[str, Any]:
    """Shapes of its params, by path."""
    return trees.flatten(nn.meta.unbox(self.component.abstract(module)))

  def params(self, module: nn.Module, tensors: dict[str, Any]) -> Any:
    """Put a state dict of arrays where the table says."""
    shapes = self.shapes(module)
    slots = rules.check(self.component.rules(module), shapes, tensors)
    flat = {k: np.zeros(v.shape, v.dtype) for k, v in shapes.items()}
    for key, slot in slots.items():
      at = ... if slot.row is None else slot.row
      flat[slot.path][at] = slot.transform.forward(np.asarray(tensors[key]))
    return trees.unflatten(flat)

  def check_size(self, module: nn.Module, model: Any) -> int:
    """Compare with a torch module on the meta device; count the numbers."""
    state = model.state_dict()
    tensors = {
      k: jax.ShapeDtypeStruct(tuple(v.shape), jnp.bfloat16)
      for k, v in state.items()
    }
    shapes = self.shapes(module)
    slots = rules.check(self.component.rules(module), shapes, tensors)
    assert slots.keys() == tensors.keys()
    count = sum(v.numel() for v in state.values())
    assert trees.count(shapes) == count
    return count


def check_gradients(
  found: Any, wanted: dict[str, Any], most: float = 1e-4
) -> None:
  """Compare each leaf of the gradients."""
  found, wanted = trees.flatten(found), trees.flatten(wanted)
  assert found.keys() == wanted.keys()
  errors = {k: error(g, wanted[k]) for k, g in found.items()}
  assert {k: e for k, e in errors.items() if not e <= most} == {}


class Case:
  """A denoiser of torch and ours with the same weights.

  A test's own has `run_torch(x_t, *inputs, dtype=, model=)`, its output with
  channels last.
  """

  def __init__(
    self, model: Any, tensors: dict[str, np.ndarray], folder: pathlib.Path
  ):
    self.torch, self.tensors = model, tensors
    self.reset()
    model.save_pretrained(folder)
    self.loaded = component.load(folder)
    self.module, self.params = self.loaded.module, self.loaded.params

  def reset(self, tensors: dict[str, np.ndarray] | None = None) -> None:
    """Give torch's network its weights, or others."""
    state = self.tensors if tensors is None else tensors
    self.torch.load_state_dict({k: torch.tensor(v) for k, v in state.items()})

  def trained(self) -> dict[str, Any]:
    """Torch's tensors that ours trains, by key."""
    return dict(self.torch.named_parameters())

  def gradients(self, *inputs: Any) -> tuple[np.ndarray, dict[str, Any]]:
    """Torch's output, and gradients of its mean square distance from x_t."""
    leaves = self.trained()
    for leaf in leaves.values():
      leaf.grad = None
    y = self.run_torch(*inputs)  # pyright: ignore[reportAttributeAccessIssue]
    ((y - torch.tensor(inputs[0])) ** 2).mean().backward()
    grads = {k: leaf.grad.numpy() for k, leaf in leaves.items()}
    return y.detach().numpy(), grads

  def check_reads_back(self, folder: pathlib.Path, *inputs: Any) -> Any:
    """Save ours; compare what torch reads with what it wrote, to the bit."""
    component.save(self.loaded, folder)
    model = type(self.torch).from_pretrained(folder)
    found = {k: v.numpy() for k, v in model.state_dict().items()}
    assert found.keys() == self.tensors.keys()
    for key, x in self.tensors.items():
      np.testing.assert_array_equal(found[key], x, key)
    run = self.run_torch  # pyright: ignore[reportAttributeAccessIssue]
    with torch.no_grad():
      np.testing.assert_array_equal(run(*inputs, model=model), run(*inputs))
    return model


def gradients_of(forward: Callable[..., jax.Array]) -> Callable[..., Any]:
  """Make the twin of `Case.gradients`, of (module, params, *inputs)."""

  @functools.partial(jit, static_argnums=0)
  def run(module, params, *inputs):
    def loss(params):
      y = forward(module, params, *inputs)
      return jnp.mean((y - inputs[0]) ** 2), y

    grads, y = jax.grad(loss, has_aux=True)(params)
    return y, grads

  return run


def check_adamw(
  case: Case,
  kind: Kind,
  gradients: Callable[..., Any],
  tensors: dict[str, np.ndarray],
  inputs: tuple[Any, ...],
  adamw: dict[str, float] | None = None,
) -> None:
  """Take three steps of AdamW from some weights on both sides, and compare."""
  adamw = adamw or ADAMW
  case.reset(tensors)
  params = kind.params(case.module, tensors)
  found = train(
    params, lambda p: gradients(case.module, p, *inputs)[1], adamw=adamw
  )
  theirs = torch.optim.AdamW(case.trained().values(), LR, (0.9, 0.999), **adamw)
  for _ in range(3):
    case.gradients(*inputs)
    theirs.step()
  final = {k: v.detach().numpy() for k, v in case.trained().items()}
  wanted = moved(kind.params(case.module, final), params)
  case.reset()
  check_steps(found, wanted)


def check_bfloat16(y: jax.Array, theirs: Any, exact: Any) -> None:
  """Compare with float32: at most twice as far as torch's bfloat16 is."""
  assert y.dtype == jnp.float32
  assert 1e-3 < error(y, exact) <= 2 * error(theirs, exact)


def train(
  params: Any,
  gradients: Callable[[Any], Any],
  steps: int = 3,
  adamw: dict[str, float] | None = None,
) -> Any:
  """Take steps of AdamW; return how far each leaf moved, in learning rates."""
  optimiser = optax.adamw(LR, b1=0.9, b2=0.999, **(adamw or ADAMW))
  update = jit(optimiser.update)
  params = start = jax.tree.map(jnp.asarray, params)
  state = optimiser.init(params)
  for _ in range(steps):
    updates, state = update(gradients(params), state, params)
    params = optax.apply_updates(params, updates)
  return moved(params, start)


def moved(params: Any, start: Any) -> dict[str, np.ndarray]:
  """How far each leaf moved, in learning rates."""
  away = lambda x, y: np.asarray(x - y) / LR
  return trees.flatten(jax.tree.map(away, params, start))


def check_steps(found: dict[str, Any], wanted: dict[str, Any]) -> None:
  """Compare how far leaves moved; each must have moved."""
  for path, step in wanted.items():
    assert np.abs(step).max() > 0.05, path
    assert np.abs(found[path] - step).max() <= 1e-3, path
