"""How a denoiser reads captions: as tokens, or encoded before.

Tokens are for a text encoder that is trained with it, and need the workdir's
tokenizer. With `config.text_encoder_dir` released ones are used: they have
encoded the dataset's captions (`vdit_jax.cache`) and are not there while
training, or encode them in the step where the dataset is of pixels.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from etils import epath

from vdit_jax import sampling, sharding, types
from vdit_jax.data import reading
from vdit_jax.models import families, networks
from vdit_jax.models.system import System
from vdit_jax.text import prompts as texts
from vdit_jax.text import tokenizer as tokenizers
from vdit_jax.weights import run_config
from vdit_jax.weights import text_encoder as text_encoders
from vdit_jax.weights import workdir as workdirs

Words = Mapping[str, reading.Words]


def words(
  config: ml_collections.ConfigDict, source: reading.Source, workdir: epath.Path
) -> dict[str, reading.Words]:
  """Say how each text encoder's captions are read, loading its tokenizer.

  Args:
    config: of the run, completed.
    source: of the records.
    workdir: of the run.
  """
  found = {}
  for name, length in run_config.text_lengths(config).items():
    tokenizer, folder = None, config.text_encoder_dir
    if not folder:
      tokenizer = tokenizers.load(workdir / workdirs.TOKENIZER_FILE)
    elif source.kind != "latents":
      tokenizer = text_encoders.load_tokenizer(folder, name)
    found[name] = reading.Words(tokenizer, length)
  return found


def encode(
  config: ml_collections.ConfigDict, prompts: list[str], stay: bool
) -> tuple[types.Text, dict[str, Any]]:
  """Encode by the released text encoders what training needs of them.

  Before training, whose weights may leave no room for theirs.

  Args:
    config: of the run, completed.
    prompts: of the samples.
    stay: whether the steps encode captions themselves.

  Returns:
    The Text that samples of the prompts need, and the weights that the loss
    uses: those of the encoders if they stay, and "null", the Text of the empty
    caption by encoder, where it needs them.
  """
  system = families.system(config.denoiser.name)
  recipe, lengths = run_config.recipe(config), run_config.text_lengths(config)
  cfg = networks.build_module(config.denoiser, "denoiser").cfg
  guided = sampling.settle(recipe, branches=system.branches(cfg)).guided
  own, learned = recipe.negative_prompt, system.nulls == {"learned"}
  # The null that is learned alone is put before the prompts by the pipeline.
  before = guided and not (learned and own is None)
  frozen, found, null = {}, {}, {}
  with jax.set_mesh(sharding.make_mesh(sharding.MeshShape(**config.mesh))):
    for name, rule in system.text.items():
      dtype = config[name].dtype
      loaded = text_encoders.load(config.text_encoder_dir, dtype, name=name)
      loaded.tokenizer.check(prompts, lengths[name])
      said = [*([own or ""] * len(prompts) if before else ()), *prompts, ""]
      found[name] = loaded.encode(said, lengths[name], rule.padding)
      if before and own is None and rule.null == "learned":
        found[name] = texts.without(found[name], len(prompts))
      if stay:
        frozen[name] = loaded.params
      if rule.null == "prompt":
        null[name] = jax.tree.map(lambda x: jnp.asarray(x[-1]), found[name])
  if null:
    frozen["null"] = null
  text = system.join_text(found)
  return jax.tree.map(lambda x: x[:-1], text), frozen


def check_same(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
  """Refuse to go on from weights that know other tokens or embeddings."""
  theirs = run_config.read(config.init_from)
  for name in families.system(config.denoiser.name).text:
    ours, other = (
      c[f"{name}_fingerprint"] if c.text_encoder_dir else "its own"
      for c in (config, theirs)
    )
    if ours != other:
      raise ValueError(
        f"init_from={config.init_from!r} was trained with text encoder "
        f"{other}, this run is to be with {ours}; set text_encoder_dir to the "
        "former's"
      )
  if config.text_encoder_dir:
    return
  mine, trained = (
    epath.Path(folder) / workdirs.TOKENIZER_FILE
    for folder in (workdir, config.init_from)
  )
  if mine.read_bytes() != trained.read_bytes():
    raise ValueError(
      f"init_from={config.init_from!r} was trained with another tokenizer; "
      f"copy {trained} to {mine}"
    )


def check_embeds(
  config: ml_collections.ConfigDict,
  source: reading.Source,
  name: str,
  made_by: str,
) -> None:
  """Refuse a dataset whose captions a text encoder did not encode.

  Args:
    config: of the run.
    source: of latents.
    name: of the text encoder.
    made_by: its fingerprint.
  """
  system = families.system(config.denoiser.name)
  found = source.metadata[name] if name in source.text_widths else None
  if found == made_by:
    _check_padding(config, source, name)
    return
  holds = f"embeddings of text encoder {found}" if found else "no embeddings"
  raise ValueError(
    f"data.name={source.name!r} holds {holds}, but "
    f"text_encoder_dir={config.text_encoder_dir!r} is {made_by}; make them "
    f"with {_command(config, system, source.metadata['data'])}"
  )


def _command(config, system: System, data: str) -> str:
  """The command that makes a cache for a run."""
  # Those of several are the folder's, which is a pipeline's.
  paddings = {rule.padding for rule in system.text.values()}
  padding = f"--padding={paddings.pop()} " if len(paddings) == 1 else ""
  return (
    f"python -m vdit_jax.cache --autoencoder={config.autoencoder_workdir} "
    f"--text_encoder={config.text_encoder_dir} {padding}"
    f"--max_length={config.data.max_length} --data={data} "
    f"--data_dir={config.data.data_dir} --name=NAME"
  )


def _check_padding(config, source: reading.Source, name: str) -> None:
  """Refuse embeddings whose padding was seen where it should not, or was not.

  Zeros in its place are what is put behind those of tokens alone.
  """
  system = families.system(config.denoiser.name)
  wanted = system.text[name].padding
  most = run_config.text_lengths(config)[name]
  known = text_encoders.made(source.metadata)
  made, length = known[f"{name}_padding"], known[f"{name}_max_length"]
  same = (made == "seen") == (wanted == "seen")
  if same and ("seen" != wanted or length == most):
    return
  raise ValueError(
    f"data.name={source.name!r} holds embeddings whose padding is {made}, "
    f"of {length} tokens, but this denoiser is for some whose padding is "
    f"{wanted}, of {most}; make them again with "
    f"{_command(config, system, source.metadata['data'])}"
  )
