"""Measure a checkpoint and write the results as JSON and as a page.

  python -m vdit_jax.evaluate --checkpoint=work/dit --data=moving_digits/one \
    --data_dir=work/data --json=work/metrics.json

A checkpoint is a workdir, a release, or a released pipeline's folder; the data
any dataset of videos. `--metrics` chooses what is measured:

  loss         the denoiser's loss at fixed noise levels
  vae          PSNR and SSIM of clips passed through the autoencoder
  lpips_alex   LPIPS of the same clips
  lpips_vgg    the same by VGG16; slow, so only measured when asked for
  consistency  generated clips: likeness of frames, smoothness and motion
  frechet      generated clips: distances from real clips, FVD among them
  digits       generated clips of moving digits: exact checks of what they show

The first four look at the validation split. Clips are generated from
`--prompts`, a file of lines or of VBench's form, or else from held-out prompts
of moving digits, or else from the captions of real clips, of the test split if
there is one. The JSON has an entry a metric: value, ci95, ceiling, n (see
`evaluate.scores`). Beside it stand a page with the table and clips (.html) and,
of digits, a contact sheet (.png).
"""

import tensorflow_datasets as tfds
from absl import flags, logging

from vdit_jax import pipeline, tool, writing
from vdit_jax.data import prompt_files as files
from vdit_jax.evaluate import evaluation


def main(argv: list[str]) -> None:
  """Check everything, load, measure, write."""
  tool.no_arguments(argv)
  logging.set_verbosity(logging.INFO)
  values = flags.FLAGS
  out = writing.check_file(values.json, "json")
  for suffix in (".html", ".png"):
    writing.check_file(out.with_suffix(suffix), "json")
  prompts = tuple(files.read(values.prompts)) if values.prompts else None
  plan = evaluation.Plan(
    metrics=evaluation.choose(values.metrics, values.data, prompts),
    prompts=prompts,
    num_prompts=values.num_prompts,
    num_clips=values.num_clips,
    digit_counts=tuple(int(n) for n in values.digit_counts),
    batch_size=values.batch_size,
    seed=values.seed,
  )
  results, pieces = evaluation.run(
    plan,
    values.checkpoint,
    values.data,
    values.data_dir,
    sheet=out.with_suffix(".png"),
  )
  evaluation.write(
    out, results, pieces, f"{values.checkpoint} on {values.data}"
  )
  for name, row in results.items():
    logging.info("%-34s %s", name, row)


if __name__ == "__main__":
  tfds.disable_progress_bar()
  flags.DEFINE_string(
    "checkpoint", str(pipeline.RELEASE), "Workdir, release or pipeline folder."
  )
  flags.DEFINE_string("data", "moving_digits/one", "Dataset with its config.")
  flags.DEFINE_string("data_dir", None, "TFDS data directory.", required=True)
  flags.DEFINE_string("json", None, "File of the results.", required=True)
  flags.DEFINE_list(
    "metrics",
    [],
    f"Of {', '.join(evaluation.METRICS)}; default: all that go with the "
    f"data, but {', '.join(evaluation.OPTIONAL)}.",
  )
  flags.DEFINE_string("prompts", None, "File of prompts; default: the data's.")
  flags.DEFINE_integer(
    "num_prompts", 144, "Of each digit count, or of data's.", 1
  )
  flags.DEFINE_integer("num_clips", 256, "Clips of loss and autoencoder.", 1)
  flags.DEFINE_list("digit_counts", ["1"], "Numbers of digits in a clip.")
  flags.DEFINE_integer("batch_size", 48, "Clips at once.", 1)
  flags.DEFINE_integer("seed", 0, "Of the prompts and the noise.")
  tool.run(main)
