"""Compare joint with factorised attention: same data, parameters and steps.

  python -m benchmarks.joint_factorised --workdir=work/ab

on `moving_digits/fast`, whose digits cross more than one patch in a latent
frame: what was at one place is at another place in the next. Trains an
autoencoder, unless one is given, and both arms, evaluates them on held-out
prompts, times a training step of each in turns, and prints a table. Run again,
it goes on where it was.
"""

import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from etils import epath

from vdit_jax import checkpoint, encoding, sharding, types
from vdit_jax.cost import flops
from vdit_jax.models import networks
from vdit_jax.models.vdit import denoiser as vdit
from vdit_jax.training import denoiser, optim
from vdit_jax.training import learner as learners
from vdit_jax.training import state as states
from vdit_jax.weights import workdir as workdirs

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder.", required=True)
_AUTOENCODER = flags.DEFINE_string(
  "autoencoder", None, "Workdir or release of one to take, not to train one."
)
_VAE_STEPS = flags.DEFINE_integer("vae_steps", 1_500, "Of the autoencoder.")
_STEPS = flags.DEFINE_integer("steps", 4_000, "Of each arm.")
_PROMPTS = flags.DEFINE_integer("num_prompts", 144, "Held-out prompts.")

_DATA = "moving_digits/fast"
_LATENTS = "latents/fast"
_METRICS = (
  "identity",
  "colour",
  "direction",
  "all",
  "consistency",
  "appearance",
  "validation_loss",
)


def main(argv):
  """Train what is missing, evaluate, time, print."""
  del argv
  logging.set_verbosity(logging.INFO)
  root = epath.Path(_WORKDIR.value)
  prepare(root)
  rows = {}
  for arm in vdit.ATTENTION:
    train_arm(root, arm)
    rows[arm] = evaluate_arm(root, arm)
  for arm, numbers in time_steps(root).items():
    rows[arm] |= numbers
  text = table(rows)
  (root / "joint_factorised.md").write_text(text)
  (root / "joint_factorised.json").write_text(json.dumps(rows, indent=2))
  print(text)


def prepare(root: epath.Path) -> None:
  """Build the dataset, its tokenizer, the autoencoder and the latents."""
  data = root / "data"
  _module("data.moving_digits", "--config=fast", f"--data_dir={data}")
  for arm in vdit.ATTENTION:
    out = f"--out={root / arm / workdirs.TOKENIZER_FILE}"
    _module("data.tokenizer", f"--data={_DATA}", f"--data_dir={data}", out)
  if not _AUTOENCODER.value:
    _train(
      "--config=configs/digits.py:vae",
      f"--workdir={root / 'vae'}",
      f"--config.data.data_dir={data}",
      f"--config.data.name={_DATA}",
      f"--config.optim.total_steps={_VAE_STEPS.value}",
    )
  _module(
    "cache",
    f"--autoencoder={_autoencoder(root)}",
    f"--data={_DATA}",
    f"--data_dir={data}",
    f"--name={_LATENTS}",
  )


def train_arm(root: epath.Path, arm: str) -> None:
  """Train one arm; only `denoiser.attention` differs."""
  _train(
    "--config=configs/digits.py:dit",
    f"--workdir={root / arm}",
    f"--config.data.data_dir={root / 'data'}",
    f"--config.data.name={_LATENTS}",
    f"--config.autoencoder_workdir={_autoencoder(root)}",
    f"--config.optim.total_steps={_STEPS.value}",
    f"--config.denoiser.attention={arm}",
    "--config.sampling.height=48",
    "--config.sampling.width=48",
  )


def _autoencoder(root: epath.Path) -> epath.Path:
  return epath.Path(_AUTOENCODER.value or root / "vae")


def evaluate_arm(root: epath.Path, arm: str) -> dict[str, float]:
  """Evaluate one arm: metric -> value, and its 95 % interval."""
  out = root / f"{arm}.json"
  _module(
    "evaluate",
    f"--checkpoint={root / arm}",
    f"--data={_DATA}",
    f"--data_dir={root / 'data'}",
    f"--json={out}",
    "--metrics=loss,vae,digits",
    f"--num_prompts={_PROMPTS.value}",
  )
  results = json.loads(out.read_text())
  return {name: results[name] for name in _METRICS}


