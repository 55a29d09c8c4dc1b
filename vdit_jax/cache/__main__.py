"""Encode a dataset once, so that a denoiser trains without its autoencoder.

  python -m vdit_jax.cache --autoencoder=work/vae --data=moving_digits/one \
    --data_dir=work/data --name=latents/one

writes a TFDS dataset whose records hold the posterior's mean and log-variance
(so that a training step still samples it), captions, key and what else is known
of a clip, and whose metadata name the autoencoder and its normalisation.
`data.name=latents/one` then trains from it. Clips of many sizes are shown in
--shapes=17x256x256,..., their first frames' centre, at --fps: the shapes of
the `data.buckets` that are to train from them.

With --text_encoder=DIR (see `weights.text_encoder`) they hold the embeddings of
each caption's tokens too, at most --max_length, and a denoiser of a config
with `text_encoder_dir` trains from them. Where --autoencoder or --text_encoder
is a whole pipeline whose denoiser must be given frames, as of image-to-video,
they hold these frames too, and what its image encoder makes of them. With
--stills they hold the latents of each frame alone, for a denoiser of ours that
may be given any (`denoiser.given`).

The devices of a process share a batch and the text encoder's weights. Of
several processes (the hosts of a TPU pod, or --coordinator, --num_processes
and --process_id) each writes files of its own, to a data_dir that all see. A
file that is whole stays: the same command goes on after a kill, with any
number of processes. The dataset appears when all its files are there.
"""

from absl import flags, logging

from vdit_jax import launch, tool
from vdit_jax.cache import dataset, latents
from vdit_jax.data import reading
from vdit_jax.text import padding


def main(argv: list[str]) -> None:
  """Encode the flags' dataset."""
  tool.no_arguments(argv)
  logging.set_verbosity(logging.INFO)
  v = flags.FLAGS
  launch.start(v.coordinator, v.num_processes, v.process_id)
  with launch.ending_together():
    dataset.build(
      v.autoencoder,
      v.data,
      v.data_dir,
      v.name,
      v.splits,
      _text(v),
      v.dtype,
      latents.View(
        shapes=tuple(dataset.parse_shape(text) for text in v.shapes),
        enlarge=v.enlarge,
        options=reading.Options(
          fps=v.fps,
          crop="centre",
          caption_template=v.caption_template,
          number_templates=tuple(v.number_templates),
        ),
      ),
      v.stills,
    )


def _text(v) -> dataset.TextOptions | None:
  """Say how the flags have captions encoded."""
  if v.text_encoder is None:
    return None
  seen = "seen" if v.sees_padding else v.padding
  return dataset.TextOptions(v.text_encoder, v.max_length, v.text_dtype, seen)


if __name__ == "__main__":
  flags.DEFINE_string(
    "autoencoder", None, "Workdir, or a released one's folder.", required=True
  )
  flags.DEFINE_string("data", None, "Dataset to encode.", required=True)
  flags.DEFINE_string(
    "data_dir", None, "TFDS data directory; may be gs://.", required=True
  )
  flags.DEFINE_string("name", None, "Dataset to write.", required=True)
  flags.DEFINE_list("splits", ["train", "validation"], "Splits to encode.")
  flags.DEFINE_string(
    "text_encoder", None, "Folder of a released text encoder; default: none."
  )
  flags.DEFINE_integer("max_length", 226, "Tokens of a caption, at most.", 1)
  flags.DEFINE_enum(
    "text_dtype",
    "bfloat16",
    ["bfloat16", "float32"],
    "Of the text encoder's weights and computations.",
  )
  flags.DEFINE_enum(
    "padding",
    None,
    padding.KINDS,
    "Who sees what is behind a caption, as the system to be trained wants it; "
    "default: as that of the pipeline --text_encoder does, or masked.",
  )
  flags.DEFINE_bool("sees_padding", False, "The same as --padding=seen.")
  flags.DEFINE_enum(
    "dtype",
    "bfloat16",
    ["bfloat16", "float32"],
    "Of a released autoencoder's computations.",
  )
  flags.DEFINE_bool("stills", False, "Encode each frame alone too.")
  flags.DEFINE_list(
    "shapes", [], "Of clips of many sizes: 17x256x256,1x256x256."
  )
  flags.DEFINE_float(
    "enlarge", 1.0, "How much, to fill one of several shapes.", 1
  )
  flags.DEFINE_float("fps", 0.0, "Frames a second; 0 is each clip's own.", 0)
  template = reading.Options.caption_template
  flags.DEFINE_string(
    "caption_template", template, "Caption of a clip that has only a class."
  )
  flags.DEFINE_multi_string(
    "number_templates", [], "Appended to captions; see reading.Options."
  )
  flags.DEFINE_string(
    "coordinator", None, "host:port of process 0; not needed on TPU pods."
  )
  flags.DEFINE_integer(
    "num_processes", None, "Of the run; not needed on TPU pods.", 1
  )
  flags.DEFINE_integer(
    "process_id", None, "Which this is; not needed on TPU pods.", 0
  )
  tool.run(main)
