"""Workdirs, checkpoints and releases: what a run leaves behind.

A workdir holds one run: `config.json` (fully resolved), `checkpoints/`
(Orbax), `tokenizer.model`, `metrics.jsonl` and `samples/`. Its path may be
local or `gs://`. One process writes; checkpoints are written by all.

A state is any pytree of arrays. It is stored by name, and is read back only
into a state of the same names, shapes and dtypes. A release is one
safetensors file with the params alone.
"""

import json
import logging as std_logging
import os
from collections.abc import Callable, Mapping
from typing import Any

import flax.traverse_util
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
import safetensors
import safetensors.numpy
from absl import logging
from etils import epath
from jax.experimental import multihost_utils

from vdit_jax import trees, writing

_CONFIG = "config.json"
_CHECKPOINTS = "checkpoints"
_ITEM = "state"  # the folder of a checkpoint in which Orbax puts the arrays
_STEP_NAMES = ocp.path.step.standard_name_format()  # lists committed steps


def prepare_workdir(
  workdir: epath.PathLike,
  config: ml_collections.ConfigDict,
  may_change: tuple[str, ...] = (),
  upgrade: Callable[[dict[str, Any]], dict[str, Any]] = lambda old: old,
) -> epath.Path:
  """Create a workdir, or take one up again with the config that it has.

  Args:
    workdir: folder of the run; made if it is not there.
    config: the run's config, fully resolved.
    may_change: dotted keys that may differ from an earlier run's ("log" or
      "log.every_steps"); a key stands for everything below it.
    upgrade: config of a run of an earlier version -> the same run's today;
      such a run goes on with that.

  Returns:
    The absolute path of the workdir.

  Raises:
    ValueError: if the workdir is of another config; lists what differs.
  """
  workdir = writing.absolute(workdir)
  text = _to_json(config)
  if (workdir / _CONFIG).exists():
    old = upgrade(_read_json(workdir))
    _check_same_config(workdir, old, json.loads(text), may_change)
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


def is_workdir(path: epath.PathLike) -> bool:
  """Tell whether a folder is the workdir of a run that has begun."""
  return (writing.absolute(path) / _CONFIG).exists()


def read_config(workdir: epath.PathLike) -> ml_collections.ConfigDict:
  """Read a workdir's config; sequences come back as tuples."""
  workdir = writing.absolute(workdir)
  return ml_collections.ConfigDict(_tuples(_read_json(workdir)))


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
    ValueError: if there is a checkpoint of a later step.
  """
  latest = manager.latest_step()
  if latest == step:
    return False
  if latest is not None and latest > step:
    raise ValueError(
      f"step {step} is before step {latest}, which {manager.directory} has; "
      f"remove the checkpoints after {step} or use another workdir"
    )
  args = ocp.args.Composite(**{_ITEM: ocp.args.PyTreeSave(state)})
  return manager.save(step, args=args)


def wait(manager: ocp.CheckpointManager) -> None:
  """Wait until what was started to be saved is saved; raise its errors."""
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

  state, _ = _restore(writing.absolute(workdir) / _CHECKPOINTS, step, select)
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
  """Read a file of `save_release`: params as float32 numpy, and metadata."""
  path = writing.absolute(path)
  if not path.exists():
    raise ValueError(f"path {path} of a release does not exist")
  data = path.read_bytes()
  try:
    flat = safetensors.numpy.load(data)
  except (safetensors.SafetensorError, KeyError) as error:
    raise ValueError(
      f"path {path} is not a whole release ({type(error).__name__}: {error}); "
      f"it has {len(data)} bytes: fetch it again"
    ) from error
  # A safetensors file begins with the header's size and the header, JSON.
  header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
  wide = {name: _widen(x) for name, x in flat.items()}
  return trees.unflatten(wide), header.get("__metadata__", {})


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
  found = _STEP_NAMES.find_all(directory) if directory.exists() else ()
  steps = sorted((metadata.step for metadata in found), reverse=True)
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


def _check_same_config(
  workdir: epath.Path,
  before: dict[str, Any],
  config: dict[str, Any],
  may_change: tuple[str, ...],
) -> None:
  # In JSON tuples are lists.
  old, new = _dotted(json.loads(json.dumps(before))), _dotted(config)
  lines = [
    f"{key}: {old.get(key, 'absent')!r} there, {new.get(key, 'absent')!r} given"
    for key in sorted(old.keys() | new.keys())
    if (key in old, old.get(key)) != (key in new, new.get(key))
    and not any(f"{key}.".startswith(f"{k}.") for k in may_change)
  ]
  if lines:
    raise ValueError(
      f"workdir {workdir} is of a run with another config:\n  "
      + "\n  ".join(lines)
      + "\n  use another workdir, or the same flags"
    )


def _read_json(workdir: epath.Path) -> dict[str, Any]:
  path = workdir / _CONFIG
  if not path.exists():
    names = (
      sorted(p.name for p in workdir.iterdir()) if workdir.is_dir() else []
    )
    raise ValueError(
      f"workdir {workdir} has no {_CONFIG}, it holds: "
      f"{', '.join(names) or 'nothing'}; a workdir is the folder that training "
      f"wrote, with {_CONFIG} and {_CHECKPOINTS}/ in it"
    )
  return json.loads(path.read_text())


def _to_json(config: ml_collections.ConfigDict) -> str:
  try:
    return json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n"
  except TypeError as error:
    raise ValueError(
      f"config holds what JSON has no word for ({error}); use numbers, "
      "strings, tuples and dicts"
    ) from error


def _dotted(config: dict[str, Any]) -> dict[str, Any]:
  return flax.traverse_util.flatten_dict(config, sep=".")


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
  return x.astype(np.float32) if floating else x


def _quieten_orbax() -> None:
  std_logging.getLogger("absl").addFilter(_not_orbax_info)


def _not_orbax_info(record: std_logging.LogRecord) -> bool:
  """Drop what Orbax says below a warning: a dozen lines a checkpoint."""
  is_orbax = f"{os.sep}orbax{os.sep}" in record.pathname
  return not is_orbax or record.levelno >= std_logging.WARNING
