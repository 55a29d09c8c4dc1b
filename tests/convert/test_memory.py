"""A 2B-shaped checkpoint passes through little more memory than it takes."""

import dataclasses
import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from vdit_jax import trees, writing
from vdit_jax.convert import files, folders, placement, rules
from vdit_jax.models import families

CONFIG = {"_class_name": "CogVideoXTransformer3DModel", "num_layers": 30}
BEYOND = 1.5e9  # bytes that the whole process may take beside the weights
# Linux counts in KiB.
RUN = """
import resource, sys
from vdit_jax.convert import __main__
__main__.run(sys.argv[1], sys.argv[2])
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@dataclasses.dataclass(frozen=True)
class _Random:
  """A tensor that is made when it is written."""

  shape: tuple[int, ...]
  dtype: np.dtype = np.dtype(ml_dtypes.bfloat16)

  def read(self) -> np.ndarray:
    numbers = np.random.default_rng(0).integers(0, 2**14, self.shape, np.uint16)
    return numbers.view(self.dtype)


def _tensors() -> dict[str, _Random]:
  known = families.component(CONFIG["_class_name"])
  module = known.build(CONFIG, np.dtype(ml_dtypes.bfloat16))
  params = trees.flatten(placement.unboxed(known.abstract(module)))
  tensors = {}
  for key, slot in rules.keys(known.rules(module), params).items():
    shape = params[slot.path].shape
    shape = shape if slot.row is None else shape[1:]
    tensors[key] = _Random(rules.shape(slot.transform.inverse, shape))
  return tensors


def _peak(source, target) -> int:
  """Most memory of the whole process that converts a folder, in bytes."""
  command = [sys.executable, "-c", RUN, str(source), str(target)]
  done = subprocess.run(command, stdout=subprocess.PIPE, check=True)
  return int(done.stdout)


def _all(folder) -> dict[str, files.Tensor]:
  return folders.read_tensors(writing.absolute(folder))


@pytest.mark.slow
def test_a_2b_checkpoint_needs_little_beyond_its_own_size(tmp_path):
  """Whichever way it goes; and it comes back to the bit."""
  source, there, back = (tmp_path / name for name in ("a", "b", "c"))
  source.mkdir()
  tensors = _tensors()
  folders.write_tensors(
    writing.absolute(source), "diffusion_pytorch_model", tensors, 10**9
  )
  (source / "config.json").write_text(json.dumps(CONFIG))
  assert len(list(source.glob("*.safetensors"))) == 4
  size = sum(2 * np.prod(x.shape) for x in tensors.values())
  assert size > 3.3e9
  assert _peak(source, there) < size + BEYOND
  assert _peak(there, back) < size + BEYOND
  found, wanted = _all(back), _all(source)
  assert found.keys() == wanted.keys()
  for key, tensor in wanted.items():
    np.testing.assert_array_equal(found[key].read(), tensor.read(), key)
