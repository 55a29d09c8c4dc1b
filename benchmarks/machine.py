"""What a measurement was taken on: processor, threads, versions.

Imports neither jax nor torch.
"""

import os
import pathlib
import platform
import re
from importlib import metadata
from typing import Any

_CPUINFO = pathlib.Path("/proc/cpuinfo")
# What decides how fast matmuls and convolutions are.
_VECTORS = re.compile(r"avx|amx|fma|asimd|sve|i8mm|bf16")


def about(threads: int, packages: tuple[str, ...]) -> dict[str, Any]:
  """Describe the machine and what runs on it."""
  return {
    **processor(_CPUINFO.read_text() if _CPUINFO.exists() else ""),
    "threads": threads,
    "glibc_tunables": os.environ.get("GLIBC_TUNABLES", ""),
    "python": platform.python_version(),
    **{name: metadata.version(name) for name in packages},
  }


def processor(cpuinfo: str) -> dict[str, str]:
  """Name a processor and its vector instructions from /proc/cpuinfo.

  Family and model numbers stand beside the name, for some machines say no more
  of it than its maker's.
  """
  first = cpuinfo.partition("\n\n")[0]
  found = dict(re.findall(r"^(.+?)\s*:\s*(.*)$", first, re.MULTILINE))
  name = found.get("model name", platform.machine())
  numbers = [f"{k} {found[k]}" for k in ("cpu family", "model") if k in found]
  flags = found.get("flags", found.get("Features", "")).split()
  vectors = " ".join(sorted(f for f in flags if _VECTORS.search(f)))
  return {"processor": ", ".join([name, *numbers]), "vectors": vectors}
