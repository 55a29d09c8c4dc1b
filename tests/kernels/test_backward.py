"""The backward kernels give `dot`'s gradients, on one core and on two."""

import functools
import os
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call
from jax.experimental.pallas import tpu as pltpu

from vdit_jax.kernels import backward, windows
from vdit_jax.nn import attention

BLOCKS = windows.Blocks(queries=128, keys=256, compute=128)
TWO_CORES = pltpu.InterpretParams(num_cores_or_threads=2, detect_races=True)


def _inputs(B, N, L, S, K, dtype, visible):
  """Random q, k, v, do and a mask that shows so many keys per batch."""
  rng = np.random.default_rng(0)
  shapes = (B, N, L, K), (B, N, S, K), (B, N, S, K), (B, N, L, K)
  arrays = [jnp.asarray(rng.standard_normal(s), dtype) for s in shapes]
  seen = np.zeros((B, S), bool)
  for row, count in zip(seen, visible, strict=True):
    row[rng.permutation(S)[:count]] = True
  return *arrays, jnp.asarray(seen)


def _dot(q, k, v, mask):
  q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
  return jnp.swapaxes(attention.dot(q, k, v, mask=mask), 1, 2)


def _gradients_of_dot(q, k, v, do, mask):
  return jax.vjp(lambda *x: _dot(*x, mask), q, k, v)[1](do)


def _logsumexp(q, k, mask):
  """To the base of 2, as a forward pass saves it."""
  q, k = (x.astype(jnp.float32) for x in (q, k))
  logits = jnp.einsum("bnlk,bnsk->bnls", q, k) * q.shape[-1] ** -0.5
  logits = jnp.where(mask[:, None, None, :], logits, windows.LOWEST)
  total = jax.nn.logsumexp(logits, axis=-1) / np.log(2)
  return total.reshape(-1, 1, total.shape[-1])


def _joined(x):
  """Lay [B, N, L, K] as the kernels take it, and say how many heads."""
  B, N, L, K = x.shape
  if K == 128:
    return jnp.swapaxes(x, 1, 2).reshape(B, L, N * K), N
  return x.reshape(B * N, L, K), 1


def _parted(x, like):
  """Undo `_joined`."""
  B, N, L, K = like.shape
  if K == 128:
    return jnp.swapaxes(x.reshape(B, L, N, K), 1, 2)
  return x.reshape(like.shape)


def _pair(*args, **kwargs):
  return backward.dq(*args, **kwargs), *backward.dkv(*args, **kwargs)


KERNELS = {"pair": _pair, "fused": backward.dqkv}


def _run(kernels, q, k, v, do, mask, interpret=True, blocks=BLOCKS):
  """Gradients [B, N, L, K]; a mask of ones is passed as none."""
  logsumexp = _logsumexp(q, k, mask)
  out = _dot(q, k, v, mask)
  *laid, heads = *(_joined(x)[0] for x in (q, k, v, do, out)), _joined(q)[1]
  seen = None if mask.all() else mask.astype(jnp.int32)[:, None]

  @jax.jit
  def run(q, k, v, do, out):
    delta = backward.delta(out, do, heads=heads, interpret=bool(interpret))
    return KERNELS[kernels](
      *(q, k, v, do, logsumexp, delta, seen),
      heads=heads,
      blocks=blocks,
      interpret=interpret,
    )

  grads = run(*laid)
  return [_parted(g, x) for g, x in zip(grads, (q, k, v), strict=True)]


def _distance(x, y):
  """Return |x - y| / |y|."""
  x, y = (np.asarray(a, np.float64) for a in (x, y))
  return np.linalg.norm(x - y) / np.linalg.norm(y)


# Three heads: the cores get an uneven share, and where a core may begin in
# the middle of a head it does. Lengths that the blocks do not divide: what the
# windows have beyond is NaN here.
@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
  "B, N, L, S, K, visible",
  [
    pytest.param(2, 1, 256, 768, 128, [768, 400], marks=pytest.mark.slow),
    (1, 3, 300, 460, 128, [460]),
    (2, 1, 130, 226, 64, [226, 100]),
  ],
)
def test_gradients_equal_those_of_dot(kernels, B, N, L, S, K, visible):
  *arrays, mask = _inputs(B, N, L, S, K, jnp.float32, visible)
  wanted = _gradients_of_dot(*arrays, mask)
  grads = _run(kernels, *arrays, mask, interpret=TWO_CORES)
  for got, want in zip(grads, wanted, strict=True):
    assert got.dtype == want.dtype
    assert _distance(got, want) < 2e-6
  assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("kernels", KERNELS)
def test_bfloat16_is_as_near_to_float32_as_dot_is(kernels):
  *arrays, mask = _inputs(1, 2, 256, 512, 128, jnp.bfloat16, [400])
  exact = [x.astype(jnp.float32) for x in arrays]
  wanted = _gradients_of_dot(*exact, mask)
  plain = _gradients_of_dot(*arrays, mask)
  for got, dot, want in zip(
    _run(kernels, *arrays, mask), plain, wanted, strict=True
  ):
    assert got.dtype == jnp.bfloat16
    assert _distance(got, want) < min(4e-3, 1.2 * _distance(dot, want))


