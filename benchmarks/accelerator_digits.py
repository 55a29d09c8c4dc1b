"""The digits of `benchmarks.accelerator`: steps a call, trainings, scores.

The autoencoder is the packaged one, so that latents are those its denoiser was
trained on. What is trained goes on from its checkpoints.
"""

import json
import pathlib
import subprocess
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import accelerator_case as cases
from benchmarks import rows
from configs import digits
from vdit_jax import sharding
from vdit_jax.training import calls, learner, optim
from vdit_jax.training import state as states

_ITEM = flags.DEFINE_string("item", None, "What to run.", required=True)
_SCRATCH = flags.DEFINE_string("scratch", None, "Folder.", required=True)
_JSON = flags.DEFINE_string("json", None, "File to write.", required=True)
_TINY = flags.DEFINE_bool("tiny", False, "Sizes for a CPU.")

_ROOT = pathlib.Path(__file__).resolve().parent.parent
_RELEASED = str(_ROOT / "vdit_jax" / "packaged")
_A_CALL = (1, 10, 50)
_SCORES = ("identity", "colour", "direction", "all", "consistency")


def main(argv):
  """Run one item."""
  del argv
  scratch = pathlib.Path(_SCRATCH.value).absolute()
  kind, _, what = _ITEM.value.partition("_")
  kept = rows.Rows(_JSON.value, {"jax": jax.__version__})
  if kind == "arms":
    kept.add(what, **_arm(scratch, what))
  elif what == "steps":
    _steps(kept)
  elif what == "data":
    kept.add("data", **_data(scratch, _names()[0]))
  elif what == "train":
    kept.add("train", **_train(scratch, scratch / "dit", _names()[0], _many()))
  else:
    kept.add("scores", **_score(scratch, scratch / "dit", _names()[0]))
  kept.done()


def _names() -> tuple[str, str]:
  """Datasets of the packaged model and of the arms."""
  return ("tiny", "tiny") if _TINY.value else ("mixed", "fast")


def _many() -> int:
  return 4 if _TINY.value else 6_000


def _steps(kept: rows.Rows) -> None:
  """Time the denoiser's step, several a call; compare the bits."""
  mesh = sharding.make_mesh(sharding.MeshShape(data=1), jax.devices()[:1])
  ends = {}
  with jax.set_mesh(mesh):
    for dtype in ("float32", "bfloat16"):
      for n in (1, 2) if _TINY.value else _A_CALL:
        seconds, ends[dtype, n] = _time_steps(mesh, dtype, n)
        kept.add(f"{dtype}, {n} a call", steps_per_second=n / seconds)
      again = _time_steps(mesh, dtype, 1, timed=False)[1]
      first = ends.pop((dtype, 1))
      kept.add(f"{dtype}, 1 a call again", **_compare(first, again))
      for (_, n), end in ends.items():
        kept.add(f"{dtype}, {n} a call, bits", **_compare(first, end))
      ends.clear()


def _time_steps(mesh, dtype: str, n: int, timed: bool = True):
  """Seconds of a call of n steps, and the weights after 50 steps."""
  config = digits.get_config("dit")
  config.denoiser.dtype = config.text_encoder.dtype = dtype
  learned = learner.make(config)
  tx, rate = optim.make(optim.Optim(**config.optim))
  state, placed = states.create(learned.init, tx, mesh, 0)
  step = learner.make_step(config, learned.loss, tx, rate)
  step = states.jit_step(calls.repeat(step, n), placed)
  described = learner.batch(config, 9, 32, 32)
  frozen = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), sharding.place(mesh, learned.frozen)
  )
  batches = [_fill(described, i, n) for i in range(0, _until(), n)]
  for batch in batches:
    state, metrics = step(state, frozen, batch)
  end = jax.tree.map(np.asarray, state.params)
  if not timed:
    return None, end

  def run():
    nonlocal state
    state, metrics = step(state, frozen, batches[0])
    return metrics

  return cases.seconds(run, jax.block_until_ready)["median"], end


def _until() -> int:
  return 2 if _TINY.value else 50


def _fill(described: Any, step: int, n: int) -> Any:
  """Draw the batches of n steps from one on."""

  def draw(x, step):
    rng = np.random.default_rng(step)
    if jnp.issubdtype(x.dtype, jnp.floating):
      return rng.standard_normal(x.shape, np.float32).astype(x.dtype)
    return np.ones(x.shape, x.dtype)

  each = [
    jax.tree.map(lambda x: draw(x, i), described)  # noqa: B023
    for i in range(step, step + n)
  ]
  if n == 1:
    return jax.tree.map(jnp.asarray, each[0])
  return jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *each)


