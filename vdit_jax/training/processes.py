"""Do all processes of a run hold the same? Asked before the first step.

Each has read its own config, code and copy of the dataset. Where one of them
differs all would train on together, on a mixture, without a word.
"""

import collections
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.experimental import multihost_utils

from vdit_jax import schema


def check_same(mine: Mapping[str, str]) -> None:
  """Refuse to train where another process holds something else.

  All processes must call it; a process alone holds what it holds.

  Args:
    mine: what this process holds, by what it is called.

  Raises:
    ValueError: names what differs, and what it is on which process.
  """
  if lines := differences(_gather(mine)):
    raise ValueError(
      "processes of one run must hold the same, but they differ in\n  "
      + "\n  ".join(lines)
      + "\nstart all of them with the same command, code and data"
    )


def differences(held: Sequence[Mapping[str, str]]) -> list[str]:
  """Say, a line each, in what processes differ.

  Args:
    held: what each of them holds, by what it is called.
  """
  lines = []
  for name in sorted({name for one in held for name in one}):
    found = collections.defaultdict(list)
    for process, one in enumerate(held):
      found[one.get(name, "nothing")].append(str(process))
    if len(found) > 1:
      rows = [f"{schema.quote(k)} on {_processes(v)}" for k, v in found.items()]
      lines.append(f"{name}: {', '.join(rows)}")
  return lines


def code() -> str:
  """Name the code that runs, this package's by its content."""
  folder, digest = pathlib.Path(__file__).parent.parent, hashlib.sha256()
  for path in sorted(folder.rglob("*.py")):
    digest.update(f"{path.relative_to(folder)}\n".encode())
    digest.update(path.read_bytes())
  return f"vdit_jax {digest.hexdigest()[:12]}, jax {jax.__version__}"


def _gather(mine: Mapping[str, str]) -> list[dict[str, str]]:
  """Let every process tell what it holds to all."""
  if jax.process_count() == 1:
    return [dict(mine)]
  text = np.frombuffer(json.dumps(dict(mine)).encode(), np.uint8)
  lengths = multihost_utils.process_allgather(np.array(len(text)))
  padded = np.pad(text, (0, lengths.max() - len(text)))
  rows = multihost_utils.process_allgather(padded)
  return [
    json.loads(row[:length].tobytes())
    for row, length in zip(rows, lengths, strict=True)
  ]


def _processes(numbers: list[str]) -> str:
  return f"process{'es' * (len(numbers) > 1)} {', '.join(numbers)}"
