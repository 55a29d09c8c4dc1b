"""CogVideoX on the CPU against PyTorch's: one run, in turns, the same weights.

  T=glibc.malloc
  GLIBC_TUNABLES=$T.hugetlb=1:$T.arena_max=1:$T.mmap_max=0:\
  $T.trim_threshold=17179869184 python -m benchmarks.torch_vs_jax \
    [--only=forward] [--repeats=5] [--threads=2] [--json=FILE]

Both sides have the same random weights and inputs, float32 and as many
threads; ours is compiled by XLA, its loop over layers unrolled as theirs is;
theirs is diffusers' code, run eagerly. Each network is small but has a
release's structure: heads of 64 dimensions, 226 tokens of text 4,096 wide, an
autoencoder of four levels and three blocks. Before it is timed, what both give
is compared. A ratio is our time over PyTorch's, each the least of the repeats.

  forward   one call of the denoiser
  train     loss, gradients and an AdamW step
  sample    20 DDIM steps with guidance; theirs by CogVideoXPipeline
  decode    latents to video; beside it the ratio of the convolutions alone
            (`bare`), at the shapes that PyTorch's decoder calls them with
  matmul    of 2,048 rows and columns, to know the machine by
"""

import collections
import dataclasses
import json
import os
import tempfile
from collections.abc import Callable
from typing import Any

import diffusers
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from absl import app, flags, logging
from etils import epath

from benchmarks import race
from vdit_jax import sampling, types
from vdit_jax.cost import flops
from vdit_jax.models.cogvideox import denoiser as cogvideox
from vdit_jax.models.cogvideox import system
from vdit_jax.weights import component

_PARTS = ("matmul", "forward", "train", "sample", "decode")
_ONLY = flags.DEFINE_enum("only", None, _PARTS, "Part to run; default: all.")
_REPEATS = flags.DEFINE_integer("repeats", 5, "Times each thing is timed.", 1)
_THREADS = flags.DEFINE_integer("threads", 2, "Of each side.", 1)
_JSON = flags.DEFINE_string("json", None, "File to write.")

# The most that our time may be of PyTorch's.
_TARGETS = {"forward": 1.15, "train": 1.15, "sample": 1.0}
_DECODE = 1.15  # the same, of the convolutions' ratio
_MOST_ERROR = 1e-3  # relative, of what is to be the same

_MATMUL = 2048  # rows and columns
_STEPS, _GUIDANCE, _LR = 20, 6.0, 1e-4


@dataclasses.dataclass(frozen=True)
class Networks:
  """diffusers' network and ours, with the same weights."""

  theirs: torch.nn.Module
  ours: nn.Module
  params: Any


@dataclasses.dataclass(frozen=True)
class Case:
  """A denoiser, the latents (f, h, w) that it is run on, and in which parts."""

  name: str
  variant: str
  heads: int
  layers: int
  latents: tuple[int, int, int]
  parts: tuple[str, ...] = ("forward", "train")


_CASES = (
  Case(
    "2b, width 1024, 676 tokens",
    "2b",
    *(16, 2, (3, 20, 30)),
    parts=("forward", "sample", "train"),
  ),
  Case("5b, width 1024, 1576 tokens", "5b", 16, 2, (9, 20, 30)),
  Case("5b, width 1920, 676 tokens", "5b", 30, 2, (3, 20, 30)),
)
_VAE = dict(
  block_out_channels=(64, 128, 128, 256),
  down_block_types=("CogVideoXDownBlock3D",) * 4,
  up_block_types=("CogVideoXUpBlock3D",) * 4,
  latent_channels=16,
  layers_per_block=3,
  temporal_compression_ratio=4,
)
_VAE_LATENTS = (1, 7, 8, 12, 16)  # 25 frames of 64 x 96


