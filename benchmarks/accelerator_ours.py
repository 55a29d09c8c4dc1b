"""Our side of `benchmarks.accelerator`: attention, networks, sizes."""

import functools
import itertools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import accelerator_case as cases
from benchmarks import cogvideox_jax as ours
from benchmarks import rows
from configs import vdit as sizes
from vdit_jax import pipeline, sharding
from vdit_jax.cost import chips, flops
from vdit_jax.kernels import blocks
from vdit_jax.nn import attention
from vdit_jax.training import learner, optim, utilisation
from vdit_jax.training import state as states
from vdit_jax.weights import component
from vdit_jax.weights import tiny as tinies

_ITEM = flags.DEFINE_string("item", None, "What to run.", required=True)
_SCRATCH = flags.DEFINE_string("scratch", None, "Folder.", required=True)
_JSON = flags.DEFINE_string("json", None, "File to write.", required=True)
_TINY = flags.DEFINE_bool("tiny", False, "Sizes for a CPU.")

_LENGTHS = ((512, 512), (513, 226), (1024, 77), (500, 16))  # queries, keys
_TYPES, _BOTH = ("bfloat16", "float16", "float32"), (False, True)
_TIMED = ((17_776, 30, 64), (17_550, 16, 128))  # tokens, heads, head_dim


def main(argv):
  """Run one item."""
  del argv
  device = jax.devices()[0]
  about = {"device": device.device_kind, "jax": jax.__version__}
  kept = rows.Rows(_JSON.value, about)
  kind, _, argument = _ITEM.value.partition("_")
  scratch = pathlib.Path(_SCRATCH.value)
  mesh = sharding.make_mesh(sharding.MeshShape(data=1), jax.devices()[:1])
  with jax.set_mesh(mesh):
    if kind == "attention":
      _attention(kept)
    elif kind == "ours":
      part, _, dtype = argument.rpartition("_")
      if part:
        kept.attempt("train", lambda: _train(scratch, dtype))
      else:
        _compare(kept, scratch, dtype)
    elif kind == "variant":
      kept.attempt(argument, lambda: _variant(argument, mesh))
  if kind == "pipeline":
    kept.attempt("pipeline", _pipeline)
  kept.done()


def time(run: Callable[[], Any], parts: int = 1) -> dict[str, Any]:
  """Time a run, one of its parts."""
  return cases.seconds(run, jax.block_until_ready, parts)


def peak_gib() -> float | None:
  """The most memory of the device that this process held."""
  stats = jax.devices()[0].memory_stats() or {}
  peak = stats.get("peak_bytes_in_use")
  return peak and peak / 2**30


def _attention(kept: rows.Rows) -> None:
  """Compare kernels with float64 on the host; time them at a clip's size."""
  on_gpu = sharding.platform() == "gpu"
  for kernel, dtype, K, (L, S), masked in _parities(on_gpu):
    what = f"{kernel} {dtype} K={K} L={L} S={S} masked={masked}"
    parity = functools.partial(_parity, kernel, dtype, K, L, S, masked)
    kept.attempt(what, parity)
  timed = ((600, 2, 64),) if _TINY.value else _TIMED
  for L, N, K in timed:
    for kernel in ("cudnn", "blocks") if on_gpu else ("blocks",):
      for way in ("forward", "gradient"):
        run = functools.partial(_speed, kernel, way, L, N, K)
        kept.attempt(f"{kernel} {way} L={L} N={N} K={K}", run)


def _parities(on_gpu: bool):
  """List what is compared: kernel, type, head_dim, lengths, masked."""
  odd = _LENGTHS[1:2]
  found = itertools.product(("dot", "blocks"), _TYPES[::2], (64,), odd, _BOTH)
  found = list(found)
  if on_gpu:
    found += itertools.product(
      ("cudnn",), _TYPES[:1], (64, 128), _LENGTHS, _BOTH
    )
    found += itertools.product(("cudnn",), _TYPES[1:2], (64,), odd, _BOTH)
  return found


