"""Workdirs, checkpoints and releases: what a run leaves behind.

A workdir holds one run: `config.json` (fully resolved), `checkpoints/`
(Orbax), `tokenizer.model`, `metrics.jsonl` and `samples/`. Its path may be
local or `gs://`. One process writes; checkpoints are written by all.

A state is any pytree of arrays. It is stored by name, and is read back only
into a state of the same names, shapes and dtypes. A release is one
safetensors file with the params alone.
"""

import contextlib
import errno
import logging as std_logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
import safetensors.numpy
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from vdit_jax import inputs, strict_json, trees, writing
from vdit_jax.convert import files

_CONFIG = "config.json"
_CHECKPOINTS = "checkpoints"
_ITEM = "state"  # the folder of a checkpoint in which Orbax puts the arrays
_FULL = (errno.ENOSPC, errno.EDQUOT)
_STEP_NAMES = ocp.path.step.standard_name_format()  # lists committed steps


def prepare_workdir(
  workdir: epath.PathLike, config: ml_collections.ConfigDict
) -> epath.Path:
  """Create a workdir and write its config, whatever it had before.

  Args:
    workdir: folder of the run; made if it is not there.
    config: the run's config, fully resolved.

  Returns:
    The absolute path of the workdir.
  """
  workdir, text = writing.absolute(workdir), _to_json(config)
  if jax.process_index() == 0:
    for folder in (_CHECKPOINTS, "samples"):
      (workdir / folder).mkdir(parents=True, exist_ok=True)
    writing.write(workdir / _CONFIG, text)
  return workdir


def write_files(workdir: epath.PathLike, files: Mapping[str, bytes]) -> None:
  """Write files by name, each whole or not at all; process 0 alone does."""
  if jax.process_index() == 0:
    for name, content in files.items():
      writing.write(writing.absolute(workdir) / name, content)


def steps(workdir: epath.PathLike) -> list[int]:
  """List the steps of a workdir's checkpoints, from the first to the newest."""
  return _steps(writing.absolute(workdir) / _CHECKPOINTS)


def has_begun(workdir: epath.PathLike) -> bool:
  """Tell whether a folder is of a run that has something to go on from."""
  return (writing.absolute(workdir) / _CONFIG).exists() and bool(steps(workdir))


def read_config(workdir: epath.PathLike) -> ml_collections.ConfigDict:
  """Read a workdir's config; sequences come back as tuples."""
  workdir = writing.absolute(workdir)
  try:
    return ml_collections.ConfigDict(_tuples(_read_json(workdir)))
  # Of names that a ConfigDict has itself, and of values nested too deep.
  except (AttributeError, KeyError, TypeError, RecursionError) as error:
    reason = f"it is no config ({str(error)[:200]})"
    raise inputs.damaged(workdir / _CONFIG, reason) from error


def manager(
  workdir: epath.PathLike, keep: int = 2, keep_every: int | None = None
) -> ocp.CheckpointManager:
  """Open a workdir's checkpoints for writing, in the background.

  Args:
    workdir: folder of the run.
    keep: how many of the newest checkpoints are kept.
    keep_every: keep those whose step it divides for good; None is none.
  """
  _quieten_orbax()
  if keep < 1:
    raise ValueError(f"keep must be at least 1, got {keep}; try 2")
  options = ocp.CheckpointManagerOptions(
    max_to_keep=keep,
    keep_period=keep_every,
    create=True,
    cleanup_tmp_directories=True,
  )
  return ocp.CheckpointManager(
    writing.absolute(workdir) / _CHECKPOINTS, options=options
  )


def save(manager: ocp.CheckpointManager, step: int, state: Any) -> bool:
  """Start to save a state; the caller may donate it at once.

  Returns:
    Whether it is being saved: False if the newest checkpoint is of that step.

  Raises:
    ValueError: if there is a checkpoint of a later step, or no space for one.
  """
  latest = manager.latest_step()
  if latest == step:
    return False
  if latest is not None and latest > step:
    raise ValueError(
      f"step {step} is before step {latest}, which {manager.directory} has; "
      f"remove the checkpoints after {step} or use another workdir"
    )
  _check_space(manager.directory, step, state)
  args = ocp.args.Composite(**{_ITEM: ocp.args.PyTreeSave(state)})
  with _saying_that_it_is_full(manager, step):
    return manager.save(step, args=args)


