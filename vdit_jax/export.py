"""Make a release of a denoiser's workdir: what sampling needs, and no more.

  python -m vdit_jax.export --checkpoint=work/dit --out=DIR

writes the averaged weights in float16, the autoencoder's, the tokenizer and
the part of the config that describes the networks and how to sample.
`pipeline.load(DIR)` reads it.
"""

import jax
import ml_collections
import numpy as np
from absl import app, flags, logging
from etils import epath

from vdit_jax import checkpoint, workdirs

_GROUPS = (
  "autoencoder",
  "text_encoder",
  "denoiser",
  "objective",
  "sampling",
  "validation",
)


def export(
  workdir: epath.PathLike, out: epath.PathLike, step: int | None = None
) -> None:
  """Write a release.

  Args:
    workdir: of a denoiser's run.
    out: folder to write; files in it of the same names are replaced.
    step: which checkpoint; None is the newest.
  """
  # Refuses what does not fit; a frozen text encoder stays where it is.
  _, _, params = workdirs.load(workdir, step=step)
  config = checkpoint.read_config(workdir)
  frozen = workdirs.text_encoder_dir(config)
  out = epath.Path(out)
  out.mkdir(parents=True, exist_ok=True)
  params = {k: jax.tree.map(np.asarray, v) for k, v in params.items()}
  autoencoder = params.pop("autoencoder")
  kept = {name: config[name] for name in _GROUPS}
  kept["data"] = {"max_length": config.data.max_length}
  if frozen:
    kept["text_encoder_dir"] = frozen
    kept["text_encoder_fingerprint"] = config.text_encoder_fingerprint
  text = ml_collections.ConfigDict(kept).to_json(indent=2)
  (out / "config.json").write_text(text + "\n")
  if not frozen:
    name = workdirs.TOKENIZER_FILE
    (out / name).write_bytes((epath.Path(workdir) / name).read_bytes())
  checkpoint.save_release(out / workdirs.AUTOENCODER_FILE, autoencoder, {})
  checkpoint.save_release(out / workdirs.RELEASE_FILE, params, {})
  size = sum(file.stat().length for file in out.iterdir())
  logging.info("%s: %.2f MB in all", out, size / 1e6)


def main(argv):
  """Export the flags' workdir."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected arguments: {argv[1:]}")
  logging.set_verbosity(logging.INFO)
  export(flags.FLAGS.checkpoint, flags.FLAGS.out, flags.FLAGS.step)


if __name__ == "__main__":
  flags.DEFINE_string("checkpoint", None, "Workdir.", required=True)
  flags.DEFINE_string("out", None, "Folder to write.", required=True)
  flags.DEFINE_integer("step", None, "Checkpoint; default: the newest.")
  app.run(main)