def _parity(kernel, dtype, K, L, S, masked) -> dict[str, float]:
  """Relative errors of values and gradients."""
  rng = np.random.default_rng(0)
  shapes = (2, L, 3, K), (2, S, 3, K), (2, S, 3, K), (2, L, 3, K)
  *qkv, weights = (
    jnp.asarray(rng.standard_normal(s, np.float32), dtype) for s in shapes
  )
  rows = np.stack([np.arange(S) % 3 > 0, np.arange(S) < S // 2])
  mask = jnp.asarray(rows) if masked else None

  attend = functools.partial(attention.attend, kernel=kernel)
  if kernel == "blocks":  # which few logits are not cut into
    attend = functools.partial(blocks.attend, logits=64 * S, saved=None)

  def total(q, k, v):
    y = attend(q, k, v, mask=mask)
    return jnp.sum(y.astype(jnp.float32) * weights.astype(jnp.float32)), y

  grad: Any = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))
  grads, y = grad(*qkv)
  wanted = _reference(*qkv, weights, rows if masked else None)
  names = "out", "dq", "dk", "dv"
  return {
    name: _error(x, want)
    for name, x, want in zip(names, (y, *grads), wanted, strict=True)
  }


def _reference(q, k, v, do, mask):
  """Attention and its gradients in float64, by the host."""
  q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
  scale = q.shape[-1] ** -0.5
  s = scale * np.einsum("blnk,bsnk->bnls", q, k)
  if mask is not None:
    s = np.where(mask[:, None, None], s, -np.inf)
  p = np.exp(s - s.max(-1, keepdims=True))
  p /= p.sum(-1, keepdims=True)
  y = np.einsum("bnls,bsnk->blnk", p, v)
  dp = np.einsum("blnk,bsnk->bnls", do, v)
  ds = p * (dp - (dp * p).sum(-1, keepdims=True)) * scale
  return (
    y,
    np.einsum("bnls,bsnk->blnk", ds, k),
    np.einsum("bnls,blnk->bsnk", ds, q),
    np.einsum("bnls,blnk->bsnk", p, do),
  )


def _error(found: Any, wanted: Any) -> float:
  found, wanted = (np.asarray(x, np.float64) for x in (found, wanted))
  return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


def _speed(kernel, way, L, N, K) -> dict[str, Any]:
  """Time self-attention of one clip in bfloat16; FLOP/s by the formula."""
  draw = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
  q, k, v = (draw(jax.random.key(i), (1, L, N, K)) for i in range(3))

  def run(q, k, v):
    return attention.attend(q, k, v, kernel=kernel)

  def total(q, k, v):
    return jnp.sum(run(q, k, v).astype(jnp.float32) ** 2)

  fn = jax.jit(run if way == "forward" else jax.grad(total, (0, 1, 2)))
  found = time(lambda: fn(q, k, v))
  # Forwards 2 matmuls; their gradients 4, beside what is made again.
  work = 2 * L * L * N * K * (2 if way == "forward" else 6)
  return found | {"tflops": work / found["median"] / 1e12}


def _compare(kept: rows.Rows, scratch: pathlib.Path, dtype: str) -> None:
  """Time each part and compare with what PyTorch's side saved."""
  given = cases.inputs(cases.case(dtype, _TINY.value))
  theirs = scratch / f"theirs_{dtype}.npz"
  gave = dict(np.load(theirs)) if theirs.exists() else {}
  loaded = component.load(scratch / "transformer", param_dtype=dtype)
  forward = ours.forward(loaded, given)
  sample = ours.sampler(loaded, given, cases.STEPS)
  for part, run, parts in (
    ("forward", forward, 1),
    ("sample", sample, cases.STEPS),
  ):
    result = functools.partial(_result, run, gave.get(part), parts)
    kept.attempt(part, result)
  if dtype == "bfloat16":
    vae = component.load(scratch / "vae", param_dtype=dtype)
    decode = ours.decoder(vae, given["z"])
    result = functools.partial(_result, decode, gave.get("decode"))
    kept.attempt("decode", result)


