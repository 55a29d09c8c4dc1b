"""Make a TFDS dataset of captioned video files; needs no TensorFlow.

  python -m vdit_jax.data.build --videos=DIR --captions=FILE.jsonl \
    --data_dir=DATA --name=mine/clips

A record is a clip as its file was, so that nothing is lost, of any size and
length ("clips", the form that `reading` calls so):

  mp4         the file's bytes (Text): mp4, webm, avi, ...; or an image's
  captions    one or more (Sequence(Text): a bytes_list of as many values)
  key         the file's name below --videos (Text)
  fps         float32, mean of a clip whose rate varies; 0 of an image
  num_frames, height, width
              int64: frames that the first video stream decodes to, and their
              pixels as displayed, that is turned as the file asks for; the
              shape of pixels is not in it
  scores      float32 scalars, one for each numeric column of the captions'
              file (motion_score, aesthetic_score, ...), NaN where a row has
              none; the dataset's metadata list their names under "scores"

A picture, or whatever decodes to one frame, is a clip of one frame with fps 0;
an animation (GIF, APNG, WebP, AVIF) is a video. What a file is and how it is
shown `media.footage` says, here and where records are read. Beside each split's
files lies its `index.Index`.

Captions come in the forms of `tables`, where `layouts` finds them; their lines
name files below --videos, see `manifest`. Every file is decoded to its end. A
line that cannot be read, and what is broken, empty, too short, without a
picture or a caption, no regular file, missing or named twice is left out and
listed with its line and reason in the dataset's rejected.jsonl; --strict stops
at the first instead. --clip_seconds or --clip_frames cut videos into clips (see
`cuts`), keys NAME#0000, .... The order is decided by a hash of the file's key,
and so is the split, see `splits`: all clips of a file are in one.

  WORK = DATA/NAME/1.0.0.unfinished
  rows --parts.spool--> WORK/rows-*/ --probe--> part-*.probes.jsonl
       --> part-*.plan.json --> train.* validation.* --> part-*.json
       --join--> DATA/NAME/1.0.0

A killed build goes on: what was probed of files that did not change, and what
was written, is kept. On many machines that share DATA, or whose WORK folders
are copied into one, each runs with its --shard=I/N; when all are done, --join
makes the dataset.
"""

import os

from absl import app, flags, logging

from vdit_jax import tool
from vdit_jax.data.build import cuts, dataset, jobs


def main(argv: list[str]) -> None:
  """Build the flags' dataset."""
  tool.no_arguments(argv)
  logging.set_verbosity(logging.INFO)
  v = flags.FLAGS
  if v.join:
    dataset.join(v.data_dir, v.name)
    return
  if not v.videos:
    raise app.UsageError("--videos must be given, but for --join")
  length = None
  if v.clip_frames or v.clip_seconds:
    length = cuts.Length(v.clip_frames, v.clip_seconds, v.crf)
  shard, num_shards = dataset._shard(v.shard)
  spec = jobs.Spec(
    videos=_absolute(v.videos),
    captions=_absolute(v.captions or v.videos),
    min_frames=v.min_frames,
    validation=v.validation,
    length=length,
    num_shards=num_shards,
  )
  dataset.build(
    spec,
    v.data_dir,
    v.name,
    shard=shard,
    strict=v.strict,
    workers=v.workers,
  )


def _absolute(path: str) -> str:
  return path if "://" in path else os.path.abspath(path)


if __name__ == "__main__":
  flags.DEFINE_string("videos", None, "Folder, glob, or manifest of the files.")
  flags.DEFINE_string(
    "captions",
    None,
    "Their .jsonl, .json, .csv or .tsv, prompts.txt, or folder of texts; "
    "default: what lies with the files. Not with a manifest.",
  )
  flags.DEFINE_string(
    "data_dir", None, "TFDS data directory to write, local.", required=True
  )
  flags.DEFINE_string(
    "name", None, "Dataset to write, NAME/CONFIG.", required=True
  )
  flags.DEFINE_float(
    "validation", 0.02, "Share of the clips, in whole files.", 0, 1
  )
  flags.DEFINE_integer(
    "min_frames", 2, "Least frames of a video; a still has one.", 1
  )
  flags.DEFINE_integer("clip_frames", 0, "Cut into clips of so many.", 0)
  flags.DEFINE_float("clip_seconds", 0.0, "Cut into clips of so many.", 0)
  flags.DEFINE_integer(
    "crf", 16, "Quality of clips that are cut; 0 is exact.", 0, 51
  )
  flags.DEFINE_bool("strict", False, "Stop at what would be left out.")
  flags.DEFINE_string("shard", "0/1", "Of several machines this one, I/N.")
  flags.DEFINE_bool("join", False, "Make the dataset when all shards are done.")
  flags.DEFINE_integer("workers", None, "Processes; default: one a core.", 0)
  tool.run(main)
