"""What lies in a workdir or a release of ours: config, weights, recipe."""

from typing import Any

import flax.linen as nn
import jax
import ml_collections
from etils import epath

from vdit_jax import checkpoint, trees, types
from vdit_jax.models import networks
from vdit_jax.weights import autoencoder as autoencoders
from vdit_jax.weights import base_model

AUTOENCODER_FILE = autoencoders.FILE
RELEASE_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.model"


def load(
  path: epath.PathLike, *, step: int | None = None
) -> tuple[ml_collections.ConfigDict, networks.Modules, dict[str, Any]]:
  """Load what lies in a workdir or a release: config, modules, weights.

  The weights are all but those of a text encoder that was not trained.
  """
  path = epath.Path(path)
  config = checkpoint.read_config(path)
  if "_class_name" in config or "architectures" in config:
    raise ValueError(
      f"{path} is one component of a released pipeline; give the folder above "
      "it, which has model_index.json"
    )
  if "denoiser" not in config:
    raise ValueError(
      f"{path} is the workdir of an autoencoder, which cannot sample; pass "
      "the workdir of a denoiser trained on it"
    )
  if (path / RELEASE_FILE).exists():
    params, _ = checkpoint.load_release(path / RELEASE_FILE)
  else:
    params = checkpoint.restore_params(path, "ema", step)
  if base_model.is_released(config):
    dtype = config.lora.base_dtype
    params = {"denoiser": base_model.trained(config, params, dtype)}
  own = (path / AUTOENCODER_FILE).exists()
  params["autoencoder"] = autoencoders.load(
    path if own else config.autoencoder_workdir
  )
  modules = networks.build(config)
  _check_params(modules, params, path, bool(text_encoder_dir(config)))
  return config, modules, params


def text_encoder_dir(config: ml_collections.ConfigDict) -> str:
  """Folder of the text encoder that a run does not train; "" if it does."""
  # Runs and releases older than this choice have no such key: they trained it.
  return config.text_encoder_dir if "text_encoder_dir" in config else ""


def recipe(config: ml_collections.ConfigDict) -> types.Recipe:
  """Read a config's sampling defaults."""
  fields = dict(config.sampling)
  return types.Recipe(
    denoisers=((0.0, 1.0, fields.pop("guidance")),),
    objective=config.objective.objective,
    schedule=dict(config.objective.schedule),
    **fields,
  )


def _check_params(
  modules: networks.Modules, params: Any, path: epath.Path, frozen: bool
) -> None:
  """Refuse weights that are not those of the config's networks."""

  def expected():
    key = jax.random.key(0)
    autoencoder = networks.init_autoencoder(modules.autoencoder, key)
    boxed = networks.init_denoiser(modules, key) | {"autoencoder": autoencoder}
    if frozen:
      del boxed["text_encoder"]
    return nn.meta.unbox(boxed)

  trees.check_match(
    jax.eval_shape(expected),
    params,
    f"weights in {path}",
    check_dtype=False,  # what adapters are of is kept in lora.base_dtype
    remedy="use the config.json that they were saved with",
  )
