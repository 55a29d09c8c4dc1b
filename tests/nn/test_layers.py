"""Laws of stacked blocks: the scan is the loop, remat is plain."""

import dataclasses

import flax.linen as nn
import jax
import jax.ad_checkpoint
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax.nn import layers, linear

B, D = 3, 4


@dataclasses.dataclass(frozen=True)
class Config:
  depth: int = 3
  unroll: int = 1
  remat: str = "none"


class Block(nn.Module):
  """x + tanh(sin(x W + row)) scale, a row of its own for each block."""

  cfg: Config

  @nn.compact
  def __call__(self, x, row, scale):
    y = linear.dense(D, (None, None), name="fc", dtype=jnp.float32)(x)
    y = jax.ad_checkpoint.checkpoint_name(y, layers.ATTENDED)
    return x + jnp.tanh(jnp.sin(y + row)) * scale, None


class Net(nn.Module):
  cfg: Config

  @nn.compact
  def __call__(self, x, rows, scale):
    blocks = layers.stack(Block, self.cfg, in_axes=(0, nn.broadcast))
    return blocks(x, rows, scale)[0]


@pytest.fixture(scope="module")
def inputs():
  keys = jax.random.split(jax.random.key(0), 2)
  x, rows = (
    jax.random.normal(keys[0], (B, D)),
    jax.random.normal(keys[1], (3, D)),
  )
  return x, rows, jnp.float32(0.7)


@pytest.fixture(scope="module")
def boxed(inputs):
  return Net(Config()).init(jax.random.key(1), *inputs)["params"]


def test_the_scan_is_the_loop(boxed, inputs):
  params, (x, rows, scale) = nn.meta.unbox(boxed), inputs
  got = Net(Config()).apply({"params": params}, x, rows, scale)
  for i in range(3):
    fc = jax.tree.map(lambda p, i=i: p[i], params["blocks"]["fc"])
    y = x @ fc["kernel"] + fc["bias"] + rows[i]
    x = x + np.tanh(np.sin(y)) * scale
  np.testing.assert_allclose(got, x, rtol=1e-5, atol=1e-6)


def test_params_are_stacked_and_drawn_apart(boxed):
  kernel = boxed["blocks"]["fc"]["kernel"]
  assert kernel.names[0] == "layers" and kernel.value.shape == (3, D, D)
  for i in range(2):
    assert np.all(kernel.value[i] != kernel.value[i + 1])


def _grads(params, inputs, cfg):
  loss = lambda p: jnp.sum(Net(cfg).apply({"params": p}, *inputs) ** 2)
  return jax.grad(loss)(params)


@pytest.fixture(scope="module")
def plain(boxed, inputs):
  return _grads(nn.meta.unbox(boxed), inputs, Config())


@pytest.mark.parametrize(
  "remat, unroll", [("none", 2), ("attention", 1), ("full", 1), ("full", 8)]
)
def test_remat_and_unroll_change_no_gradient(
  boxed, inputs, plain, remat, unroll
):
  cfg = Config(remat=remat, unroll=unroll)
  found = _grads(nn.meta.unbox(boxed), inputs, cfg)
  same = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
  jax.tree.map(same, found, plain)
  assert np.abs(found["blocks"]["fc"]["kernel"]).min() > 0


def test_what_is_saved_for_the_backward_pass_shrinks(boxed, inputs):
  params = nn.meta.unbox(boxed)

  def residuals(remat):
    net = Net(Config(remat=remat))
    loss = lambda p: jnp.sum(net.apply({"params": p}, *inputs) ** 2)
    _, back = jax.vjp(loss, params)
    return sum(x.size for x in jax.tree.leaves(back))

  plain, attention, full = map(residuals, layers.REMAT)
  assert full < attention < plain
