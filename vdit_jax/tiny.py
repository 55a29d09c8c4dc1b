"""Make a whole pipeline folder in diffusers' layout, tiny and random.

  python -m vdit_jax.tiny OUT [--variant=NAME]

Tests, the notebook and the docs' first commands use it; see `weights.tiny`.
"""

import jax
from absl import app, flags, logging

from vdit_jax import tool
from vdit_jax.weights import tiny


def main(argv: list[str]) -> None:
  """Write the folder of the command line."""
  if len(argv) != 2:
    raise app.UsageError("give the folder to write, OUT")
  jax.config.update("jax_platforms", "cpu")  # leave a TPU to others
  tiny.write(argv[1], flags.FLAGS.variant, flags.FLAGS.seed)
  logging.set_verbosity(logging.INFO)
  logging.info("wrote %s", argv[1])


if __name__ == "__main__":
  _known = tiny.variants()
  flags.DEFINE_enum(
    "variant",
    next(iter(_known)),  # the first one of the first system that has some
    sorted(_known),
    "Which pipeline it is like.",
  )
  flags.DEFINE_integer("seed", 0, "Of the parameters.")
  tool.run(main)
