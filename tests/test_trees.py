"""Names round trip, and a comparison tells everything at once."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vdit_jax import trees

TREE = {
  "blocks": {"kernel": np.ones((2, 3, 4), np.float32), "scale": np.ones(3)},
  "bias": np.zeros(4, np.float16),
}


def test_unflatten_inverts_flatten():
  flat = trees.flatten(TREE)
  assert set(flat) == {"blocks/kernel", "blocks/scale", "bias"}
  back = trees.unflatten(flat)
  assert jax.tree.structure(back) == jax.tree.structure(TREE)
  assert back["blocks"]["kernel"] is TREE["blocks"]["kernel"]


def test_flatten_names_an_optimiser_state():
  state = optax.chain(optax.clip(1.0), optax.adam(1e-3)).init(
    {"a": jnp.ones(2)}
  )
  assert {"1/0/count", "1/0/mu/a", "1/0/nu/a"} <= set(trees.flatten(state))


@pytest.mark.parametrize("tree", [{"a/b": 1}, {0: 1}])
def test_flatten_refuses_keys_it_cannot_give_back(tree):
  with pytest.raises(ValueError, match="key of a tree"):
    trees.flatten(tree)


@pytest.mark.parametrize("names", [("a", "a/b"), ("a/b/c", "a")])
def test_unflatten_refuses_a_leaf_below_a_leaf(names):
  with pytest.raises(ValueError, match="lies below a leaf"):
    trees.unflatten(dict.fromkeys(names, 1))


def test_check_match_lists_every_difference_in_one_error():
  found = {
    "blocks": {"kernel": np.ones((2, 3, 5), np.float32)},
    "bias": np.zeros(4, np.float32),
    "extra": np.zeros((), np.int32),
  }
  with pytest.raises(ValueError) as error:
    trees.check_match(TREE, found, "file x", remedy="convert it again")
  assert str(error.value).splitlines() == [
    "file x does not match, in 4 places:",
    "  missing: blocks/scale float64[3]",
    "  left over: extra int32[]",
    "  differs: bias expected float16[4], found float32[4]",
    "  differs: blocks/kernel expected float32[2,3,4], found float32[2,3,5]",
    "  convert it again",
  ]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_numbers_that_are_not_finite_are_found(dtype):
  rng, dtype = np.random.default_rng(0), jnp.dtype(dtype)
  whole = rng.standard_normal((3, 2**19)).astype(dtype)
  whole[0, :3] = jnp.finfo(dtype).max, jnp.finfo(dtype).min, 0
  assert trees.is_finite(whole) and trees.is_finite(whole.T[::2])
  assert trees.is_finite(np.arange(3)) and trees.is_finite(np.zeros((0, 2)))
  for value in (np.nan, np.inf, -np.inf):
    bad = whole.copy()
    bad[2, -1] = value
    assert not trees.is_finite(bad) and not trees.is_finite(bad.T)
    with pytest.raises(ValueError, match="^x has .*NaN .* 1 places:\n  b\n"):
      trees.refuse_not_finite("x", {"a": whole, "b": bad})


def test_long_lists_and_lines_are_cut():
  with pytest.raises(ValueError, match="^x, in 900 places:") as error:
    trees.raise_listed("x", ["y" * 10**6] * 900, "mend it")
  assert len(str(error.value)) < 100_000
  assert str(error.value).endswith("and 700 more\n  mend it")


@pytest.mark.parametrize("name", ["a/" * 10**6, "a/b/" * 30 + "c"])
def test_a_name_too_deep_is_refused_at_once(name):
  with pytest.raises(ValueError, match="too deep"):
    trees.unflatten({name: 1})


def test_compare_ignores_dtypes_only_when_told():
  other = jax.tree.map(lambda x: x.astype(np.float64), TREE)
  assert len(trees.compare(TREE, other)) == 2
  assert trees.compare(TREE, other, check_dtype=False) == []
  assert trees.compare(TREE, TREE) == []


def test_counts_of_arrays_and_of_their_shapes_agree():
  tree = {"a": jnp.ones((3, 4), jnp.bfloat16), "b": jnp.ones(5), "c": 1.0}
  abstract = jax.eval_shape(lambda: tree)
  for t in (tree, abstract):
    assert trees.count(t) == 18
    assert trees.num_bytes(t) == 24 + 20 + 4
