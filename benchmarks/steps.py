"""How fast networks run, as shares of bare matmuls and convolutions.

  python -m benchmarks.steps --json=work/steps.json

Every time is a median and compared with another of the same run that was taken
in turns with it.

  dit    forward and training step: FLOP/s over those of one large matmul
  vae    the same: time of PyTorch's 3D convolutions of its shapes, each alone
         in the faster of two layouts, over its own time; beside it the same
         share of our convolutions (`layers_ratio`)

A training step's FLOPs are three times its loss', whatever it computes again.
What feeds it is timed by `benchmarks.input_pipeline`.
"""

import dataclasses
import math
import os
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import torch
from absl import app, flags, logging

from benchmarks import convolutions_torch, machine, race, rows, tables
from configs import digits
from vdit_jax import encoding, sharding, types, writing
from vdit_jax.cost import flops as counting
from vdit_jax.models import networks
from vdit_jax.models.t5 import encoder as t5
from vdit_jax.models.vdit import autoencoder as causal_vae
from vdit_jax.models.vdit import denoiser as vdit
from vdit_jax.nn import conv3d
from vdit_jax.training import autoencoder, denoiser, optim
from vdit_jax.training import state as states

_JSON = flags.DEFINE_string("json", None, "File to write.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Times each thing is timed.", 1)
_ONLY = flags.DEFINE_enum(
  "only", None, ["dit", "vae"], "Part to run; all by default."
)

_MATMUL = 2048  # rows and columns
_CLIP = (9, 32, 32, 3)

_FORWARD, _TRAINING = 0.6, 0.5  # least shares of the matmul's rate
_VAE = 0.8  # least share of its time that PyTorch's convolutions take


@dataclasses.dataclass(frozen=True)
class Case:
  """A denoiser with the latents (f, h, w) and the batch that it is timed on."""

  name: str
  cfg: vdit.Config
  latents: tuple[int, int, int]
  batch: int


_DIGITS = vdit.VARIANTS["digits"]
# Heads of 128 dimensions, as the large variants have.
_WIDE = dataclasses.replace(
  _DIGITS, width=512, depth=2, heads=4, mlp_width=2048, unroll=2
)
_CASES = (
  Case("digits, 500 tokens", _DIGITS, (5, 20, 20), 8),
  Case("digits, 2000 tokens", _DIGITS, (5, 40, 40), 2),
  Case("wide, 500 tokens", _WIDE, (5, 20, 20), 4),
  Case("wide, 2000 tokens", _WIDE, (5, 40, 40), 1),
)


