"""Run a released pipeline by PyTorch and by us, and compare stage by stage.

  pip install "vdit_jax[torch]"
  python -m vdit_jax.compare --checkpoint=DIR --prompt="..." --out=compare

DIR is a diffusers pipeline folder. Both sides have its weights, the prompt,
one noise and one schedule. Of the text embeddings, the latents after each
step and the decoded video it reports the largest and the relative error and
the PSNR; of each stage the seconds after warm-up and those of compilation; of
each side the peak memory. --out gets a page to look at, index.html, which
needs nothing else, and side_by_side.mp4; --json the numbers. PyTorch runs on
the CPU, ours on what jax finds.
"""

import dataclasses
import importlib.util
import pathlib
import subprocess
import sys
import tempfile

from absl import flags, logging

from vdit_jax import strict_json, tool, writing
from vdit_jax.compare import jobs, report, stages
from vdit_jax.media import formats, page
from vdit_jax.weights import diffusers_folder

_MOST = 2**16  # of what is counted: more is a slip of the finger
_NEEDED = ("torch", "diffusers", "transformers")


def run(
  job: jobs.Job, out: pathlib.Path | None, json_path: pathlib.Path | None
) -> None:
  """Run both sides and write what was found.

  Args:
    job: what to sample.
    out: folder of the page and the video; None writes neither.
    json_path: file of the numbers; None writes none.
  """
  check_installed()
  theirs = baseline(job.checkpoint)
  if out is not None:
    formats.check_writable(out / report.VIDEO, "out")
  if json_path is not None:
    writing.check_file(json_path, "json")
  for image in job.images:
    formats.read_still(image)  # refuses what is none
  with tempfile.TemporaryDirectory() as folder:
    folder = pathlib.Path(folder)
    jobs.write_job(folder, job)
    for module in ("vdit_jax.compare.ours", theirs):  # ours makes the noise
      logging.info("running %s", module)
      _side(module, folder)
    job = jobs.read_job(folder)
    ours, other = (jobs.read_run(folder, n) for n in ("jax", "torch"))
  lines = [report.COLUMNS, *report.rows(ours, other)]
  for line in lines:
    logging.info("%s", "  ".join(page.cell(x) for x in line))
  if out is not None:
    report.write(out, job, ours, other, ours.about["fps"])
    logging.info("wrote %s and %s", out / report.PAGE, out / report.VIDEO)
  if json_path is not None:
    text = strict_json.dumps(stages.summary(job, ours, other), indent=2) + "\n"
    writing.write(json_path, text)


def check_installed() -> None:
  """Refuse to begin without what PyTorch's side needs."""
  absent = [n for n in _NEEDED if importlib.util.find_spec(n) is None]
  if absent:
    raise ValueError(
      f"compare needs {', '.join(absent)}, which is not installed; "
      'pip install "vdit_jax[torch]"'
    )


def baseline(checkpoint: str) -> str:
  """Name the module that runs a pipeline by PyTorch."""
  diffusers_folder.check_local(checkpoint)
  system = diffusers_folder.read(checkpoint).system
  if not system.baseline:
    raise ValueError(
      f"{checkpoint} is a pipeline of {system.name}, which no package of "
      "PyTorch has; there is nothing to compare with"
    )
  return system.baseline


def _side(module: str, folder: pathlib.Path) -> None:
  """Run a side as a process; refuse as it does, or end with its status."""
  command = [sys.executable, "-m", module, str(folder)]
  status = subprocess.run(command, check=False).returncode
  if refusal := jobs.read_refusal(folder):
    raise ValueError(refusal)
  if status:
    logging.error("%s ended with status %d; see above", module, status)
    sys.exit(status if status > 0 else 1)


def main(argv: list[str]) -> None:
  """Compare as the command line says."""
  tool.no_arguments(argv)
  logging.set_verbosity(logging.INFO)
  values = flags.FLAGS
  names = {f.name for f in dataclasses.fields(jobs.Job)} - {"images"}
  asked = {name: getattr(values, name) for name in names}
  if asked["guidance"] is not None:
    asked["guidance"] = tuple(asked["guidance"])
  job = jobs.Job(**asked, images=tuple(values.image))
  path = lambda p: None if p is None else pathlib.Path(p)
  run(job, path(values.out), path(values.json))


if __name__ == "__main__":
  flags.DEFINE_string("checkpoint", None, "Pipeline folder.", required=True)
  flags.DEFINE_string("prompt", None, "What to show.", required=True)
  flags.DEFINE_string("negative_prompt", "", "What to lead away from.")
  flags.DEFINE_multi_string(
    "image", [], "File of a frame that must be given; once for each."
  )
  for _name in ("steps", "num_frames", "height", "width"):
    flags.DEFINE_integer(_name, None, "Default: as released.", 1, _MOST)
  flags.DEFINE_multi_float(
    "guidance",
    None,
    "Default: as released; 1: none. Of two denoisers, twice.",
    1,
  )
  flags.DEFINE_enum("dtype", "float32", jobs.DTYPES, "Of all computations.")
  flags.DEFINE_integer("seed", 0, "Of the initial noise.")
  flags.DEFINE_string("out", None, "Folder for the page and the video.")
  flags.DEFINE_string("json", None, "File for the numbers.")
  tool.run(main)
