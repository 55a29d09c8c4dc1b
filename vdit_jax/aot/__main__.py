"""Compile a config for a TPU pod that is not there, and say what it takes.

  python -m vdit_jax.aot --config=configs/vdit.py:5b --topology=v5e:16x16
  python -m vdit_jax.aot --config=configs/vdit.py:2b --topology=v5e:1x1 \
    --what=sample --config.mesh.fsdp=1

The compiler for TPU is a package, `pip install "vdit_jax[tpu]"`, and needs no
TPU. It compiles the functions that train.py, sample.py and cache.py run. Does
the program fit? is its answer, not an estimate. Cycles are its estimates, and
attention kernels, of which it has none, are charged those of `chips`. Stalls
for communication are left out. Exit status 1: it does not fit.
"""

import dataclasses
import resource
import sys
from typing import Any

import jax
from absl import flags

from vdit_jax import config_flag, sharding, strict_json, tool, writing
from vdit_jax.aot import programs, report
from vdit_jax.training import fields


def main(argv: list[str]) -> None:
  """Compile what the flags say, print, write."""
  tool.no_arguments(argv)
  v = flags.FLAGS
  for name in ("json", "text"):
    if v[name].value:
      writing.check_file(v[name].value, name)
  report.quiet()
  found = report.devices(v.topology, v.num_slices)
  config = v.config
  fields.check(config)
  mesh = sharding.make_mesh(sharding.MeshShape(**config.mesh), found)
  defaults = config.get("sampling", {})
  clip = programs.Clip(
    *(v[n].value or defaults.get(n) for n in ("num_frames", "height", "width"))
  )
  if None in dataclasses.astuple(clip):
    raise ValueError(
      "the config has no sizes; pass --num_frames, --height, --width"
    )
  try:
    with jax.set_mesh(mesh):
      task = programs.describe(
        config, v.what, mesh, clip, v.clips, v.param_dtype
      )
      program, seconds = report.compiled(task.lower())
      row = report.report(program, task, mesh)
  except report.OutOfMemoryError as error:
    print(error)
    _write(
      v.json, {"fits": False, "error": str(error), "needed_gib": error.needed}
    )
    sys.exit(1)
  host = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
  row |= {"compile_seconds": seconds, "host_gib": host, "fits": True}
  print(report.table(row))
  for item in row["dearest"][: v.dearest]:
    print(
      f"  {item['cycles'] / 1e6:9.1f} M  {item['kind']}  {item['times']} x "
      f"{item['name']}  {item['makes'][:60]}  {item['from'][-100:]}"
    )
  if v.text:
    writing.write(v.text, program.as_text())
  _write(v.json, row)


def _write(path: str | None, row: dict[str, Any]) -> None:
  if path:
    writing.write(path, strict_json.dumps(row, indent=2) + "\n")


if __name__ == "__main__":
  config_flag.define()
  flags.DEFINE_string("topology", None, "Such as v5e:16x16.", required=True)
  flags.DEFINE_integer("num_slices", 1, "Slices of that topology.", 1)
  flags.DEFINE_enum("what", "train", programs.WHAT, "What to compile.")
  flags.DEFINE_integer("clips", 1, "Clips, but in training: batch_size's.", 1)
  for _name in ("num_frames", "height", "width"):
    flags.DEFINE_integer(_name, None, "Of the clips; default: the config's.")
  flags.DEFINE_string(
    "param_dtype", "bfloat16", "Of weights, but in training: float32."
  )
  flags.DEFINE_string("json", None, "File for the report.")
  flags.DEFINE_string("text", None, "File for the compiled program's text.")
  flags.DEFINE_integer("dearest", 0, "Dearest instructions to print.")
  tool.run(main)
