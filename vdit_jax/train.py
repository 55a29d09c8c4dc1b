"""Train an autoencoder or a denoiser.

  python train.py --config=configs/digits.py:vae --workdir=work/vae
  python train.py --config=configs/digits.py:dit --workdir=work/dit

Run the same command again to resume. flags -> mesh -> data -> state -> loop.

On a TPU pod the same command starts on every host. Elsewhere each process is
told --coordinator=HOST:PORT --num_processes=N --process_id=I. Exit status 75:
the run was asked to leave (SIGTERM) and saved its step.
"""

import contextlib
import functools
import os
import sys
import time

import jax
import ml_collections
from absl import flags, logging
from etils import epath
from ml_collections import config_flags

from vdit_jax import checkpoint, encoding, launch, sharding, tool, types
from vdit_jax.data import buckets, plan, reading
from vdit_jax.training import (
  batching,
  calls,
  guards,
  journal,
  learner,
  loop,
  optim,
  preemption,
  resolve,
  tasks,
  tracing,
  utilisation,
)
from vdit_jax.training import state as states
from vdit_jax.weights import run_config

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; may be gs://.", required=True
)
_COORDINATOR = flags.DEFINE_string(
  "coordinator", None, "host:port of process 0; not needed on TPU pods."
)
_NUM_PROCESSES = flags.DEFINE_integer(
  "num_processes", None, "Processes of the run; not needed on TPU pods.", 1
)
_PROCESS_ID = flags.DEFINE_integer(
  "process_id", None, "Which process this is; not needed on TPU pods.", 0
)
_COMPILATION_CACHE = flags.DEFINE_string(
  "compilation_cache",
  os.environ.get("JAX_COMPILATION_CACHE_DIR", "~/.cache/vdit_jax/jax"),
  "Folder of compiled programs; may be gs://; empty keeps none.",
)

# What may change when a run is taken up again.
_MAY_CHANGE = (
  "mesh",
  "log_every",
  "checkpoint",
  "validation",
  "samples",
  "guard",
  "profile",
  "accumulate",
  "steps_a_call",
  "text_encoder_dir",  # another encoder's fingerprint is refused
  "data.data_dir",
  "data.workers",
  "data.threads",
  "data.max_unreadable",
)


def main(argv: list[str]) -> None:
  """Run the flags' config."""
  tool.no_arguments(argv)
  logging.set_verbosity(logging.INFO)
  launch.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
  launch.cache_compiled(_COMPILATION_CACHE.value)
  with launch.ending_together():
    try:
      run(_CONFIG.value, _WORKDIR.value)
    except preemption.Preempted as error:
      logging.warning("%s; exit status %d", error, launch.PREEMPTED)
      sys.exit(launch.PREEMPTED)