def _result(run, wanted, parts: int = 1) -> dict[str, Any]:
  """Time a run, and compare what it gives."""
  found = time(run, parts) | {"peak_gib": peak_gib()}
  if wanted is not None:
    found["distance"] = _error(run().astype(jnp.float32), wanted)
  return found


def _train(scratch: pathlib.Path, dtype: str) -> dict[str, Any]:
  """Time loss, gradients and an AdamW step; parameters float32."""
  given = cases.inputs(cases.case(dtype, _TINY.value))
  loaded = component.load(
    scratch / "transformer", param_dtype="float32", dtype=dtype
  )
  loaded = ours.changed(loaded, remat="attention")
  loss, args = ours.denoising_loss(loaded, given)
  needed = flops.model_flops(loss, loaded.params, *args)
  found = time(ours.trainer(loss, loaded.params, args))
  return found | {"peak_gib": peak_gib()} | _share(needed, found["median"])


def _share(needed: float, seconds: float) -> dict[str, Any]:
  """Model FLOPs a second, and their share of the device's peak."""
  peak = chips.peak_flops(jax.devices()[0].device_kind)
  rate = needed / seconds
  return {"model_tflops": rate / 1e12, "utilisation": peak and rate / peak}


def _variant(name: str, mesh) -> dict[str, Any]:
  """Time the training step of a size of ours, one clip of 49x480x720."""
  size, _, remat = name.partition("_")
  config = sizes.get_config("s" if _TINY.value else size)
  config.denoiser.remat = remat or config.denoiser.remat
  config.batch_size, config.mesh.fsdp = 1, 1
  clip = (49, 480, 720)
  if _TINY.value:
    config.denoiser.update({"width": 128, "depth": 2, "heads": 1})
    config.denoiser.update({"mlp_width": 128, "text_width": 32})
    config.text_encoder.width = 32
    config.autoencoder.channels = [8 for _ in config.autoencoder.channels]
    clip = (9, 64, 64)
  learned = learner.make(config)
  tx, rate = optim.make(optim.Optim(**config.optim))
  state, placed = states.create(learned.init, tx, mesh, 0)
  step = states.jit_step(
    learner.make_step(config, learned.loss, tx, rate), placed
  )
  frozen = _filled(sharding.place(mesh, learned.frozen))
  batch = _filled(learner.batch(config, *clip))
  needed = utilisation.model_flops(learned.loss, state.params, frozen, batch)
  count = sum(x.size for x in jax.tree.leaves(state.params))

  def run():
    nonlocal state
    state, metrics = step(state, frozen, batch)
    return metrics

  found = time(run)
  tokens = learner.tokens(learned.modules, batch.moments[0].shape[1:])
  return (
    found
    | {"peak_gib": peak_gib(), "parameters": count, "tokens": tokens}
    | _share(needed, found["median"])
  )


def _filled(described: Any) -> Any:
  """Draw arrays of what is described."""
  rng = np.random.default_rng(0)

  def fill(x):
    if jnp.issubdtype(x.dtype, jnp.floating):
      return jnp.asarray(rng.standard_normal(x.shape, np.float32), x.dtype)
    return jnp.ones(x.shape, x.dtype)

  return jax.tree.map(fill, described)


def _pipeline() -> dict[str, Any]:
  """Sample with a tiny pipeline on this device and on the CPU, float32."""
  with tempfile.TemporaryDirectory() as folder:
    tinies.write(folder, "2b")
    videos = []
    for device in (jax.devices()[0], jax.devices("cpu")[0]):
      mesh = sharding.make_mesh(sharding.MeshShape(data=1), [device])
      with (
        jax.set_mesh(mesh),
        jax.default_device(device),
        jax.default_matmul_precision("highest"),
      ):
        pipe = pipeline.load(folder, param_dtype="float32")
        size = dict(num_frames=9, height=32, width=48, steps=4)
        videos.append(np.asarray(pipe.generate(["a dog runs"], **size)))
  error = np.mean((videos[0] - videos[1]) ** 2)
  return {"psnr_db": float(10 * np.log10(4 / max(error, 1e-20)))}


if __name__ == "__main__":
  app.run(main)
