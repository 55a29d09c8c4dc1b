"""How fast networks run, as shares of bare matmuls and convolutions.

  python -m benchmarks.steps --json=work/steps.json

Every time is compared with another of the same run that was taken in turns
with it; of each the least is kept, since other work on the machine only adds.

  dit    forward and training step: FLOP/s over those of one large matmul
  vae    the same: time of its convolutions, each alone, over its own time;
         beside bare 3D ones also those of its layers (`layers_ratio`)

A training step's FLOPs are three times its loss', whatever it computes again.
What feeds it is timed by `benchmarks.input_pipeline`.
"""

import dataclasses
import json
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from absl import app, flags, logging
from etils import epath

from benchmarks import race
from configs import digits
from vdit_jax import encoding, sharding, types
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
_VAE = 0.8  # least share of its time that the bare convolutions take


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
  parts = {"dit": _time_dit, "vae": _time_vae}
  mesh = sharding.make_mesh(sharding.MeshShape(data=1), jax.devices()[:1])
  rows = []
  with jax.set_mesh(mesh):
    for name, part in parts.items():
      if _ONLY.value in (None, name):
        rows += part(mesh)
  if _JSON.value:
    report = {
      "device": jax.devices()[0].device_kind,
      "jax": jax.__version__,
      "repeats": _REPEATS.value,
      "rows": rows,
    }
    epath.Path(_JSON.value).write_text(json.dumps(report, indent=2) + "\n")


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
  seconds = race.seconds(runs, _REPEATS.value)
  rates = {name: work[name] / seconds[name] for name in runs}
  targets = {"forward": _FORWARD, "training step": _TRAINING}
  return [
    _row(
      f"dit {case.name}: {name}",
      seconds[name],
      rates[name] / rates["matmul"],
      target,
      gflops=rates[name] / 1e9,
      matmul_gflops=rates["matmul"] / 1e9,
      tokens_per_second=_tokens(case) / seconds[name],
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
  work = counting.flops(forward, *args)
  forward = jax.jit(forward)
  seconds = race.seconds(
    {
      "forward": lambda: forward(*args),
      "bare forward": _alone(calls, _convolve),
      "layers forward": _alone(calls, _layer),
      "training step": _stepper(step, state, batch),
      "bare training step": _alone(calls, _with_gradients(_convolve)),
      "layers training step": _alone(calls, _with_gradients(_layer)),
    },
    _REPEATS.value,
  )
  return [
    _row(
      f"vae {name}",
      seconds[name],
      seconds[f"bare {name}"] / seconds[name],
      _VAE,
      gflops=times * work / seconds[name] / 1e9,
      bare_seconds=seconds[f"bare {name}"],
      layers_ratio=seconds[f"layers {name}"] / seconds[name],
      clips_per_second=config.batch_size / seconds[name],
    )
    for name, times in (("forward", 1), ("training step", 3))
  ]


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


def _alone(calls: list[tuple], function: Callable) -> Callable:
  """Run a function of input and kernel at each call's shapes, one by one."""
  function = jax.jit(function)
  key = jax.random.key(0)
  arrays = [[jax.random.normal(key, s) for s in shapes] for shapes in calls]

  def run():
    for x, kernel in arrays:
      jax.block_until_ready(function(x, kernel))

  return run


def _convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
  kt, kh, kw, _, _ = kernel.shape
  return jax.lax.conv_general_dilated(
    x,
    kernel,
    window_strides=(1, 1, 1),
    padding=((kt - 1, 0), (kh // 2, kh // 2), (kw // 2, kw // 2)),
    dimension_numbers=("NDHWC", "DHWIO", "NDHWC"),
  )


def _layer(x: jax.Array, kernel: jax.Array) -> jax.Array:
  """The same by the autoencoder's layer, whatever its formulation."""
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


def _row(name: str, seconds: float, ratio: float, target: float, **more):
  """Print a result and return it."""
  verdict = f" ({'at least' if ratio >= target else 'BELOW'} {target})"
  numbers = "  ".join(f"{key} {value:.4g}" for key, value in more.items())
  print(f"{name}: ratio {ratio:.3f}{verdict}  {seconds:.4f} s  {numbers}")
  row = {"name": name, "ratio": ratio, "target": target, "seconds": seconds}
  return row | more


if __name__ == "__main__":
  app.run(main)
