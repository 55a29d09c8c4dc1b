"""Laws of streams: chunk by chunk is the whole."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vdit_jax.nn import conv3d, streams


class Net(nn.Module):
  """Two causal convolutions, of which the second doubles the frames."""

  @nn.compact
  def __call__(self, x, first=True):
    x = conv3d.CausalConv3d(4, (3, 1, 3), name="one")(x, first)
    x = conv3d.CausalConv3d(4, (2, 3, 1), name="two")(nn.silu(x), first)
    return x.repeat(2, axis=1)


@pytest.fixture(scope="module")
def video():
  return jax.random.normal(jax.random.key(0), (2, 7, 3, 3, 2))


@pytest.fixture(scope="module")
def params(video):
  return nn.meta.unbox(Net().init(jax.random.key(1), video)["params"])


def test_a_split_is_of_the_size_but_its_first():
  for total in range(1, 20):
    for size in range(1, 9):
      lead, *rest = streams.split(total, size)
      assert lead + sum(rest) == total and set(rest) <= {size}
      assert 0 < lead < 2 * size
      assert lead >= size or not rest
  assert streams.split(7, 3) == (4, 3) and streams.split(2, 3) == (2,)


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_all_chunks_are_the_whole(video, params, size):
  got = streams.all_chunks(Net(), params, video, size)
  want = Net().apply({"params": params}, video)
  assert got.shape == (2, 14, 3, 3, 4)
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_all_chunks_are_one_chunk_by_one_chunk(video, params):
  sizes, start, past, parts = streams.split(7, 2), 0, {}, []
  assert sizes == (3, 2, 2)
  for size in sizes:
    chunk = video[:, start : start + size]
    past, y = streams.one_chunk(Net(), params, past, chunk, start == 0)
    parts.append(y)
    start += size
  got = streams.all_chunks(Net(), params, video, 2)
  np.testing.assert_allclose(got, np.concatenate(parts, 1), atol=1e-6)


def test_a_stream_remembers_the_last_input_frames(video, params):
  past, _ = streams.one_chunk(Net(), params, {}, video[:, :4], True)
  one = past["one"]["past"]
  np.testing.assert_array_equal(one, video[:, 2:4])
  assert past["two"]["past"].shape == (2, 1, 3, 3, 4)
  past, _ = streams.one_chunk(Net(), params, past, video[:, 4:5], False)
  np.testing.assert_array_equal(past["one"]["past"], video[:, 3:5])


def test_what_went_before_matters_unless_a_chunk_is_the_first(video, params):
  run = lambda past, first: streams.one_chunk(
    Net(), params, past, video[:, 4:], first
  )[1]
  past, _ = streams.one_chunk(Net(), params, {}, video[:, :4], True)
  np.testing.assert_array_equal(run(past, True), run({}, True))
  assert np.abs(run(past, False) - run(past, True)).max() > 1e-2


def test_the_first_of_a_stream_is_no_array():
  state = streams.Stream(past={"a": jnp.ones(2)})
  assert state.first and len(jax.tree.leaves(state)) == 1