def main(argv):
  """Time the parts, print their rows and write them."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  logging.set_verbosity(logging.WARNING)
  cpus = sorted(os.sched_getaffinity(0))
  if _THREADS.value > len(cpus):
    raise ValueError(f"threads must be at most {len(cpus)}, the CPUs there are")
  # XLA takes a thread for each CPU that it may run on, when it starts.
  os.sched_setaffinity(0, cpus[: _THREADS.value])
  torch.set_num_threads(_THREADS.value)
  diffusers.utils.logging.disable_progress_bar()
  wanted = [_ONLY.value] if _ONLY.value else _PARTS
  rows = _time_matmul() if "matmul" in wanted else []
  for case in _CASES:
    rows += _time_case(case, [part for part in case.parts if part in wanted])
  rows += _time_decode() if "decode" in wanted else []
  if _JSON.value:
    report = {
      "threads": _THREADS.value,
      "repeats": _REPEATS.value,
      "glibc_tunables": os.environ.get("GLIBC_TUNABLES"),
      "jax": jax.__version__,
      "torch": torch.__version__,
      "diffusers": diffusers.__version__,
      "rows": rows,
    }
    epath.Path(_JSON.value).write_text(json.dumps(report, indent=2) + "\n")


def _time_matmul() -> list[dict[str, Any]]:
  x = np.random.default_rng(0).standard_normal((_MATMUL, _MATMUL))
  ours, theirs = jnp.asarray(x, jnp.float32), torch.tensor(x).float()
  multiply = jax.jit(jnp.matmul)
  seconds = _race(lambda: multiply(ours, ours), lambda: theirs @ theirs)
  return [_row("matmul", seconds, None, 2 * _MATMUL**3)]


def _time_case(case: Case, parts: list[str]) -> list[dict[str, Any]]:
  """Time a denoiser."""
  if not parts:
    return []
  networks = _networks(diffusers.CogVideoXTransformer3DModel, _config(case))
  inputs = _inputs(case.latents)
  rows = []
  for part in parts:  # training last: it changes theirs
    ours, theirs, work = _CASE_PARTS[part](networks, inputs)
    if part != "train":
      _check_same(f"{case.name}: {part}", ours(), theirs())
    seconds = _race(ours, theirs)
    name = f"{part}: {case.name}"
    rows.append(_row(name, seconds, _TARGETS[part], work))
  return rows


def _config(case: Case) -> dict[str, Any]:
  return dict(
    num_attention_heads=case.heads,
    num_layers=case.layers,
    use_rotary_positional_embeddings=case.variant != "2b",
  )


def _networks(kind: type[torch.nn.Module], config: dict[str, Any]) -> Networks:
  """Make a network of diffusers', every parameter random, and ours of it."""
  theirs, rng = kind(**config).float().eval(), np.random.default_rng(0)
  with torch.no_grad():
    for name, p in theirs.named_parameters():
      x = rng.standard_normal(p.shape, np.float32)
      if p.ndim > 1:
        x /= np.sqrt(np.prod(p.shape[1:]))
      else:
        x = 0.1 * x + name.endswith("weight")
      p.copy_(torch.tensor(x))
  with tempfile.TemporaryDirectory() as folder:
    theirs.save_pretrained(folder)
    loaded = component.load(folder, dtype="float32")
  return Networks(theirs, _unrolled(loaded.module), loaded.params)


def _unrolled(module: nn.Module) -> nn.Module:
  if not isinstance(module, cogvideox.Denoiser):
    return module
  cfg = dataclasses.replace(module.cfg, unroll=module.cfg.depth)
  return module.clone(cfg=cfg)


def _inputs(latents: tuple[int, int, int]) -> dict[str, np.ndarray]:
  """Noised latents in our layout, and the negative and a prompt's text."""
  rng = np.random.default_rng(1)
  draw = lambda *shape: rng.standard_normal(shape, np.float32)
  return {
    "x_t": draw(1, *latents, 16),
    "target": draw(1, *latents, 16),
    "embeds": draw(2, 226, 4096),
  }


def _forward(
  networks: Networks, inputs: dict[str, np.ndarray]
) -> tuple[Callable, Callable, int]:
  """One call of the denoiser: ours, theirs, FLOPs."""
  x_t, embeds = inputs["x_t"], inputs["embeds"][1:]

  def apply(params, x_t, embeds):
    return _apply(networks.ours, params, x_t, jnp.full(1, 0.5), embeds)

  args = networks.params, jnp.asarray(x_t), jnp.asarray(embeds)
  compiled = jax.jit(apply)
  given = _channels_second(x_t), torch.tensor(embeds), torch.tensor([500])
  rotary = _rotary(networks.theirs, x_t.shape)

  @torch.no_grad()
  def theirs():
    y = networks.theirs(*given, image_rotary_emb=rotary, return_dict=False)
    return y[0].permute(0, 1, 3, 4, 2)

  return lambda: compiled(*args), theirs, flops.flops(apply, *args)


