"""Train an autoencoder or a denoiser.

  python train.py --config=configs/digits.py:vae --workdir=work/vae
  python train.py --config=configs/digits.py:dit --workdir=work/dit

Run the same command again to resume. flags -> mesh -> data -> state -> loop.

On a TPU pod the same command starts on every host. Elsewhere each process is
told --coordinator=HOST:PORT --num_processes=N --process_id=I. Exit status 75:
the run was asked to leave (SIGTERM) and saved its step.
"""

import contextlib
import dataclasses
import functools
import os
import sys
import time
from typing import Any

import jax
import ml_collections
from absl import flags, logging
from etils import epath

from vdit_jax import (
  checkpoint,
  config_flag,
  encoding,
  launch,
  sharding,
  tool,
  types,
  writing,
)
from vdit_jax.data import buckets, plan, reading
from vdit_jax.training import (
  batching,
  calls,
  fields,
  guards,
  journal,
  learner,
  lock,
  loop,
  optim,
  preemption,
  processes,
  resolve,
  resume,
  tasks,
  tracing,
  utilisation,
)
from vdit_jax.training import state as states

_CONFIG = config_flag.define()
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
    ValueError: before any compute, for what cannot work; the workdir is left
      as it was.
    preemption.Preempted: if the run was asked to leave; its state is saved.
  """
  started = time.perf_counter()
  fields.check(config)
  optim.make(optim.Optim(**config.optim))  # refuses what it cannot make
  guard = guards.Guard(**config.guard)
  traced = tracing.parse(config.profile.steps)
  calls.check(config.steps_a_call, _intervals(config), traced)
  mesh = sharding.make_mesh(sharding.MeshShape(**config.mesh))
  with lock.held(workdir) as held:
    workdir = writing.absolute(workdir)
    start = _settle(config, workdir, sharding.batch_sharding(mesh))
    config, task = start.config, start.task
    held.claim()
    with jax.set_mesh(mesh):
      state, program, manager = _begin(start, workdir, mesh)
      step = int(state.step)
      _write(start, workdir, step)
      tally, peak = reading.Tally(), utilisation.peak_flops(mesh)
      with contextlib.closing(journal.MetricWriter(workdir, step)) as writer:
        state = loop.run(
          _schedule(config, task, guard),
          program,
          state,
          calls.stack(_batches(start, step, tally), config.steps_a_call),
          loop.Outputs(
            manager=manager or _manager(config, workdir),
            writer=writer,
            meter=journal.Meter(started, peak, tally.metrics),
            tracer=tracing.Tracer(traced, workdir / "profile"),
            held=held,
          ),
        )
        task.finish(state)
  logging.info("done: %s", workdir)


@dataclasses.dataclass(frozen=True)
class _Start:
  """What is settled of a start before anything is computed or written.

  Attributes:
    config: completed.
    source: of the records.
    task: of the config.
    share: of every batch that this process feeds, of how many.
    stands_on, changed: see `resume.check`.
    code: that runs.
  """

  config: ml_collections.ConfigDict
  source: reading.Source
  task: tasks.Task
  share: tuple[int, int]
  stands_on: dict[str, str]
  changed: dict[str, tuple[Any, Any]]
  code: str


def _settle(config, workdir: epath.Path, placed) -> _Start:
  """Complete the config, and refuse what cannot work."""
  source = batching.open_source(config, config.data.split)
  parts = loop.number_of_parts(placed)
  config = resolve.complete(config, source, workdir, parts)
  stands_on = resolve.stands_on(config, source, workdir)
  code = processes.code()
  processes.check_same(resume.flat(config) | stands_on | {"code": code})
  changed = resume.check(workdir, config, stands_on)
  task = tasks.make(config, source, workdir)
  calls.check_shapes(config.steps_a_call, len(task.plan.buckets))
  share = batching.share(placed, task.plan, config.accumulate)
  logging.info("batches:\n%s", task.report)
  return _Start(config, source, task, share, stands_on, changed, code)


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


def _begin(start: _Start, workdir: epath.Path, mesh):
  """Make the state to go on from, the compiled step, and the checkpoints.

  The checkpoints are None where there are none yet, so nothing is written.
  """
  config, task, manager = start.config, start.task, None
  tx, rate = optim.make(optim.Optim(**config.optim))
  wanted, placed = states.describe(task.init, tx, mesh)
  states.check_memory(wanted)
  if checkpoint.has_begun(workdir):
    manager = _manager(config, workdir)
    state = checkpoint.restore(manager, wanted)
  else:
    state, placed = states.create(task.init, tx, mesh, config.seed)
    if task.start:
      state = states.begin_from(state, task.start())
  _check_step(config, int(state.step))
  step = learner.make_step(config, task.loss, tx, rate)
  step = states.jit_step(calls.repeat(step, config.steps_a_call), placed)
  batch = sharding.batch_sharding(mesh)
  _compile(task, start.source, step, state, batch)
  with_flops = utilisation.peak_flops(mesh) is not None
  work = calls.work(_work(config, task, state, with_flops), config.steps_a_call)
  batches = calls.sharding(batch, config.steps_a_call)
  return state, loop.Program(step, task.frozen, batches, work), manager


def _check_step(config, step: int) -> None:
  """Refuse to go on from a step that the config does not come to."""
  calls.check_step(config.steps_a_call, step)
  if step > config.optim.total_steps:
    raise ValueError(
      f"optim.total_steps must be at least {step}, the step of the newest "
      f"checkpoint, got {config.optim.total_steps}; raise it, or use another "
      "workdir"
    )


def _manager(config, workdir: epath.Path):
  every = config.checkpoint.keep_every or None
  return checkpoint.manager(workdir, config.checkpoint.keep, every)


def _write(start: _Start, workdir: epath.Path, step: int) -> None:
  """Write what the workdir has before training; log what has changed."""
  for line in resume.lines(start.changed, step):
    logging.info("%s", line)
  resume.write(workdir, step, start.changed, start.stands_on, start.code)
  files = start.task.files | batching.file(start.task.report)
  checkpoint.write_files(workdir, files)
  checkpoint.prepare_workdir(workdir, start.config)


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


def _batches(start: _Start, step: int, tally):
  """Read this process' share of the batches from a step on."""
  config, task = start.config, start.task
  return reading.batches(
    start.source,
    task.wanted,
    range(step, config.optim.total_steps),
    seed=config.seed,
    planned=functools.partial(plan.batch, task.plan),
    share=start.share,
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


if __name__ == "__main__":
  tool.run(main)