def wait(manager: ocp.CheckpointManager) -> None:
  """Wait until what was started to be saved is saved; raise its errors."""
  with _saying_that_it_is_full(manager):
    manager.wait_until_finished()


def latest_step(manager: ocp.CheckpointManager) -> int | None:
  """Return the step of the newest checkpoint, None if there is none."""
  return manager.latest_step()


def restore(
  manager: ocp.CheckpointManager, abstract_state: Any, step: int | None = None
) -> Any:
  """Read a state into the given shardings.

  Without a step the newest checkpoint is read. If that one is damaged, the
  one before it is taken with a warning, and the damaged one is renamed to
  `<step>.unreadable`, since the run will come by its step again.

  Args:
    manager: of the workdir.
    abstract_state: the state with jax.ShapeDtypeStruct, sharding set, as
      leaves.
    step: which checkpoint; None is the newest one that can be read.

  Raises:
    ValueError: if the checkpoint holds another tree, listing all that is
      missing, left over or of another shape; or if none can be read.
  """

  def select(found: Any, folder: epath.Path) -> ocp.args.PyTreeRestore:
    trees.check_match(
      abstract_state,
      found,
      f"checkpoint {folder}",
      remedy="use the config that it was saved with, or another workdir",
    )
    args = ocp.checkpoint_utils.construct_restore_args(abstract_state)
    return ocp.args.PyTreeRestore(abstract_state, restore_args=args)

  wait(manager)
  state, unreadable = _restore(manager.directory, step, select)
  if unreadable:
    _put_aside(unreadable)
    manager.reload()
  return state


def restore_params(
  workdir: epath.PathLike, which: str = "ema", step: int | None = None
) -> dict[str, Any]:
  """Read one tree of a workdir's state alone, as numpy arrays.

  For sampling and evaluation, on any device; nothing else is read.

  Args:
    workdir: folder of the run.
    which: field of the state: "ema" or "params".
    step: which checkpoint; None is the newest one that can be read.
  """
  _quieten_orbax()

  def select(found: Any, folder: epath.Path) -> ocp.args.PyTreeRestore:
    if not found.get(which):
      names = ", ".join(sorted(name for name in found if found[name]))
      raise ValueError(
        f"which={which!r} is not in checkpoint {folder}; it has {names}"
      )
    part = {which: found[which]}
    args = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), part
    )
    return ocp.args.PyTreeRestore(part, restore_args=args, partial_restore=True)

  directory = writing.absolute(workdir) / _CHECKPOINTS
  state, _ = _restore(directory, step, select)
  what = f"{which} in {directory}, of step {step or 'the newest'},"
  trees.refuse_not_finite(what, trees.flatten(state[which]))
  return state[which]


def save_release(
  path: epath.PathLike,
  params: dict[str, Any],
  metadata: dict[str, str],
  dtype: Any = jnp.float16,
) -> None:
  """Write params as one safetensors file, whole or not at all.

  Args:
    path: the file.
    params: nested dict of arrays.
    metadata: what the file says of itself, strings by name.
    dtype: of the file's floating-point arrays, float16 or float32; others
      stay as they are.

  Raises:
    ValueError: if a finite number is too large for `dtype`.
  """
  if jnp.dtype(dtype) not in (jnp.float16, jnp.float32):
    raise ValueError(
      f"dtype of a release must be float16 or float32, got {jnp.dtype(dtype)}"
    )
  if bad := [k for k, v in metadata.items() if not isinstance(v, str)]:
    raise ValueError(f"metadata must be strings, {bad} are not; use json.dumps")
  flat = trees.flatten(params)
  arrays = {name: _narrow(name, x, dtype) for name, x in flat.items()}
  if jax.process_index() == 0:
    data = safetensors.numpy.save(arrays, metadata=metadata)
    writing.write(writing.absolute(path), data)


