"""FLOPs are those of the formula, however often and however deep they run."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl

from vdit_jax import sharding
from vdit_jax.cost import flops
from vdit_jax.nn import attention

X = jax.ShapeDtypeStruct((4, 6), jnp.float32)
W = jax.ShapeDtypeStruct((6, 6), jnp.float32)
ONE = 2 * 4 * 6 * 6  # FLOPs of X @ W


def matmul(x, w):
  return x @ w


def repeated(x, w, length):
  body = lambda x, _: (x @ w, None)
  return jax.lax.scan(body, x, length=length)[0]


@jax.custom_vjp
def custom(x, w):
  return x @ w


custom.defvjp(lambda x, w: (x @ w, (x, w)), lambda res, g: (g @ res[1].T, None))


def test_a_batched_dot_counts_batch_rows_columns_and_summed():
  a = jax.ShapeDtypeStruct((2, 3, 5, 7), jnp.bfloat16)
  b = jax.ShapeDtypeStruct((2, 11, 3, 7), jnp.bfloat16)
  dot = functools.partial(jnp.einsum, "bnik,bjnk->bnij")
  assert flops.flops(dot, a, b) == 2 * (2 * 3) * 5 * 11 * 7


@pytest.mark.parametrize("groups", [1, 2])
def test_a_convolution_counts_every_tap_of_every_output(groups):
  x = jax.ShapeDtypeStruct((2, 5, 8, 8, 6), jnp.float32)
  kernel = jax.ShapeDtypeStruct((3, 3, 1, 6 // groups, 10), jnp.float32)
  convolve = functools.partial(
    jax.lax.conv_general_dilated,
    window_strides=(1, 2, 2),
    padding="SAME",
    dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
    feature_group_count=groups,
  )
  outputs = 2 * 5 * 4 * 4 * 10
  want = 2 * outputs * (3 * 3 * 1 * 6 // groups)
  assert flops.flops(convolve, x, kernel) == want


@pytest.mark.parametrize(
  "wrap", [jax.jit, jax.checkpoint, jax.vmap, lambda f: jax.jit(jax.jit(f))]
)
def test_what_wraps_a_function_changes_nothing(wrap):
  many = [jax.ShapeDtypeStruct((3, *a.shape), a.dtype) for a in (X, W)]
  assert flops.flops(wrap(jnp.matmul), *many) == 3 * ONE


def test_a_function_with_its_own_gradient_counts():
  assert flops.flops(custom, X, W) == ONE
  assert flops.flops(jax.grad(lambda x, w: custom(x, w).sum()), X, W) == 2 * ONE


def test_a_scan_counts_as_the_loop_written_out():
  def nested(x, w):
    body = lambda x, _: (repeated(x, w, 3), None)
    return jax.lax.scan(body, x, length=5, unroll=2)[0] @ w

  assert flops.flops(nested, X, W) == 16 * ONE


def test_a_cond_counts_its_dearest_branch():
  def either(x, w):
    branches = (lambda x: x, lambda x: x @ w, lambda x: x @ w @ w)
    return jax.lax.switch(x[0, 0].astype(int), branches, x)

  assert flops.flops(either, X, W) == 2 * ONE


def test_a_gradient_costs_twice_its_function_and_remat_once_more():
  def loss(x, w, layer):
    return layer(jnp.sin(layer(x, w)), w).sum()

  def count(layer):
    gradient = jax.grad(functools.partial(loss, layer=layer), argnums=(0, 1))
    return flops.flops(gradient, X, W)

  assert count(matmul) == 2 * ONE + 4 * ONE
  saved_nothing = jax.checkpoint_policies.nothing_saveable
  sine = lambda x, w: jnp.sin(x @ w) @ w
  again = jax.checkpoint(sine, policy=saved_nothing)
  plain = flops.flops(jax.grad(lambda x, w: sine(x, w).sum()), X, W)
  remat = flops.flops(jax.grad(lambda x, w: again(x, w).sum()), X, W)
  assert remat - plain == ONE


def test_a_sharded_function_counts_all_devices():
  auto = (jax.sharding.AxisType.Auto,) * 2
  mesh = jax.make_mesh((4, 2), ("data", "tensor"), auto)
  rows = jax.P("data")
  split = jax.shard_map(
    matmul, mesh=mesh, in_specs=(rows, jax.P()), out_specs=rows
  )
  # Devices along "tensor" all compute the same rows.
  assert flops.flops(split, X, W) == 2 * ONE


def test_a_kernel_counts_its_whole_grid():
  def kernel(x, w, y):
    y[...] = x[...] @ w[...]

  call = pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct((8, 6), jnp.float32),
    grid=(2,),
    in_specs=[
      pl.BlockSpec((4, 6), lambda i: (i, 0)),
      pl.BlockSpec((6, 6), lambda i: (0, 0)),
    ],
    out_specs=pl.BlockSpec((4, 6), lambda i: (i, 0)),
  )
  x = jax.ShapeDtypeStruct((8, 6), jnp.float32)
  assert flops.flops(call, x, W) == 2 * ONE


def test_a_loop_of_unknown_length_is_refused_if_it_has_matmuls():
  def loop(x, w, body):
    return jax.lax.while_loop(lambda x: x.sum() < 0, body, x)

  assert flops.flops(lambda x, w: loop(x, w, jnp.sin), X, W) == 0
  with pytest.raises(ValueError, match="known length"):
    flops.flops(lambda x, w: loop(x, w, lambda x: x @ w), X, W)


def test_elementwise_work_counts_nothing():
  assert flops.flops(lambda x: jnp.sum(jax.nn.gelu(x) * x), X) == 0


def test_model_flops_are_three_times_the_loss():
  def loss(w, x):
    return repeated(x, w, 5).sum()

  assert flops.model_flops(loss, W, X) == 3 * 5 * ONE


def test_what_is_not_trained_counts_once():
  def loss(w, frozen, x):
    return (repeated(x, frozen, 2) @ w).sum()

  # The frozen two, forwards; then x has no gradient, w has.
  assert flops.model_flops(loss, W, W, X) == 2 * ONE + 2 * ONE


def test_what_follows_the_trained_is_differentiated_too():
  def loss(w, frozen, x):
    return ((x @ w) @ frozen).sum()

  gradient = lambda w, frozen, x: jax.grad(loss)(w, frozen, x)
  count = flops.model_flops(loss, W, W, X)
  assert count == flops.flops(gradient, W, W, X) == 4 * ONE


def test_a_loop_is_trained_from_the_turn_that_makes_it_so():
  def loss(w, frozen, x):
    def body(carry, _):
      a, b = carry
      return (b, a @ frozen), None  # b is trained, and then a

    (a, _), _ = jax.lax.scan(body, (x, x @ w), length=4)
    return a.sum()

  assert flops.model_flops(loss, W, W, X) == 2 * 5 * ONE


def test_remat_changes_no_model_flops():
  def loss(w, x, wrap):
    return wrap(lambda x: jnp.sin(x @ w) @ w)(x).sum()

  plain, remat = (
    flops.model_flops(functools.partial(loss, wrap=wrap), W, X)
    for wrap in (lambda f: f, jax.checkpoint)
  )
  assert plain == remat == 5 * ONE  # x has no gradient


def test_attention_counts_without_its_kernels_padding():
  auto = (jax.sharding.AxisType.Auto,) * len(sharding.MESH_AXES)
  tpu = jax.sharding.AbstractMesh(
    (1,) * 4,
    sharding.MESH_AXES,
    auto,
    abstract_device=jax.sharding.AbstractDevice("TPU v5 lite", 1, "tpu"),
  )
  q = jax.ShapeDtypeStruct((2, 700, 4, 128), jnp.bfloat16)

  def loss(q):
    return attention.attend(q, q, q).astype(jnp.float32).sum()

  with jax.sharding.use_abstract_mesh(tpu):
    padded = flops.flops(loss, q)
    gradient = flops.flops(jax.grad(loss), q)
    needed = flops.model_flops(loss, q)
  one = 2 * 2 * 4 * 700 * 700 * 128
  assert needed == 3 * 2 * one
  assert padded == 2 * one * (768 / 700) ** 2  # forward: 2 matmuls a tile
  assert gradient == padded / 2 * (2 + 5)  # one pass backward: 5


@pytest.mark.parametrize("kernel", ["dot", "cudnn"])
def test_cudnn_counts_as_attention_does(kernel):
  x = jax.ShapeDtypeStruct((2, 8, 3, 16), jnp.bfloat16)
  attend = functools.partial(attention.attend, kernel=kernel)
  one = 2 * 2 * 3 * 8 * 8 * 16  # a matmul

  def total(*qkv):
    return jnp.sum(attend(*qkv).astype(jnp.float32))

  assert flops.flops(attend, x, x, x) == 2 * one
  # Backwards, cuDNN makes the logits again.
  again = one if kernel == "cudnn" else 0
  assert flops.flops(jax.grad(total, (0, 1, 2)), x, x, x) == 6 * one + again