def main(argv):
  """Time the parts, print their rows and write them."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  logging.set_verbosity(logging.WARNING)
  if _JSON.value:
    writing.check_file(_JSON.value, "json")
  threads = len(os.sched_getaffinity(0))  # as many as XLA takes
  torch.set_num_threads(threads)
  parts = {"dit": _time_dit, "vae": _time_vae}
  mesh = sharding.make_mesh(sharding.MeshShape(data=1), jax.devices()[:1])
  found = []
  with jax.set_mesh(mesh):
    for name, part in parts.items():
      if _ONLY.value in (None, name):
        found += part(mesh)
  if _JSON.value:
    about = machine.about(threads, ("jax", "jaxlib", "flax", "torch"))
    rows.write(_JSON.value, {"about": about, "rows": found})


def _time_dit(mesh) -> list[dict[str, Any]]:
  """Time denoisers against the matmul."""
  return [row for case in _CASES for row in _time_case(case, mesh)]


def _time_case(case: Case, mesh) -> list[dict[str, Any]]:
  modules = networks.gather(  # without an autoencoder: latents are given
    {
      "text_encoder": t5.TextEncoder(t5.VARIANTS["digits"]),
      "denoiser": vdit.Denoiser(case.cfg),
    }
  )
  config = digits.get_config("dit")
  batch = _latent_batch(case, config.data.max_length)
  loss = denoiser.make_loss(modules, denoiser.Objective(shift=4.0))
  state, step = _create(
    config, lambda key: networks.init_denoiser(modules, key), loss, mesh
  )
  forward, args = _denoise(modules, state.params["denoiser"], batch)
  loss_args = state.params, {}, batch, jax.random.key(0)
  work = {
    "matmul": 2 * _MATMUL**3,
    "forward": counting.flops(forward, *args),
    "training step": 3 * counting.flops(loss, *loss_args),
  }
  args = jax.tree.map(jnp.copy, args)  # the step takes the state's arrays
  forward = jax.jit(forward)
  runs = {
    "matmul": _matmul(),
    "forward": lambda: forward(*args),
    "training step": _stepper(step, state, batch),
  }
  times = _race(runs)
  rates = {name: work[name] / times[name]["median"] for name in runs}
  targets = {"forward": _FORWARD, "training step": _TRAINING}
  return [
    _row(
      f"dit {case.name}: {name}",
      times[name],
      rates[name] / rates["matmul"],
      target,
      gflops=rates[name] / 1e9,
      matmul_gflops=rates["matmul"] / 1e9,
      tokens_per_second=_tokens(case) / times[name]["median"],
    )
    for name, target in targets.items()
  ]


def _tokens(case: Case) -> int:
  """Video tokens of a batch."""
  sizes = zip(case.latents, case.cfg.patch, strict=True)
  return case.batch * math.prod(n // p for n, p in sizes)


def _latent_batch(case: Case, max_length: int) -> types.Batch:
  """Make latents and captions out of nothing."""
  B, shape = case.batch, (*case.latents, case.cfg.latent_channels)
  mean = jax.random.normal(jax.random.key(0), (B, *shape))
  return types.Batch(
    video=None,
    captions={
      "text_encoder": types.Captions(
        mask=jnp.ones((B, max_length), bool),
        tokens=jnp.ones((B, max_length), jnp.int32),
      )
    },
    weight=jnp.ones(B),
    moments=(mean, jnp.full_like(mean, -6.0)),
  )


def _denoise(modules, params, batch):
  """One call of the denoiser as a sampler makes it: function, arguments."""
  mask = batch.captions["text_encoder"].mask
  B, M = mask.shape
  E = modules.denoiser.cfg.text_width
  text = types.Text(embeds=jnp.ones((B, M, E)), mask=mask)

  def forward(params, x_t, t, text):
    return modules.denoiser.apply({"params": params}, x_t, t, text)

  return forward, (params, batch.moments[0], jnp.full(B, 0.5), text)


def _time_vae(mesh) -> list[dict[str, Any]]:
  """Time the autoencoder against its convolutions, each run alone."""
  config = digits.get_config("vae")
  module = causal_vae.Autoencoder(causal_vae.VARIANTS["digits"])
  batch = _video_batch(config.batch_size)
  state, step = _create_autoencoder(config, module, mesh)
  args = state.params, encoding.to_float(batch.video), jax.random.key(0)
  args = jax.tree.map(jnp.copy, args)  # the step takes the state's arrays

  def forward(params, video, key):
    return module.apply({"params": params}, video, key)

  calls = _convolutions(forward, args)
  work = counting.model_flops(lambda _, *args: forward(*args), {}, *args)
  run = jax.jit(forward)
  runs = {
    "forward": lambda: run(*args),
    "training step": _stepper(step, state, batch),
  }
  for name, gradients in _WITH_GRADIENTS.items():
    runs[f"layers {name}"] = _layers_alone(calls, gradients)
    for layout in _LAYOUTS:
      runs[f"torch {layout} {name}"] = convolutions_torch.alone(
        calls, last=layout == "last", gradients=gradients
      )
  return _vae_rows(_race(runs), work, config.batch_size)


_WITH_GRADIENTS = {"forward": False, "training step": True}
_LAYOUTS = "first", "last"  # where PyTorch has channels


def _vae_rows(times, work: int, batch_size: int) -> list[dict[str, Any]]:
  """The autoencoder's times as shares of those of convolutions alone."""
  found = []
  for name, gradients in _WITH_GRADIENTS.items():
    seconds = times[name]["median"]
    alone = {x: times[f"torch {x} {name}"]["median"] for x in _LAYOUTS}
    row = _row(
      f"vae {name}",
      times[name],
      min(alone.values()) / seconds,
      _VAE,
      gflops=(3 if gradients else 1) * work / seconds / 1e9,
      layers_ratio=times[f"layers {name}"]["median"] / seconds,
      clips_per_second=batch_size / seconds,
      **{f"torch_{x}_seconds": t for x, t in alone.items()},
    )
    found.append(row)
  return found