def run(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> None:
  """Train a config's task in a workdir, from its last checkpoint on.

  Args:
    config: of a file in configs/.
    workdir: folder of the run; made if it is not there.

  Raises:
    ValueError: before any compute, for what cannot work.
    preemption.Preempted: if the run was asked to leave; its state is saved.
  """
  started = time.perf_counter()
  guard = guards.Guard(**config.guard)
  traced = tracing.parse(config.profile.steps)
  calls.check(config.steps_a_call, _intervals(config), traced)
  mesh = sharding.make_mesh(sharding.MeshShape(**config.mesh))
  placed = sharding.batch_sharding(mesh)
  source = batching.open_source(config, config.data.split)
  parts = loop.number_of_parts(placed)
  config = resolve.complete(config, source, workdir, parts)
  task = tasks.make(config, source, workdir)
  calls.check_shapes(config.steps_a_call, len(task.plan.buckets))
  share = batching.share(placed, task.plan, config.accumulate)
  logging.info("batches:\n%s", task.report)
  workdir = checkpoint.prepare_workdir(
    workdir, config, may_change=_MAY_CHANGE, upgrade=run_config.upgrade
  )
  checkpoint.write_files(workdir, task.files | batching.file(task.report))
  with (
    jax.set_mesh(mesh),
    contextlib.closing(journal.MetricWriter(workdir)) as writer,
  ):
    state, step, manager = _begin(config, task, mesh, workdir)
    _compile(task, source, step, state, placed)
    tally, n = reading.Tally(), config.steps_a_call
    calls.check_step(n, int(state.step))
    batches = _batches(config, task, source, share, int(state.step), tally)
    peak = utilisation.peak_flops(mesh)
    state = loop.run(
      _schedule(config, task, guard),
      state,
      step,
      task.frozen,
      calls.stack(batches, n),
      manager=manager,
      writer=writer,
      sharding=calls.sharding(placed, n),
      meter=journal.Meter(started, peak, tally.metrics),
      work=calls.work(
        _work(config, task, state, with_flops=peak is not None), n
      ),
      tracer=tracing.Tracer(traced, workdir / "profile"),
    )
    task.finish(state)
  logging.info("done: %s", workdir)


def _intervals(config) -> dict[str, int]:
  """Steps after which something happens, by the config's fields."""
  fields = {
    "optim.total_steps": config.optim.total_steps,
    "log_every": config.log_every,
    "checkpoint.every": config.checkpoint.every,
    "checkpoint.keep_every": config.checkpoint.keep_every,
    "validation.every": config.validation.every,
  }
  if "samples" in config:
    fields["samples.every"] = config.samples.every
  return {name: steps for name, steps in fields.items() if steps > 0}


def _begin(config, task: tasks.Task, mesh, workdir: epath.Path):
  """Make the state to go on from, the jitted step and the checkpoints."""
  tx, rate = optim.make(optim.Optim(**config.optim))
  manager = checkpoint.manager(
    workdir, config.checkpoint.keep, config.checkpoint.keep_every or None
  )
  if checkpoint.latest_step(manager) is not None:
    wanted, placed = states.describe(task.init, tx, mesh)
    state = checkpoint.restore(manager, wanted)
  else:
    state, placed = states.create(task.init, tx, mesh, config.seed)
    if task.start:
      state = states.begin_from(state, task.start())
  step = learner.make_step(config, task.loss, tx, rate)
  step = calls.repeat(step, config.steps_a_call)
  return state, states.jit_step(step, placed), manager


def _compile(task, source, step, state, placed) -> None:
  """Compile the step for each bucket, so that what does not fit says so now.

  One shape alone is compiled by its first step.
  """
  if len(task.plan.buckets) == 1:
    return
  for bucket in task.plan.buckets:
    began = time.perf_counter()
    batch = _example(task, source, bucket, placed)
    step.lower(state, task.frozen, batch).compile()
    seconds = time.perf_counter() - began
    name = buckets.name(bucket.shape)
    logging.info("compiled bucket %s in %.1f s", name, seconds)


def _example(task, source, bucket, placed) -> types.Batch:
  """Describe a batch of a bucket, by a batch of one of its records."""
  loaded = reading.load(
    source, task.wanted, bucket.positions[:1], bucket.shape, None
  )
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      (bucket.batch_size, *x.shape[1:]), x.dtype, sharding=placed
    ),
    loaded.batch,
  )


def _batches(config, task, source, share: tuple[int, int], start: int, tally):
  """Read this process' share of the batches from a step on."""
  return reading.batches(
    source,
    task.wanted,
    range(start, config.optim.total_steps),
    seed=config.seed,
    planned=functools.partial(plan.batch, task.plan),
    share=share,
    workers=config.data.workers,
    threads=config.data.threads,
    tally=tally,
  )


def _work(config, task: tasks.Task, state, with_flops: bool):
  """Make what counts the work of a batch's step."""
  modules = learner.make(config).modules

  def tokens(batch: types.Batch) -> int:
    latents = encoding.latents_of(modules, batch)
    return batch.weight.shape[0] * learner.tokens(modules, latents)

  return utilisation.counter(
    task.loss, state.params, task.frozen, tokens, with_flops
  )


def _schedule(config, task: tasks.Task, guard: guards.Guard) -> loop.Schedule:
  return loop.Schedule(
    steps=config.optim.total_steps,
    log_every=config.log_every,
    checkpoint_every=config.checkpoint.every,
    hooks=task.hooks,
    guard=guard,
    steps_a_call=config.steps_a_call,
  )


flags.mark_flags_as_required(["config"])

if __name__ == "__main__":
  tool.run(main)
