"""Measure a checkpoint and write the results as JSON.

  python -m vdit_jax.evaluate --checkpoint=work/dit --data=moving_digits/one \
    --data_dir=work/data --json=work/metrics.json

For any data: the autoencoder's PSNR and SSIM and the validation loss on the
validation split. For moving digits: exact checks of clips generated from
held-out prompts (`metrics.digits`), beside the same checks of real held-out
clips, the ceiling, and of those passed through the autoencoder. The JSON has
an entry a metric: value, ci95, ceiling, n.
"""

import itertools
import json
import time
from typing import Any

import jax
import numpy as np
import tensorflow_datasets as tfds
import tqdm
from absl import app, flags, logging
from etils import epath

from vdit_jax import checkpoint, media, pipeline, sheets, types
from vdit_jax.data import digits as scenes
from vdit_jax.data import moving_digits, reading
from vdit_jax.metrics import classifier as classifiers
from vdit_jax.metrics import digits
from vdit_jax.training import denoiser, tasks
from vdit_jax.training import learner as learners

_BATCH = 48
_SHEET = 12  # clips of the contact sheet


def main(argv):
  """Load, measure each thing, write."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  logging.set_verbosity(logging.INFO)
  values = flags.FLAGS
  out = epath.Path(values.json)
  media.check_writable(out.with_suffix(".png"))
  config = checkpoint.read_config(values.checkpoint)
  pipe = pipeline.load(values.checkpoint)
  source = reading.open_source(values.data, "validation", values.data_dir)
  results = measure_autoencoder(pipe, source)
  results |= measure_loss(pipe, config, source)
  if values.data.startswith(moving_digits.MovingDigits.name + "/"):
    test = reading.open_source(values.data, "test", values.data_dir)
    results |= measure_digits(
      pipe,
      test,
      classifier_path=epath.Path(values.data_dir) / "classifier",
      num_prompts=values.num_prompts,
      digit_counts=[int(n) for n in values.digit_counts],
      seed=values.seed,
      sheet=out.with_suffix(".png"),
    )
  _write(out, results)
  for name, row in results.items():
    logging.info("%-28s %s", name, row)


def measure_autoencoder(
  pipe: pipeline.Pipeline, source: reading.Source, num_clips: int = 256
) -> dict[str, Any]:
  """Measure PSNR and SSIM of clips passed through the autoencoder."""
  module, params = pipe.modules.autoencoder, pipe.params["autoencoder"]

  @jax.jit
  def scores(video):
    video = pipeline.to_float(video)
    _, psnr, ssim = tasks.reconstruct(module, params, video)
    return psnr, ssim

  rows = []
  for batch in tqdm.tqdm(_batches(source, None, 1, num_clips), "autoencoder"):
    kept = batch.weight > 0
    rows.append([np.asarray(x)[kept] for x in scores(batch.video)])
  psnr, ssim = (np.concatenate(x) for x in zip(*rows, strict=True))
  return {
    "vae_psnr": digits.summarise(psnr) | {"ceiling": None},
    "vae_ssim": digits.summarise(ssim) | {"ceiling": 1.0},
  }


def measure_loss(
  pipe: pipeline.Pipeline, config: Any, source: reading.Source
) -> dict[str, Any]:
  """Measure the loss at the config's fixed noise levels."""
  goal, levels = learners.objective(config), config.validation.levels
  check = jax.jit(denoiser.make_validation(pipe.modules, goal, levels))
  total, count = np.zeros(len(levels)), 0
  clips = config.validation.clips
  batches = _batches(source, pipe.tokenizer, pipe.max_length, clips)
  for seed, batch in enumerate(tqdm.tqdm(batches, "validation loss")):
    losses, number = check(pipe.params, pipe.params, batch, seed)
    total, count = total + np.asarray(losses), count + int(number)
  value = float(total.mean() / count)
  row = {"value": value, "ci95": None, "ceiling": None, "n": count}
  return {"validation_loss": row}


