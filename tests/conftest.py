"""Eight CPU devices for all tests, as on a small slice of a pod.

Programs this small take longer to compile than to run: not optimised, and kept
for other tests and processes of the same run of pytest.
"""

import os
import pathlib
import tempfile

import pytest

_MOST_MAPPINGS = 30_000

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"  # torch's; pytest runs as two processes
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
  ]
)

if "PYTEST_XDIST_WORKER" not in os.environ:  # workers inherit the first one's
  _programs = tempfile.TemporaryDirectory(prefix="vdit_jax-")
  os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs.name
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.3"


@pytest.fixture(autouse=True, scope="module")
def _forget_programs():
  """Let go of compiled programs before the system's mappings run out.

  Each takes some, of which a process may have 65,530; beyond, LLVM crashes.
  """
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_bytes().count(b"\n") > _MOST_MAPPINGS:
    import jax  # behind the settings above

    jax.clear_caches()