def _video_batch(batch_size: int) -> types.Batch:
  shape = (batch_size, *_CLIP)
  return types.Batch(
    video=jax.random.randint(jax.random.key(0), shape, 0, 256, jnp.uint8),
    weight=jnp.ones(batch_size),
  )


def _convolutions(fn: Callable, args: Any) -> list[tuple]:
  """Shapes of input and kernel of every causal convolution in fn(*args)."""
  calls = []

  def note(call, inputs, kwargs, context):
    conv = context.module
    is_conv = isinstance(conv, conv3d.CausalConv3d)
    if is_conv and context.method_name == "__call__":
      shape = inputs[0].shape
      calls.append((shape, (*conv.kernel, shape[-1], conv.features)))
    return call(*inputs, **kwargs)

  with nn.intercept_methods(note):
    jax.eval_shape(fn, *args)
  return calls


def _layers_alone(calls: list[tuple], gradients: bool) -> Callable:
  """Run the autoencoder's layer at each call's shapes, one by one."""
  function = jax.jit(_with_gradients(_layer) if gradients else _layer)
  key = jax.random.key(0)
  arrays = [[jax.random.normal(key, s) for s in shapes] for shapes in calls]

  def run():
    for x, kernel in arrays:
      jax.block_until_ready(function(x, kernel))

  return run


def _layer(x: jax.Array, kernel: jax.Array) -> Any:
  """A convolution, whatever the layer's formulation."""
  conv = conv3d.CausalConv3d(kernel.shape[-1], kernel.shape[:3])
  params = {"kernel": kernel, "bias": jnp.zeros(kernel.shape[-1])}
  return conv.apply({"params": params}, x)


def _with_gradients(function: Callable) -> Callable:
  def run(x: jax.Array, kernel: jax.Array):
    y, pull = jax.vjp(function, x, kernel)
    return y, pull(y)

  return run


def _create_autoencoder(config, module, mesh):
  loss = autoencoder.make_loss(
    module, l2_weight=config.l2_weight, kl_weight=config.kl_weight
  )
  init = lambda key: networks.init(module, key)
  return _create(config, init, loss, mesh)


def _create(config: ml_collections.ConfigDict, init, loss, mesh):
  """Make the state and the jitted step as `train.py` does."""
  tx, rate = optim.make(optim.Optim(**config.optim))
  state, placed = states.create(init, tx, mesh, config.seed)
  step = states.make_step(
    loss, tx, rate, seed=config.seed, ema_decay=config.ema_decay
  )
  return state, states.jit_step(step, placed)


def _stepper(step: Callable, state: states.TrainState, batch) -> Callable:
  """Train on one batch with every call."""

  def run():
    nonlocal state
    state, metrics = step(state, {}, batch)
    return state, metrics

  return run


def _matmul() -> Callable:
  x = jax.random.normal(jax.random.key(0), (_MATMUL, _MATMUL))
  multiply = jax.jit(jnp.matmul)
  return lambda: multiply(x, x)


def _race(runs: dict[str, Callable]) -> dict[str, dict[str, Any]]:
  turns = race.Turns(least=_REPEATS.value, most=_REPEATS.value)
  return race.run(runs, turns, jax.block_until_ready)


def _row(name: str, times: dict, ratio: float, target: float, **more):
  """Print a result and return it."""
  verdict = f" ({'at least' if ratio >= target else 'BELOW'} {target})"
  numbers = "  ".join(f"{key} {value:.4g}" for key, value in more.items())
  said = f"{name}: ratio {ratio:.3f}{verdict}"
  print(f"{said}  {tables.milliseconds(times)} ms  {numbers}", flush=True)
  return {"name": name, "ratio": ratio, "target": target} | times | more


if __name__ == "__main__":
  app.run(main)
