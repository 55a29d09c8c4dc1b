"""Convert one component's weights between diffusers and Orbax, without torch.

  python -m vdit_jax.convert SRC DST [--param_dtype=bfloat16]

SRC is a folder in the layout of diffusers or transformers, and DST becomes
config.json with an Orbax checkpoint in `params/`; or SRC is such a one, which
is told by its `params/_METADATA`, and DST becomes a folder that diffusers or
transformers reads. DST must not be there, or be an empty folder; it appears
when it is whole.
"""

import jax
from absl import app, flags, logging
from etils import epath

from vdit_jax import tool, writing
from vdit_jax.weights import component


def run(
  source: epath.PathLike,
  target: epath.PathLike,
  param_dtype: str | None = None,
) -> None:
  """Convert a folder.

  Args:
    source: folder to read.
    target: folder to write.
    param_dtype: of the floating-point weights; None is as they are.
  """
  writing.check_folder(target, "DST")
  loaded = component.load(source, param_dtype=param_dtype)
  to_orbax = not component.is_orbax(source)
  (component.save_orbax if to_orbax else component.save)(loaded, target)


def main(argv: list[str]) -> None:
  """Convert the folders of the command line."""
  if len(argv) != 3:
    raise app.UsageError("give two folders, SRC and DST")
  # Weights are copied, not computed with: leave the accelerator to others.
  jax.config.update("jax_platforms", "cpu")
  run(argv[1], argv[2], flags.FLAGS.param_dtype)
  logging.set_verbosity(logging.INFO)  # not before: Orbax says a great deal
  logging.info("wrote %s", argv[2])


if __name__ == "__main__":
  flags.DEFINE_enum(
    "param_dtype",
    None,
    ["bfloat16", "float16", "float32"],
    "Type of the floating-point weights; default: as they are.",
  )
  tool.run(main)
