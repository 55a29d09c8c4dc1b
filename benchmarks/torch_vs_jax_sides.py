"""The ways that each side of `benchmarks.torch_vs_jax` has, and their race.

Ours: `ours`, layers as one loop over stacked parameters, as configs have it;
`unrolled`, the same without the loop. Theirs: `eager`, and `compiled` by
torch.compile.
"""

import dataclasses
import tempfile
from collections.abc import Callable, Mapping
from typing import Any

import diffusers
import jax
import numpy as np
import torch

from benchmarks import cogvideox_jax as ours
from benchmarks import cogvideox_torch as theirs
from benchmarks import race
from vdit_jax.cost import flops
from vdit_jax.weights import component


@dataclasses.dataclass(frozen=True)
class How:
  """How rows are measured.

  Attributes:
    turns: of each row.
    threads: of each side.
    compiled: whether PyTorch's networks run compiled too.
    tiny: sizes that only show that all runs.
  """

  turns: race.Turns
  threads: int
  compiled: bool = True
  tiny: bool = False


def settle(how: How) -> None:
  """Let PyTorch take as many threads as XLA does, and show no progress."""
  torch.set_num_threads(how.threads)
  diffusers.utils.logging.disable_progress_bar()
  diffusers.utils.logging.set_verbosity_error()


def copied(network: theirs.Network) -> component.Loaded:
  """Load a network of PyTorch's as ours, float32."""
  with tempfile.TemporaryDirectory() as folder:
    network.save_pretrained(folder)
    return component.load(folder, param_dtype="float32")


def loops(loaded: component.Loaded) -> dict[str, component.Loaded]:
  """The two ways that a denoiser of ours goes through its layers."""
  unrolled = ours.changed(loaded, unroll=loaded.module.cfg.depth)
  return {"ours": loaded, "unrolled": unrolled}


def ways(
  network: theirs.Network,
  how: How,
  copy: Callable[[theirs.Network], theirs.Network] = lambda network: network,
) -> dict[str, theirs.Network]:
  """The ways that PyTorch runs a network; `copy` gives each weights of its own.

  Shapes are fixed in each row: what is compiled is of these alone.
  """
  found = {"eager": copy(network)}
  if how.compiled:
    found["compiled"] = torch.compile(copy(network), dynamic=False)
  return found


def compare(
  runs: Mapping[str, Callable[[], Any]],
  how: How,
  *,
  work: int | None = None,
  calls: int = 1,
  farthest: float = 1e-3,
) -> dict[str, Any]:
  """Call all, see that they give the same, and time them in turns.

  Args:
    runs: of both sides, by way; "eager" is what the others must equal.
    how: to measure.
    work: FLOPs of a run, if they are to be said.
    calls: whose results are compared.
    farthest: that results may be, as a relative distance.

  Returns:
    `distance`, the largest; `gflop`; and by way its times, with the
    seconds of its first call, in which it is compiled.

  Raises:
    ValueError: if the results are not the same.
  """
  first, gave = {}, {}
  for name, run in runs.items():
    found = [race.timed(run, jax.block_until_ready) for _ in range(calls)]
    first[name] = found[0][0]
    gave[name] = np.stack([np.asarray(result) for _, result in found])
  away = {k: distance(v, gave["eager"]) for k, v in gave.items()}
  if wrong := {k: v for k, v in away.items() if not v <= farthest}:
    raise ValueError(f"differs from PyTorch's eager result by {wrong}")
  del gave
  times = race.run(runs, how.turns, jax.block_until_ready)
  return {
    "distance": max(away.values()),
    "gflop": work and work / 1e9,
    **{k: v | {"first": first[k]} for k, v in times.items()},
  }


def work(run: Callable[[], Any]) -> int:
  """Count the FLOPs by which a run of ours is defined, however computed."""
  return flops.model_flops(lambda _: run(), {})


def distance(found: np.ndarray, wanted: np.ndarray) -> float:
  """Relative distance of two arrays."""
  return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