@pytest.mark.parametrize("kernels", KERNELS)
def test_queries_without_keys_have_no_gradient(kernels):
  *arrays, mask = _inputs(2, 1, 128, 256, 64, jnp.float32, [0, 256])
  wanted = _gradients_of_dot(*arrays, mask)
  for got, want in zip(_run(kernels, *arrays, mask), wanted, strict=True):
    np.testing.assert_array_equal(got[0], 0)
    assert _distance(got[1], want[1]) < 2e-6


@pytest.mark.parametrize("kernel, summed", [("dq", 1), ("dkv", 1), ("dqkv", 2)])
def test_both_cores_work_and_no_sum_is_shared(kernel, summed):
  q, k, v, do, mask = _inputs(1, 4, 256, 512, 64, jnp.bfloat16, [512])
  walked = []

  def record(token, at, core):
    walked.append((tuple(int(x) for x in at), int(core)))
    return token

  interpret = pltpu.InterpretParams(
    num_cores_or_threads=2, grid_point_recorder=record
  )
  run = functools.partial(
    getattr(backward, kernel), heads=1, blocks=BLOCKS, interpret=interpret
  )
  laid = [_joined(x)[0] for x in (q, k, v, do)]
  logsumexp = _logsumexp(q, k, mask)
  jax.block_until_ready(run(*laid, logsumexp, logsumexp, None))
  cores = [core for _, core in walked]
  assert cores.count(0) == cores.count(1) == 4 * 2 * 2 / 2
  owners = {}
  for at, core in walked:
    owners.setdefault(at[:-summed], set()).add(core)
  assert all(len(owner) == 1 for owner in owners.values())


@pytest.mark.parametrize(
  "heads, K, blocks, words",
  [
    (1, 96, (128, 256, 128), "head dim must be 64 or 128, got 96"),
    (2, 64, (128, 256, 128), "heads of 64 must come one a row, got 2"),
    (1, 64, (64, 256, 128), "blocks.queries must be 128n, got 64"),
    (1, 64, (128, 200, 100), "blocks.keys must be 128n, got 200"),
    (1, 64, (128, 256, 96), "divide blocks.keys 256, got 96"),
  ],
)
def test_what_the_grid_cannot_cover_is_refused(heads, K, blocks, words):
  x = jnp.zeros((1, 256, heads * K))
  row = jnp.zeros((heads, 1, 256))
  for kernel in (backward.dq, backward.dkv, backward.dqkv):
    with pytest.raises(ValueError, match=words):
      kernel(
        *(x, x, x, x, row, row, None),
        heads=heads,
        blocks=windows.Blocks(*blocks),
      )


@pytest.mark.parametrize("topology, cores", [("v5e:2x2", 1), ("v5p:2x2x1", 2)])
@pytest.mark.slow
def test_chips_share_the_grid_between_their_cores(topology, cores, tmp_path):
  """The compiler's listing tells how many grid points a core walks."""
  dump = f"--xla_jf_dump_to={tmp_path} --xla_jf_dump_llo_text=true"
  quiet = {
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "LIBTPU_INIT_ARGS": dump,
    "PYTHONPATH": os.pathsep.join(sys.path),
  }
  command = [sys.executable, __file__, topology]
  subprocess.run(command, env=os.environ | quiet, check=True, timeout=300)
  loops = {}
  for path in tmp_path.iterdir():
    if match := re.search(
      r"-(attention_\w+)\.\d+-\d+-original\.txt", path.name
    ):
      text = path.read_text()
      assert "PrimaryCoreRegion" not in text
      limit = re.search(r"loop: start=0, step=1, limit=(\d+)", text)
      loops.setdefault(match[1], []).append(int(limit[1]))
    path.unlink()
  # Two steps more than grid points fill and drain the copies.
  steps = [2 * 2 * 2 // cores + 2] * 2
  assert loops == dict.fromkeys(
    ("attention_dq", "attention_dkv", "attention_dqkv"), steps
  )


def _compile(topology):
  """Compile the kernels for one chip, for two heads of 1,024 tokens."""
  from jax.experimental import topologies

  chips = topologies.get_topology_desc(platform="tpu", topology_name=topology)
  chip = jax.sharding.SingleDeviceSharding(chips.devices[0])
  array = functools.partial(jax.ShapeDtypeStruct, sharding=chip)
  blocks = windows.Blocks(queries=512, keys=512, compute=256)
  for heads, x in ((1, (2, 1024, 64)), (2, (1, 1024, 256))):
    x = array(x, jnp.bfloat16)
    row = array((2, 1, 1024), jnp.float32)
    args = x, x, x, x, row, row, array((1, 1, 1024), jnp.int32)
    for kernel in (backward.dq, backward.dkv, backward.dqkv):
      run = functools.partial(kernel, heads=heads, blocks=blocks)
      jax.jit(run).lower(*args).compile()


if __name__ == "__main__":
  _compile(sys.argv[1])