def time_steps(root: epath.Path, repeats: int = 15) -> dict[str, dict]:
  """Time a training step of each arm in turns; count a forward's FLOPs."""
  arms = {arm: _step(root / arm) for arm in vdit.ATTENTION}
  seconds = {arm: [] for arm in arms}
  for i in range(repeats + 1):
    for arm, (run, _, _) in arms.items():
      start = time.perf_counter()
      run()
      if i:  # the first compiles
        seconds[arm].append(time.perf_counter() - start)
  return {
    arm: {
      "seconds_a_step": float(np.median(seconds[arm])),
      "gflops_a_step": 3 * forward / 1e9,
      "parameters": parameters,
    }
    for arm, (_, forward, parameters) in arms.items()
  }


def _step(workdir: epath.Path):
  """Make one arm's real training step on random latents, with its state."""
  config = checkpoint.read_config(workdir)
  modules, goal = networks.build(config), learners.objective(config)
  tx, rate = optim.make(optim.Optim(**config.optim))
  mesh = sharding.make_mesh(sharding.MeshShape())
  state, placed = states.create(
    lambda key: networks.init_denoiser(modules, key), tx, mesh, 0
  )
  loss = denoiser.make_loss(modules, goal)
  step = states.jit_step(
    states.make_step(loss, tx, rate, seed=0, ema_decay=config.ema_decay),
    placed,
  )
  batch = _batch(config)
  forward = _flops(modules, config, batch)
  held = [state]

  def run() -> None:
    held[0], metrics = step(held[0], {}, batch)
    jax.block_until_ready(metrics)

  count = sum(x.size for x in jax.tree.leaves(state.params))
  return run, forward, count


def _batch(config) -> types.Batch:
  B, M = config.batch_size, config.data.max_length
  sampling = config.sampling
  autoencoder = networks.build_module(config.autoencoder, "autoencoder")
  size = sampling.num_frames, sampling.height, sampling.width
  shape = B, *autoencoder.latent_shape(*size)
  moments = jax.random.normal(jax.random.key(0), shape), jnp.zeros(shape)
  tokens, mask = jnp.ones((B, M), jnp.int32), jnp.ones((B, M), bool)
  captions = {"text_encoder": types.Captions(mask=mask, tokens=tokens)}
  return types.Batch(None, jnp.ones(B), captions, moments)


def _flops(modules, config, batch) -> float:
  """Matmul FLOPs of a forward pass: of both kinds of block, averaged.

  The count takes the larger branch of the choice between attention inside
  frames and along time; here, half of the layers each are either.
  """
  x = batch.moments[0]
  abstract = jax.eval_shape(
    lambda: networks.init_denoiser(modules, jax.random.key(0))
  )

  def forward(params):
    text = encoding.encode_captions(modules, params, batch.captions)
    t = jnp.zeros(x.shape[0])
    return modules.denoiser.apply({"params": params["denoiser"]}, x, t, text)

  total = flops.flops(forward, abstract)
  cfg = modules.denoiser.cfg
  if cfg.attention == "joint":
    return total
  f, h, w = (n // p for n, p in zip(x.shape[1:4], cfg.patch, strict=True))
  tokens = x.shape[0] * f * h * w
  larger, smaller = max(h * w, f), min(h * w, f)
  return total - cfg.depth // 2 * 4 * tokens * cfg.width * (larger - smaller)


def table(rows: dict[str, dict]) -> str:
  """Lay the arms side by side as a Markdown table."""
  lines = ["| | " + " | ".join(rows) + " |", "|---" * (len(rows) + 1) + "|"]
  for name in next(iter(rows.values())):
    cells = " | ".join(_cell(row[name]) for row in rows.values())
    lines.append(f"| {name} | {cells} |")
  return "\n".join(lines) + "\n"


def _cell(value) -> str:
  if not isinstance(value, dict):
    return f"{value:,.3f}" if isinstance(value, float) else f"{value:,}"
  if value["ci95"] is None:
    return f"{value['value']:.4f}"
  low, high = value["ci95"]
  return f"{value['value']:.3f} ({low:.3f}-{high:.3f})"


def _module(name: str, *arguments: str) -> None:
  _run("-m", f"vdit_jax.{name}", *arguments)


def _train(*arguments: str) -> None:
  _run("train.py", *arguments)


def _run(*arguments: str) -> None:
  logging.info("%s", " ".join(arguments))
  subprocess.run([sys.executable, *arguments], check=True)


if __name__ == "__main__":
  app.run(main)