def load_release(
  path: epath.PathLike,
) -> tuple[dict[str, Any], dict[str, str]]:
  """Read a file of `save_release`: params as float32 numpy, and metadata.

  Raises:
    ValueError: if the file is not whole, or has numbers that are not finite.
  """
  path = writing.absolute(path)
  found = files.read(path)
  flat = {name: _widen(tensor.read()) for name, tensor in found.items()}
  trees.refuse_not_finite(f"path {path}", flat)
  return trees.unflatten(flat), files.metadata(path)


def _restore(
  directory: epath.Path,
  step: int | None,
  select: Callable[[Any, epath.Path], ocp.args.PyTreeRestore],
) -> tuple[Any, list[epath.Path]]:
  """Read the newest readable checkpoint, or the one of a step.

  `select` makes the arguments of the reading from the metadata of what there
  is, or raises: a checkpoint of another tree is not a damaged one.

  Returns:
    What was read, and the newer folders that could not be.
  """
  failed: dict[epath.Path, str] = {}
  handler = ocp.PyTreeCheckpointHandler()
  for folder in _candidates(directory, step):
    if failed:
      last, reason = list(failed.items())[-1]
      logging.warning("%s cannot be read (%s); using %s", last, reason, folder)
    found, reason = _attempt(lambda f=folder: _tree(handler, f))
    if not reason:
      args = select(found, folder)
      state, reason = _attempt(
        lambda f=folder, a=args: handler.restore(f / _ITEM, args=a)
      )
    if not reason:
      logging.info("restored %s", folder)
      return state, list(failed)
    failed[folder] = reason
  reasons = "\n  ".join(f"{folder}: {why}" for folder, why in failed.items())
  raise ValueError(f"no checkpoint can be read:\n  {reasons}")


def _candidates(directory: epath.Path, step: int | None) -> list[epath.Path]:
  """Return the committed folders to try, newest first."""
  steps = _steps(directory)[::-1]
  if not steps:
    raise ValueError(
      f"{directory} holds no checkpoint; train first, or mend the path"
    )
  if step is None:
    return [directory / str(n) for n in steps]
  if step not in steps:
    raise ValueError(f"step {step} is not in {directory}; it has {steps}")
  return [directory / str(step)]


def _tree(handler: ocp.PyTreeCheckpointHandler, folder: epath.Path) -> Any:
  """Return a checkpoint's tree with shapes and dtypes for arrays."""
  return handler.metadata(folder / _ITEM).tree


def _attempt(read: Callable[[], Any]) -> tuple[Any, str]:
  """Call `read`; return its value and "", or None and why it failed.

  All processes agree: what one of them could not read, none has read.
  """
  value, reason = None, ""
  try:
    value = read()
  except Exception as error:  # lost bytes show up as errors of any type
    text = (str(error).splitlines() or [""])[0][:200]
    reason = f"{type(error).__name__}: {text}"
  if jax.process_count() > 1:
    bad = multihost_utils.process_allgather(np.array(bool(reason)))
    if bad.any() and not reason:
      value, reason = None, "another process could not read it"
  return value, reason


def _put_aside(folders: list[epath.Path]) -> None:
  if jax.process_index() == 0:
    for folder in folders:
      aside = folder.with_name(folder.name + ".unreadable")
      logging.warning("renaming %s to %s", folder, aside.name)
      if aside.exists():
        aside.rmtree()
      folder.rename(aside)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices("put_aside")


def _steps(directory: epath.Path) -> list[int]:
  """List the steps of what is committed, in order."""
  found = _STEP_NAMES.find_all(directory) if directory.exists() else ()
  return sorted(metadata.step for metadata in found)


def _check_space(directory: epath.Path, step: int, state: Any) -> None:
  """Refuse to begin what the disk has not half the space for."""
  if writing.is_remote(directory):
    return
  needed = sum(
    np.dtype(x.dtype).itemsize * x.size for x in jax.tree.leaves(state)
  )
  if shutil.disk_usage(directory).free < needed / jax.process_count() / 2:
    raise _no_space(directory, step)


