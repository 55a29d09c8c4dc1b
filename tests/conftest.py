"""Eight CPU devices for all tests, as on a small slice of a pod.

Programs this small take longer to compile than to run: not optimised, by the
emitter that begins soonest, and kept for other tests and processes of the same
run of pytest.
"""

import gc
import importlib.metadata
import os
import pathlib
import tempfile

import pytest

_MOST_MAPPINGS = 30_000
_TWO_EMITTERS = importlib.metadata.version("jaxlib").startswith("0.10.")

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["OMP_NUM_THREADS"] = "1"  # torch's; pytest runs as two processes
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["XLA_FLAGS"] = " ".join(
  [
    os.environ.get("XLA_FLAGS", ""),
    "--xla_force_host_platform_device_count=8",
    "--xla_backend_optimization_level=0",
    "--xla_cpu_parallel_codegen_split_count=1",
    "--xla_llvm_disable_expensive_passes=true",
    # Later versions have one emitter alone, and end at what they don't know.
    "--xla_cpu_use_fusion_emitters=false" * _TWO_EMITTERS,
  ]
)

# Tracing makes much that stays; looked through rarely, it costs a tenth less.
gc.set_threshold(200_000, 50, 100)

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