def measure_digits(
  pipe: pipeline.Pipeline,
  source: reading.Source,
  *,
  classifier_path: epath.Path,
  num_prompts: int,
  digit_counts: list[int],
  seed: int,
  sheet: epath.Path,
) -> dict[str, Any]:
  """Check generated clips of held-out prompts against what they should show.

  Args:
    pipe: what is measured.
    source: real held-out clips, the test split.
    classifier_path: prefix of the digit classifier's file, trained if absent.
    num_prompts: of each number of digits.
    digit_counts: numbers of digits in a clip to measure; the names of other
      counts than one end in "_two" and so on.
    seed: of the prompts and the noise.
    sheet: file for a contact sheet of the first clips.
  """
  config = moving_digits.MovingDigits.builder_configs[
    source.name.partition("/")[2]
  ]
  path = classifier_path.parent / (
    f"{classifier_path.name}_{config.digit_size}.npz"
  )
  reader = classifiers.load(path, config.digit_size)
  accuracy = classifiers.accuracy(reader, "test")
  logging.info("digit classifier: %.4f of the test scans", accuracy)
  row = {"value": accuracy, "ci95": None, "ceiling": 1.0}
  results = {"classifier": row | {"n": len(scenes.scans("test")[1])}}
  slowest = min(config.speeds)
  for count in digit_counts:
    suffix = "" if count == 1 else f"_{scenes.DIGITS[count]}"
    prompts = scenes.held_out_prompts(num_prompts, seed, count)
    real, captions = _real_clips(source, count, num_prompts)
    clips, seconds = _generate(pipe, prompts, source, seed)
    if not suffix:
      image = sheets.draw(clips[:_SHEET], prompts[:_SHEET], factor=3)
      media.write_image(sheet, image)
    seen = digits.read(clips, reader, slowest=slowest)
    ceiling = digits.read(real, reader, slowest=slowest)
    rows = digits.results(seen, prompts, ceiling, captions)
    through = digits.read(_through(pipe, real), reader, slowest=slowest)
    passed = digits.results(through, captions, ceiling, captions)
    rows |= {f"vae_{name}": passed[name] for name in ("all", "consistency")}
    results |= {f"{name}{suffix}": row for name, row in rows.items()}
    results[f"seconds_a_clip{suffix}"] = {
      "value": seconds / len(clips),
      "ci95": None,
      "ceiling": None,
      "n": len(clips),
    }
  return results


def _generate(pipe, prompts, source, seed):
  """Generate clips of the source's size: videos and seconds taken."""
  start, clips = time.perf_counter(), []
  for i in tqdm.trange(0, len(prompts), _BATCH, desc="sampling"):
    clips.append(
      pipe.generate(
        prompts[i : i + _BATCH],
        num_frames=source.num_frames,
        height=source.height,
        width=source.width,
        seed=seed + i,
      )
    )
  return np.concatenate(clips), time.perf_counter() - start


def _real_clips(source, count, number):
  """Take the first held-out clips with a number of digits, and captions."""
  videos, captions = [], []
  for record in reading.records(source):
    if len(scenes.parse(record["caption"])) == count:
      videos.append(record["video"])
      captions.append(record["caption"])
    if len(videos) == number:
      break
  if not videos:
    raise ValueError(
      f"{source.name} has no clips of {count} digits; leave {count} out of "
      "--digit_counts"
    )
  return np.asarray(pipeline.to_float(np.stack(videos))), captions


def _through(pipe, videos):
  """Pass videos through the autoencoder."""
  parts = [
    pipe.decode(pipe.encode(videos[i : i + _BATCH]))
    for i in range(0, len(videos), _BATCH)
  ]
  return np.clip(np.concatenate(parts), -1, 1)


def _batches(source, tokenizer, max_length, num_clips) -> list[types.Batch]:
  """Read a source's first clips in full batches."""
  batches = reading.evaluation_batches(source, tokenizer, _BATCH, max_length)
  number = -(-num_clips // _BATCH)
  return [batch for batch, _ in itertools.islice(batches, number)]


def _write(path: epath.Path, results: dict[str, Any]) -> None:
  """Write the JSON whole or not at all."""
  temporary = path.parent / f".{path.name}.tmp"
  temporary.write_text(json.dumps(results, indent=2) + "\n")
  temporary.replace(path)


if __name__ == "__main__":
  tfds.disable_progress_bar()
  flags.DEFINE_string(
    "checkpoint", str(pipeline.RELEASE), "Workdir or release."
  )
  flags.DEFINE_string("data", "moving_digits/one", "Dataset with its config.")
  flags.DEFINE_string("data_dir", None, "TFDS data directory.", required=True)
  flags.DEFINE_string("json", None, "File to write.", required=True)
  flags.DEFINE_integer("num_prompts", 144, "Prompts of each digit count.")
  flags.DEFINE_list("digit_counts", ["1"], "Numbers of digits in a clip.")
  flags.DEFINE_integer("seed", 0, "Of the prompts and the noise.")
  app.run(main)