def _train(
  networks: Networks, inputs: dict[str, np.ndarray]
) -> tuple[Callable, Callable, int]:
  """Loss, gradients and an AdamW step: ours, theirs, FLOPs."""
  x_t, target, embeds = inputs["x_t"], inputs["target"], inputs["embeds"][1:]
  optimiser = optax.adamw(_LR, weight_decay=0.01)  # the default of torch's

  def loss(params, x_t, embeds, target):
    y = _apply(networks.ours, params, x_t, jnp.full(1, 0.5), embeds)
    return jnp.mean((y - target) ** 2)

  @jax.jit(donate_argnums=(0, 1))
  def step(params, state, *args):
    value, grads = jax.value_and_grad(loss)(params, *args)
    updates, state = optimiser.update(grads, state, params)
    return optax.apply_updates(params, updates), state, value

  args = [jnp.asarray(x) for x in (x_t, embeds, target)]
  params = jax.tree.map(jnp.copy, networks.params)
  state = optimiser.init(params)

  def ours():
    nonlocal params, state
    params, state, value = step(params, state, *args)
    return params, state, value

  given = _channels_second(x_t), torch.tensor(embeds), torch.tensor([500])
  wanted = _channels_second(target)
  rotary = _rotary(networks.theirs, x_t.shape)
  adamw = torch.optim.AdamW(networks.theirs.parameters(), _LR)

  def theirs():
    adamw.zero_grad()
    y = networks.theirs(*given, image_rotary_emb=rotary, return_dict=False)
    torch.nn.functional.mse_loss(y[0], wanted).backward()
    adamw.step()

  return ours, theirs, 3 * flops.flops(loss, params, *args)


def _sample(
  networks: Networks, inputs: dict[str, np.ndarray]
) -> tuple[Callable, Callable, int]:
  """Steps of DDIM with guidance: ours, theirs, FLOPs."""
  x_t, embeds = inputs["x_t"], inputs["embeds"]
  recipe = system.RECIPES["5b"]
  how = sampling.settle(recipe, steps=_STEPS, guidance=_GUIDANCE)
  text = types.Text(embeds=embeds, mask=np.ones(embeds.shape[:2], bool))
  text, noise = jax.tree.map(jnp.asarray, (text, x_t))

  def ours():
    module, params = networks.ours, {"denoiser": networks.params}
    return sampling.sample_latents((module,), how, params, text, noise)

  fields = recipe.schedule
  scheduler = diffusers.CogVideoXDDIMScheduler(
    beta_start=fields["beta_start"],
    beta_end=fields["beta_end"],
    beta_schedule="scaled_linear",
    prediction_type="v_prediction",
    rescale_betas_zero_snr=True,
    snr_shift_scale=fields["snr_shift"],
    timestep_spacing="trailing",
  )
  pipe = diffusers.CogVideoXPipeline(
    None, None, None, networks.theirs, scheduler
  )
  pipe.set_progress_bar_config(disable=True)
  given, (negative, prompt) = _channels_second(x_t), torch.tensor(embeds)

  def theirs():
    f, h, w = x_t.shape[1:4]
    latents = pipe(
      height=8 * h,
      width=8 * w,
      num_frames=4 * (f - 1) + 1,
      num_inference_steps=_STEPS,
      guidance_scale=_GUIDANCE,
      latents=given,
      prompt_embeds=prompt[None],
      negative_prompt_embeds=negative[None],
      output_type="latent",
    ).frames
    return latents.permute(0, 1, 3, 4, 2)

  return ours, theirs, flops.flops(ours)


_CASE_PARTS = {"forward": _forward, "sample": _sample, "train": _train}


def _apply(module, params, x_t, t, embeds):
  text = types.Text(embeds=embeds, mask=jnp.ones(embeds.shape[:2], bool))
  return module.apply({"params": params}, x_t, t, text)


def _channels_second(x: np.ndarray) -> torch.Tensor:
  """Our layout [B, f, h, w, c] to theirs, [B, f, c, h, w]."""
  return torch.tensor(x).permute(0, 1, 4, 2, 3).contiguous()


def _rotary(theirs, shape):
  """What the released pipeline hands to its network."""
  if not theirs.config.use_rotary_positional_embeddings:
    return None
  pipe = diffusers.CogVideoXPipeline(None, None, None, theirs, None)
  f, h, w = shape[1:4]
  return pipe._prepare_rotary_positional_embeddings(
    8 * h, 8 * w, f, torch.device("cpu")
  )


