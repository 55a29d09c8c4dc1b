"""Text tokens: a sentencepiece model, trained and applied.

  python -m vdit_jax.data.tokenizer --data=moving_digits/one \
    --data_dir=DATA --out=WORKDIR/tokenizer.model

trains one on a data set's captions. The layout is T5's: pad 0, end of text 1,
unknown 2, no beginning of text; every text ends with the end token. Bytes
stand in for characters that training never saw, so nothing is unknown.

`load_released` reads the tokenizer of a released T5, mT5 or UMT5.
"""

from absl import flags, logging

from vdit_jax import tool, writing
from vdit_jax.text import tokenizer


def main(argv: list[str]) -> None:
  """Train on the flags' dataset."""
  # Only training reads data; whoever applies a tokenizer needs no loader.
  from vdit_jax.data import reading

  tool.no_arguments(argv)
  logging.set_verbosity(logging.INFO)
  writing.check_file(flags.FLAGS.out, "out")
  source = reading.open_source(
    flags.FLAGS.data, flags.FLAGS.split, flags.FLAGS.data_dir
  )
  options = reading.Options(
    caption_template=flags.FLAGS.caption_template,
    number_templates=tuple(flags.FLAGS.number_templates),
  )
  reading.check_options(source, options)
  records = reading.records(source, options=options)
  captions = sorted({text for r in records for text in r["captions"]})
  trained = tokenizer.train(captions, flags.FLAGS.out, flags.FLAGS.vocab_size)
  logging.info(
    "%d distinct captions, %d token ids: %s",
    len(captions),
    trained.vocab_size,
    flags.FLAGS.out,
  )


if __name__ == "__main__":
  flags.DEFINE_string(
    "data", None, "Data set, such as moving_digits/one.", required=True
  )
  flags.DEFINE_string("split", "train", "Split whose captions are read.")
  flags.DEFINE_string(
    "data_dir", None, "TFDS data directory; may be gs://.", required=True
  )
  flags.DEFINE_string(
    "out", None, "File to write, a workdir's tokenizer.model.", required=True
  )
  flags.DEFINE_integer("vocab_size", 512, "The most token ids.", 1, 2**20)
  flags.DEFINE_string(
    "caption_template",
    "a video of {label}",
    "As data.caption_template of the config that trains with it.",
  )
  flags.DEFINE_multi_string(
    "number_templates", [], "As data.number_templates; may be repeated."
  )
  tool.run(main)
