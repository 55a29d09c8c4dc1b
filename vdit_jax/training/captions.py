"""How a denoiser reads captions: as tokens, or encoded before.

Tokens are for a text encoder that is trained with it, and need the workdir's
tokenizer. With `config.text_encoder_dir` a released one is used: it has
encoded the dataset's captions (`vdit_jax.cache`) and is not there while
training, or encodes them in the step where the dataset is of pixels.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
from etils import epath

from vdit_jax import checkpoint, sampling, sharding, types
from vdit_jax.data import reading
from vdit_jax.text import tokenizer as tokenizers
from vdit_jax.weights import text_encoder as text_encoders
from vdit_jax.weights import workdir as workdirs


def resolve(
  config: ml_collections.ConfigDict, source: reading.Source, workdir: epath.Path
) -> tokenizers.Tokenizer | None:
  """Read the tokenizer, or None for embeddings; complete the text encoder.

  A text encoder that is not trained is that of its folder, and computes as it
  did for the dataset.
  """
  if not config.text_encoder_dir:
    tokenizer = tokenizers.load(workdir / workdirs.TOKENIZER_FILE)
    config.text_encoder.vocab_size = tokenizer.vocab_size
    return tokenizer
  made_by = text_encoders.fingerprint(config.text_encoder_dir)
  tokenizer, dtype = None, config.text_encoder.dtype
  if source.kind != "latents":
    tokenizer = text_encoders.load_tokenizer(config.text_encoder_dir)
  else:
    _check_embeds(config, source, made_by)
    dtype = source.metadata["text_encoder_dtype"]
  cfg = text_encoders.read_config(config.text_encoder_dir, dtype)
  if cfg.width != config.denoiser.text_width:
    raise ValueError(
      f"denoiser.text_width is {config.denoiser.text_width}, but embeddings of "
      f"text_encoder_dir={config.text_encoder_dir!r} are {cfg.width} wide; set "
      f"denoiser.text_width={cfg.width}"
    )
  fields = {"name": "t5", **dataclasses.asdict(cfg)}
  config.text_encoder = ml_collections.ConfigDict(fields)
  config.text_encoder_fingerprint = made_by
  return tokenizer


def encode(
  config: ml_collections.ConfigDict, prompts: list[str], stays: bool
) -> tuple[types.Text, dict[str, Any]]:
  """Encode by the released text encoder what training needs of it.

  Before training, whose weights may leave no room for the text encoder's.

  Args:
    config: of the run, resolved.
    prompts: of the samples.
    stays: whether the steps encode captions themselves.

  Returns:
    The Text that samples of the prompts need, and the weights that the loss
    uses: "text_encoder" if it stays, and "null", the empty caption's
    embeddings, if it needs them.
  """
  recipe = workdirs.recipe(config)
  behind = []  # what guidance leads away from, if that is no learned null
  if recipe.negative_prompt is not None and sampling.settle(recipe).guided:
    behind = [recipe.negative_prompt] * len(prompts)
  texts, length = [*behind, *prompts, ""], config.data.max_length
  with jax.set_mesh(sharding.make_mesh(sharding.MeshShape(**config.mesh))):
    dtype = config.text_encoder.dtype
    loaded = text_encoders.load(config.text_encoder_dir, dtype)
    loaded.tokenizer.check(prompts, length)
    text = loaded.encode(texts, length, recipe.sees_padding)
  frozen = {"text_encoder": loaded.params} if stays else {}
  if recipe.sees_padding:
    frozen["null"] = jnp.asarray(text.embeds[-1])
  return jax.tree.map(lambda x: x[:-1], text), frozen


def check_same(config: ml_collections.ConfigDict, workdir: epath.Path) -> None:
  """Refuse to go on from weights that know other tokens or embeddings."""
  theirs = checkpoint.read_config(config.init_from)
  ours, other = (
    c.text_encoder_fingerprint if workdirs.text_encoder_dir(c) else "its own"
    for c in (config, theirs)
  )
  if ours != other:
    raise ValueError(
      f"init_from={config.init_from!r} was trained with text encoder {other}, "
      f"this run is to be with {ours}; set text_encoder_dir to the former's"
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


def _check_embeds(
  config: ml_collections.ConfigDict, source: reading.Source, made_by: str
) -> None:
  """Refuse a dataset whose captions this text encoder did not encode."""
  found = None
  if source.text_width is not None:
    found = source.metadata["text_encoder"]
  sees_padding = workdirs.recipe(config).sees_padding
  if found == made_by:
    _check_padding(config, source, sees_padding)
    return
  holds = f"embeddings of text encoder {found}" if found else "no embeddings"
  raise ValueError(
    f"data.name={source.name!r} holds {holds}, but "
    f"text_encoder_dir={config.text_encoder_dir!r} is {made_by}; make them "
    f"with python -m vdit_jax.cache --autoencoder={config.autoencoder_workdir} "
    f"--text_encoder={config.text_encoder_dir} "
    f"{'--sees_padding ' * sees_padding}"
    f"--max_length={config.data.max_length} --data={source.metadata['data']} "
    f"--data_dir={config.data.data_dir} --name=NAME"
  )


def _check_padding(config, source: reading.Source, wanted: bool) -> None:
  """Refuse embeddings that saw a padding where they should not, or none."""
  said = source.metadata
  made = said["sees_padding"] if "sees_padding" in said else False
  length = said["max_length"] if wanted and made else None
  if made == wanted and length in (None, config.data.max_length):
    return
  words = {True: "with", False: "without"}
  raise ValueError(
    f"data.name={source.name!r} holds embeddings {words[made]} their padding, "
    f"of {said['max_length']} tokens, but this denoiser is for some "
    f"{words[wanted]}, of {config.data.max_length}; make them again with "
    f"python -m vdit_jax.cache {'--sees_padding ' * wanted}"
    f"--max_length={config.data.max_length} ..."
  )
