"""Make a release of a denoiser's workdir: what sampling needs, and no more.

  python -m vdit_jax.export --checkpoint=work/dit --out=DIR

writes the averaged weights in float16, the autoencoder's, the tokenizer and
the part of the config that describes the networks and how to sample.
`pipeline.load(DIR)` reads it.

Of a released model that was fine-tuned, DIR becomes what diffusers reads: the
denoiser's folder (`transformer/` of a pipeline), or, of adapters, one with
pytorch_lora_weights.safetensors, for `pipe.load_lora_weights(DIR)`. --merge
puts adapters into the weights that they were trained on, and writes those, in
float32: bfloat16 holds most changes of a fine-tuning on the average alone.
"""

import jax
import ml_collections
import numpy as np
from absl import flags, logging
from etils import epath

from vdit_jax import checkpoint, tool, writing
from vdit_jax.convert import folders
from vdit_jax.models import families, networks
from vdit_jax.nn import lora
from vdit_jax.weights import (
  adapters,
  base_model,
  component,
  frame_encoder,
  run_config,
)
from vdit_jax.weights import workdir as workdirs

_GROUPS = (
  "autoencoder",
  "denoiser",
  "objective",
  "sampling",
  "validation",
)


def export(
  workdir: epath.PathLike,
  out: epath.PathLike,
  step: int | None = None,
  merge: bool = False,
  param_dtype: str | None = None,
) -> None:
  """Write a release, or what diffusers reads of a released model's run.

  Args:
    workdir: of a denoiser's run.
    out: folder to write. Of a release files of the same names are replaced;
      for diffusers it must be free.
    step: which checkpoint; None is the newest.
    merge: whether adapters are written as part of the weights.
    param_dtype: of a released model's weights; None is as they were trained,
      or, merged, float32.
  """
  writing.check_folder(out, "out", free=False)
  config = run_config.read(workdir)
  if "denoiser" in config and base_model.is_released(config):
    _export_released(config, workdir, out, step, merge, param_dtype)
    return
  if merge or param_dtype:
    raise ValueError(
      "merge and param_dtype are for runs that fine-tuned a released model, "
      f"and {workdir} is not of one; leave them out"
    )
  # Refuses what does not fit; a frozen text encoder stays where it is.
  _, _, params = workdirs.load(workdir, step=step)
  frozen, modules = config.text_encoder_dir, networks.build(config)
  params = {k: jax.tree.map(np.asarray, v) for k, v in params.items()}
  autoencoder = params.pop("autoencoder")
  names = *_GROUPS, *modules.text_encoders
  kept = {name: config[name] for name in names}
  kept["data"] = {"max_length": config.data.max_length}
  if frozen:
    names = [f"{name}_fingerprint" for name in modules.text_encoders]
    kept |= {"text_encoder_dir": frozen, **{n: config[n] for n in names}}
  if beside := frame_encoder.names(config, modules.system):
    names = *beside, *(f"{name}_fingerprint" for name in beside)
    kept["frame_encoder_dir"] = config.frame_encoder_dir
    kept |= {name: config[name] for name in names}
  text = ml_collections.ConfigDict(kept).to_json(indent=2)
  with writing.folder(out, over=True) as folder:
    writing.write(folder / "config.json", text + "\n")
    if not frozen:
      name = workdirs.TOKENIZER_FILE
      writing.write(folder / name, (epath.Path(workdir) / name).read_bytes())
    checkpoint.save_release(folder / workdirs.AUTOENCODER_FILE, autoencoder, {})
    checkpoint.save_release(folder / workdirs.RELEASE_FILE, params, {})
    size = sum(file.stat().length for file in folder.iterdir())
  logging.info("%s: %.2f MB in all", out, size / 1e6)


def _export_released(config, workdir, out, step, merge, param_dtype) -> None:
  """Write a denoiser or its adapters in the layout of diffusers."""
  writing.check_folder(out, "out")
  base = base_model.folder_of(config.init_from, config.network)
  params = checkpoint.restore_params(workdir, "ema", step)
  if lora.PARAMS in params and not merge:
    factors = lora.scaled(params[lora.PARAMS], lora.of(config).scale)
    system = families.system(config.denoiser.name)
    name = config.network
    made_by = {name: config.init_fingerprint}
    adapters.write(out, system, {name: base}, {name: factors}, made_by)
    return
  weights = base_model.trained(config, params, param_dtype or "float32")
  if param_dtype:
    weights = jax.tree.map(lambda x: x.astype(param_dtype), weights)
  module = networks.build_module(config.denoiser, "denoiser")
  described = folders.read_config(base)
  component.save(component.Loaded(module, weights, described), out)


def main(argv: list[str]) -> None:
  """Export the flags' workdir."""
  tool.no_arguments(argv)
  logging.set_verbosity(logging.INFO)
  v = flags.FLAGS
  export(v.checkpoint, v.out, v.step, v.merge, v.param_dtype)


if __name__ == "__main__":
  flags.DEFINE_string("checkpoint", None, "Workdir.", required=True)
  flags.DEFINE_string("out", None, "Folder to write.", required=True)
  flags.DEFINE_integer("step", None, "Checkpoint; default: the newest.")
  flags.DEFINE_bool("merge", False, "Write adapters as part of the weights.")
  flags.DEFINE_enum(
    "param_dtype",
    None,
    ["bfloat16", "float32"],
    "Of a released model's weights; default: as they are, merged float32.",
  )
  tool.run(main, {"workdir": "--checkpoint", "path": "--checkpoint"})