def _time_decode() -> list[dict[str, Any]]:
  """Time the decoder beside its convolutions."""
  networks = _networks(diffusers.AutoencoderKLCogVideoX, _VAE)
  z = np.random.default_rng(1).standard_normal(_VAE_LATENTS, np.float32)

  @jax.jit
  def decode(params, z):
    return networks.ours.apply({"params": params}, z, method="decode")

  scaled = jnp.asarray(z) * networks.ours.cfg.scale
  given = torch.tensor(z).permute(0, 4, 1, 2, 3).contiguous()

  @torch.no_grad()
  def theirs():
    return networks.theirs.decode(given).sample.permute(0, 2, 3, 4, 1)

  ours = lambda: decode(networks.params, scaled)
  with _Convolutions(networks.theirs) as calls:
    expected = theirs()
  _check_same("decode", ours(), expected)
  bare_ours, bare_theirs, work = _bare(calls.shapes)
  names = ("ours", "theirs", "bare ours", "bare theirs")
  runs = dict(zip(names, (ours, theirs, bare_ours, bare_theirs), strict=True))
  seconds = race.seconds(runs, _REPEATS.value)
  bare = {k: seconds[f"bare {k}"] for k in ("ours", "theirs")}
  rows = [_row("bare convolutions of decode", bare, None, work)]
  target = _DECODE * rows[0]["ratio"]
  return rows + [_row("decode", seconds, target, work)]


class _Convolutions:
  """Notes what a network's convolutions are called with, but for points."""

  def __init__(self, network: torch.nn.Module):
    self.shapes: collections.Counter = collections.Counter()
    kinds = torch.nn.Conv2d, torch.nn.Conv3d
    self._found = [m for m in network.modules() if isinstance(m, kinds)]

  def __enter__(self):
    self._hooks = [m.register_forward_pre_hook(self._note) for m in self._found]
    return self

  def __exit__(self, *_):
    for hook in self._hooks:
      hook.remove()

  def _note(self, module, args):
    kernel = tuple(module.weight.shape)
    if np.prod(kernel[2:]) > 1:
      key = tuple(args[0].shape), kernel, module.stride, module.padding
      self.shapes[key] += 1


def _bare(shapes: collections.Counter) -> tuple[Callable, Callable, int]:
  """All the convolutions, one by one: XLA's, torch's, FLOPs."""
  runs, work = [], 0
  for (x_shape, kernel_shape, stride, padding), count in shapes.items():
    x, kernel = torch.randn(x_shape), torch.randn(kernel_shape)
    *call, flop = _convolution(x, kernel, stride, padding)
    runs += [call] * count
    work += flop * count

  def ours():
    for run, _ in runs:
      run().block_until_ready()

  @torch.no_grad()
  def theirs():
    for _, run in runs:
      run()

  return ours, theirs, work


def _convolution(x, kernel, stride, padding):
  """One convolution in XLA, channels last, and in torch; and its FLOPs."""
  n = x.ndim - 2
  space = "DHW"[-n:]
  names = f"N{space}C", f"{space}IO", f"N{space}C"
  last = [0, *range(2, n + 2), 1]
  x_last = jnp.asarray(x.permute(*last).contiguous().numpy())
  kernel_last = kernel.permute(*range(2, n + 2), 1, 0).contiguous().numpy()

  def convolve(x, kernel):
    pads = [(p, p) for p in padding]
    return jax.lax.conv_general_dilated(
      x, kernel, stride, pads, dimension_numbers=names
    )

  kernel_last, compiled = jnp.asarray(kernel_last), jax.jit(convolve)
  function = getattr(torch.nn.functional, f"conv{n}d")
  return (
    lambda: compiled(x_last, kernel_last),
    lambda: function(x, kernel, None, stride, padding),
    flops.flops(convolve, x_last, kernel_last),
  )


def _check_same(name: str, ours: jax.Array, theirs: torch.Tensor) -> None:
  found, wanted = np.asarray(ours), theirs.numpy()
  error = np.linalg.norm(found - wanted) / np.linalg.norm(wanted)
  print(f"{name}: relative error {error:.1e}")
  if not error <= _MOST_ERROR:
    raise ValueError(f"{name} differs from diffusers' by {error:.3g}")


def _race(ours: Callable, theirs: Callable) -> dict[str, float]:
  return race.seconds({"ours": ours, "theirs": theirs}, _REPEATS.value)


def _row(
  name: str, seconds: dict[str, float], target: float | None, work: int
) -> dict[str, Any]:
  """Print a result and return it."""
  ours, theirs = seconds["ours"], seconds["theirs"]
  ratio = ours / theirs
  verdict = ""
  if target is not None:
    verdict = f" ({'at most' if ratio <= target else 'ABOVE'} {target:.3g})"
  print(
    f"{name}: ratio {ratio:.3f}{verdict}  JAX {ours:.4f} s "
    f"{work / ours / 1e9:.1f} GFLOP/s  PyTorch {theirs:.4f} s "
    f"{work / theirs / 1e9:.1f} GFLOP/s"
  )
  return {
    "name": name,
    "ratio": ratio,
    "target": target,
    "jax_seconds": ours,
    "torch_seconds": theirs,
    "gflop": work / 1e9,
  }


if __name__ == "__main__":
  app.run(main)
