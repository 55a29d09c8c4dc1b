"""Train an autoencoder or a denoiser.

  python train.py --config=configs/digits.py:vae --workdir=work/vae
  python train.py --config=configs/digits.py:dit --workdir=work/dit

Run the same command again to resume. flags -> mesh -> data -> state -> loop.
"""

import jax
import ml_collections
from absl import app, flags, logging
from etils import epath
from ml_collections import config_flags

from vdit_jax import checkpoint, optim, sharding
from vdit_jax.data import reading
from vdit_jax.training import loop, tasks
from vdit_jax.training import state as states

_CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "Folder of the run; may be gs://.", required=True
)

# What may change when a run is taken up again.
_MAY_CHANGE = (
  "mesh",
  "log_every",
  "checkpoint",
  "validation",
  "samples",
  "data.data_dir",
  "data.workers",
  "data.threads",
)


def main(argv):
  """Run the flags' config."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  logging.set_verbosity(logging.INFO)
  run(_CONFIG.value, _WORKDIR.value)


def run(config: ml_collections.ConfigDict, workdir: epath.PathLike) -> None:
  """Train a config's task in a workdir, from its last checkpoint on.

  Args:
    config: of a file in configs/.
    workdir: folder of the run; made if it is not there.

  Raises:
    ValueError: before any compute, for what cannot work.
  """
  mesh = sharding.make_mesh(sharding.MeshShape(**config.mesh))
  source = reading.open_source(config.data.name, "train", config.data.data_dir)
  task = tasks.make(config, source, workdir)
  workdir = checkpoint.prepare_workdir(
    workdir, task.config, may_change=_MAY_CHANGE
  )
  for name, content in task.files.items():
    (workdir / name).write_bytes(content)
  with jax.set_mesh(mesh):
    tx, rate = optim.make(optim.Optim(**config.optim))
    state, placed = states.create(task.init, tx, mesh, config.seed)
    manager = checkpoint.manager(
      workdir, config.checkpoint.keep, config.checkpoint.keep_every or None
    )
    if checkpoint.latest_step(manager) is not None:
      state = checkpoint.restore(manager, states.abstract(state))
    elif task.start:
      state = states.begin_from(state, task.start())
    step = states.make_step(
      task.loss, tx, rate, seed=config.seed, ema_decay=config.ema_decay
    )
    start = int(state.step)
    batches = reading.batches(
      source,
      task.tokenizer,
      seed=config.seed,
      start_step=start,
      num_steps=config.optim.total_steps - start,
      batch_size=config.batch_size,
      max_length=config.data.max_length,
      host=jax.process_index(),
      num_hosts=jax.process_count(),
      workers=config.data.workers,
      threads=config.data.threads,
    )
    state = loop.run(
      loop.Schedule(
        steps=config.optim.total_steps,
        log_every=config.log_every,
        checkpoint_every=config.checkpoint.every,
        hooks=task.hooks,
      ),
      state,
      states.jit_step(step, placed),
      task.frozen,
      batches,
      manager=manager,
      writer=loop.MetricWriter(workdir),
      sharding=sharding.batch_sharding(mesh),
    )
    task.finish(state)
  logging.info("done: %s", workdir)


if __name__ == "__main__":
  flags.mark_flags_as_required(["config"])
  app.run(main)