@contextlib.contextmanager
def _saying_that_it_is_full(
  manager: ocp.CheckpointManager, step: int | None = None
) -> Iterator[None]:
  """Say in a line where there is no space left; else all that Orbax says."""
  try:
    yield
  except Exception as error:  # lost bytes show up as errors of any type
    if not _is_full(error):
      raise
    making = manager.directory.glob("*.orbax-checkpoint-tmp*")
    found = [int(path.name.partition(".")[0]) for path in making]
    now = max(found, default=step or 0)
    raise _no_space(manager.directory, now) from error


def _no_space(directory: epath.Path, step: int) -> ValueError:
  return ValueError(
    f"no space left for checkpoint {step} in {directory}: free some and run "
    "the same command"
  )


def _is_full(error: BaseException | None) -> bool:
  """Tell whether a full disk, or a quota, is behind an error."""
  while error is not None:
    full = isinstance(error, OSError) and error.errno in _FULL
    if full or any(os.strerror(number) in str(error) for number in _FULL):
      return True
    error = error.__cause__ or error.__context__
  return False


def _read_json(workdir: epath.Path) -> dict[str, Any]:
  path = workdir / _CONFIG
  if not path.exists():
    names = (
      sorted(p.name for p in workdir.iterdir()) if workdir.is_dir() else []
    )
    raise ValueError(
      f"workdir {workdir} has no {_CONFIG}, it holds: "
      f"{', '.join(names[:20]) or 'nothing'}; a workdir is the folder that "
      f"training wrote, with {_CONFIG} and {_CHECKPOINTS}/ in it"
    )
  return inputs.read_json(path)


def _to_json(config: ml_collections.ConfigDict) -> str:
  try:
    fields = config.to_dict()
    return strict_json.dumps(fields, indent=2, sort_keys=True) + "\n"
  except TypeError as error:
    raise ValueError(
      f"config holds what JSON has no word for ({error}); use numbers, "
      "strings, tuples and dicts"
    ) from error


def _tuples(value: Any) -> Any:
  """Turn lists into tuples: a config's dataclasses must be hashable."""
  if isinstance(value, dict):
    return {k: _tuples(v) for k, v in value.items()}
  if isinstance(value, list):
    return tuple(_tuples(v) for v in value)
  return value


def _narrow(name: str, x: Any, dtype: Any) -> np.ndarray:
  """Cast to a release's dtype; in C order, since the bytes are written."""
  if isinstance(x, jax.Array) and not x.is_fully_addressable:
    x = multihost_utils.process_allgather(x, tiled=True)
  x = np.asarray(x, order="C")
  if not jnp.issubdtype(x.dtype, jnp.floating):
    return x
  limit = float(jnp.finfo(dtype).max)
  largest = float(np.max(np.abs(x), initial=0.0, where=np.isfinite(x)))
  if largest > limit:
    raise ValueError(
      f"params has {largest:g} in {name}, {jnp.dtype(dtype)} ends at "
      f"{limit:g}; use dtype=float32"
    )
  return x.astype(dtype)


def _widen(x: np.ndarray) -> np.ndarray:
  floating = jnp.issubdtype(x.dtype, jnp.floating)
  return x.astype(np.float32) if floating else np.array(x)


def _quieten_orbax() -> None:
  std_logging.getLogger("absl").addFilter(_is_worth_saying)
  std_logging.getLogger("asyncio").addFilter(_is_worth_saying)


def _is_worth_saying(record: std_logging.LogRecord) -> bool:
  """Drop what Orbax says below a warning: a dozen lines a checkpoint.

  And what its threads say of a full disk, a traceback an array: we say it.
  """
  of_orbax = f"{os.sep}orbax{os.sep}" in record.pathname
  if of_orbax and record.levelno < std_logging.WARNING:
    return False
  error = record.exc_info and record.exc_info[1]
  return not (
    (of_orbax or record.name == "asyncio") and _is_full(error or None)
  )
