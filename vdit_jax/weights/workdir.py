"""What lies in a workdir or a release of ours: config, weights, recipe."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
from etils import epath

from vdit_jax import checkpoint, schema, trees
from vdit_jax.convert import configs, folders
from vdit_jax.models import families, networks
from vdit_jax.nn import lora
from vdit_jax.text import tokenizer as tokenizers
from vdit_jax.weights import autoencoder as autoencoders
from vdit_jax.weights import base_model, frame_encoder, parts, run_config
from vdit_jax.weights import text_encoder as text_encoders

AUTOENCODER_FILE = autoencoders.FILE
RELEASE_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.model"


def load(
  path: epath.PathLike, *, step: int | None = None
) -> tuple[ml_collections.ConfigDict, networks.Modules, dict[str, Any]]:
  """Load what lies in a workdir or a release: config, modules, weights.

  The weights are all but those of a text encoder that was not trained;
  adapters lie beside those that they are of, see `nn.lora.attach`.
  """
  path = epath.Path(path)
  if folders.holds_component(path):
    raise ValueError(
      f"{path} is one component of a released pipeline; give the folder above "
      "it, which has model_index.json"
    )
  config = run_config.read(path)
  if "denoiser" not in config:
    raise ValueError(
      f"{path} is the workdir of an autoencoder, which cannot sample; pass "
      "the workdir of a denoiser trained on it"
    )
  if (path / RELEASE_FILE).exists():
    params, _ = checkpoint.load_release(path / RELEASE_FILE)
  else:
    params = checkpoint.restore_params(path, "ema", step)
  if adapters := params.pop(lora.PARAMS, None):
    params["denoiser"] = base_model.load(config, config.lora.base_dtype)
  own = (path / AUTOENCODER_FILE).exists()
  if not own and not config.get("autoencoder_workdir"):
    raise ValueError(f"{path} has no {AUTOENCODER_FILE}; fetch it again")
  params["autoencoder"] = autoencoders.load(
    path if own else config.autoencoder_workdir
  )
  modules = networks.build(config)
  _check_params(modules, params, path, bool(config.text_encoder_dir))
  if adapters:
    scale = lora.of(config).scale
    params["denoiser"] = lora.attach(params["denoiser"], adapters, scale)
  return config, modules, params


def read(
  path: epath.PathLike,
  *,
  step: int | None = None,
  param_dtype: Any = None,
  dtype: Any = None,
) -> parts.Parts:
  """Load a workdir or a release of ours with its text encoders.

  Args:
    path: of it.
    step: which checkpoint of a workdir; None is the newest.
    param_dtype: of the weights; None is as stored.
    dtype: of computations; None is what the run was trained with.
  """
  path = epath.Path(path)
  config, modules, params = load(path, step=step)
  words = {}
  for name in modules.text_encoders:
    if folder := config.text_encoder_dir:
      made_by = config[f"{name}_fingerprint"]
      stored = param_dtype or config[name].dtype
      frozen = text_encoders.load(folder, stored, made_by, name)
      params[name], words[name] = frozen.params, frozen.tokenizer
    else:
      words[name] = tokenizers.load(path / TOKENIZER_FILE)
  params |= frame_encoder.load_all(config)
  params = jax.tree.map(lambda x: jnp.asarray(x, param_dtype), params)
  return parts.Parts(
    modules=networks.with_dtype(modules, dtype),
    params=params,
    tokenizers=words,
    recipe=run_config.recipe(config),
    max_lengths=run_config.text_lengths(config),
  )


def _check_params(
  modules: networks.Modules, params: Any, path: epath.Path, frozen: bool
) -> None:
  """Refuse weights that are not those of the config's networks."""
  where = str(path / folders.CONFIG)
  for name in modules.networks.keys() & params.keys():
    network, weights = families.network_of(modules[name]), params[name]
    most = configs.held(trees.flatten(weights))["layers"]
    counts = {
      f"{name}.{k}": getattr(modules[name].cfg, k) for k in network.layers
    }
    fields = dict.fromkeys(counts, schema.Field(int, 1, most))
    schema.check(where, counts, fields, "the weights beside it are of no more")

  def expected():
    key = jax.random.key(0)
    autoencoder = networks.init(modules.autoencoder, key)
    boxed = networks.init_denoiser(modules, key) | {"autoencoder": autoencoder}
    if frozen:
      boxed = {k: v for k, v in boxed.items() if k not in modules.text_encoders}
    return nn.meta.unbox(boxed)

  trees.check_match(
    jax.eval_shape(expected),
    params,
    f"weights in {path}",
    check_dtype=False,  # what adapters are of is kept in lora.base_dtype
    remedy="use the config.json that they were saved with",
  )