def _compare(first: Any, other: Any) -> dict[str, Any]:
  pairs = list(zip(jax.tree.leaves(first), jax.tree.leaves(other), strict=True))
  return {
    "same_bits": all(np.array_equal(a, b) for a, b in pairs),
    "most_difference": max(float(np.max(np.abs(a - b))) for a, b in pairs),
  }


def _data(scratch: pathlib.Path, name: str) -> dict[str, Any]:
  """Make clips, a tokenizer and latents."""
  began = time.monotonic()
  folder = f"--data_dir={scratch / 'data'}"
  source = f"--data=moving_digits/{name}"
  _run("-m", "vdit_jax.data.moving_digits", f"--config={name}", folder)
  made = time.monotonic()
  tokens = f"--out={scratch / f'{name}.model'}"
  _run("-m", "vdit_jax.data.tokenizer", source, folder, tokens)
  _run(
    *("-m", "vdit_jax.cache", f"--autoencoder={_RELEASED}", source, folder),
    f"--name=latents/{name}",
  )
  return {
    "clips_seconds": made - began,
    "latents_seconds": time.monotonic() - made,
  }


def _train(
  scratch: pathlib.Path, workdir: pathlib.Path, name: str, steps: int, *more
) -> dict[str, Any]:
  """Train on cached latents."""
  began = time.monotonic()
  data = scratch / "data"
  workdir.mkdir(exist_ok=True)
  tokens = workdir / "tokenizer.model"
  if not tokens.exists():
    tokens.write_bytes((scratch / f"{name}.model").read_bytes())
  n = 2 if _TINY.value else 50
  _run(
    str(_ROOT / "train.py"),
    f"--config={_ROOT / 'configs/digits.py'}:dit",
    f"--workdir={workdir}",
    f"--config.data.data_dir={data}",
    f"--config.data.name=latents/{name}",
    f"--config.autoencoder_workdir={_RELEASED}",
    f"--config.optim.total_steps={steps}",
    f"--config.optim.warmup_steps={min(100, steps // 2)}",
    f"--config.steps_a_call={n}",
    f"--config.log_every={min(500, steps)}",
    f"--config.checkpoint.every={min(1_000, steps)}",
    f"--config.data.workers={0 if _TINY.value else 8}",
    "--config.validation.every=0",
    "--config.samples.every=0",
    *more,
  )
  lines = (workdir / "metrics.jsonl").read_text().splitlines()
  logged = [json.loads(line) for line in lines]
  rates = [row for row in logged if "steps_per_second" in row]
  keys = ("steps_per_second", "data_wait_share", "goodput", "loss", "mfu")
  # Of the first the most was compiling.
  last = {k: rates[-1][k] for k in keys if k in rates[-1]}
  return last | {
    "steps": steps,
    "train_seconds": time.monotonic() - began,
  }


def _score(scratch, workdir, name: str, metrics="loss,vae,digits"):
  """Evaluate on held-out prompts."""
  out = workdir / "scores.json"
  _run(
    *("-m", "vdit_jax.evaluate", f"--checkpoint={workdir}"),
    f"--data=moving_digits/{name}",
    f"--data_dir={scratch / 'data'}",
    f"--json={out}",
    f"--metrics={'loss' if _TINY.value else metrics}",
    f"--num_prompts={4 if _TINY.value else 144}",
  )
  found = json.loads(out.read_text())
  scores = {k: found[k] for k in (*_SCORES, "validation_loss") if k in found}
  return {k: f"{v['value']:.4f} {v.get('ci95')}" for k, v in scores.items()}


def _arm(scratch: pathlib.Path, arm: str) -> dict[str, Any]:
  """Train an arm of joint against factorised attention, and evaluate it."""
  name = _names()[1]
  _data(scratch, name)
  more = (
    f"--config.denoiser.attention={arm}",
    "--config.sampling.height=48",
    "--config.sampling.width=48",
  )
  steps = 4 if _TINY.value else 4_000
  workdir = scratch / arm
  found = _train(scratch, workdir, name, steps, *more)
  return found | _score(scratch, workdir, name, "loss,digits")


def _run(*arguments: str) -> None:
  subprocess.run([sys.executable, *arguments], check=True)


if __name__ == "__main__":
  app.run(main)
