"""From clips and captions to what a denoiser works on.

  Batch --encode_video--> latents x0;  --encode_captions--> Text

Functions of params, for training; `pipeline` applies the same.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vdit_jax import types
from vdit_jax.models import networks
from vdit_jax.models import system as systems
from vdit_jax.models.system import Modules
from vdit_jax.nn import posterior
from vdit_jax.text import padding as paddings


def to_float(video: jax.Array) -> jax.Array:
  """Convert uint8 video to float32 in [-1, 1]; the inverse of media's."""
  return video.astype(jnp.float32) / 127.5 - 1.0


def encode_video(
  modules: Modules, params: Any, batch: types.Batch, key: jax.Array | None
) -> jax.Array:
  """Encode a batch to latents x0 [B, f, h, w, c], gradients stopped.

  From pixels, or from the cached posterior: its mean without a key, a sample
  with a key or one for each clip [B].
  """
  if batch.moments is None:
    variables = {"params": params["autoencoder"]}
    moments: Any = modules.autoencoder.apply(
      variables, to_float(batch.video), method="moments"
    )
    mean, logvar = moments
  else:
    mean, logvar = batch.moments
  mean, logvar = mean.astype(jnp.float32), logvar.astype(jnp.float32)
  if key is not None:
    mean = posterior.sample(mean, logvar, key)
  return jax.lax.stop_gradient(mean)


def latents_of(modules: Modules, batch: types.Batch) -> tuple[int, ...]:
  """Shape (f, h, w, c) of the latents of a batch's clips."""
  if batch.moments is not None:
    return batch.moments[0].shape[1:]
  return modules.autoencoder.latent_shape(*batch.video.shape[1:4])


def encode_captions(
  modules: Modules, params: Any, captions: Mapping[str, types.Captions]
) -> types.Text:
  """Encode captions by all text encoders, unless they came encoded."""
  return modules.system.join_text(encode_each(modules, params, captions))


def encode_each(
  modules: Modules, params: Any, captions: Mapping[str, types.Captions]
) -> dict[str, types.Text]:
  """Encode captions by each text encoder, unless they came encoded."""
  found = {}
  for name, rule in modules.system.text.items():
    given = captions[name]
    if given.embeds is None:
      found[name] = encode_text(
        modules[name], params[name], given.tokens, given.mask, rule.padding
      )
    else:
      text = types.Text(given.embeds, given.mask, given.pooled)
      found[name] = paddings.for_denoiser(rule.padding, text)
  return found


def encode_text(
  module: nn.Module,
  params: Any,
  tokens: jax.Array,
  mask: jax.Array,
  padding: str = "masked",
) -> types.Text:
  """Encode tokens [B, M]; a row whose mask [B, M] is all False is the null.

  Args:
    module, params: the text encoder.
    tokens, mask: of the texts.
    padding: one of `text.padding.KINDS`.
  """
  seen = None if padding == "seen" else mask
  output = module.apply({"params": params}, tokens, seen)
  return paddings.for_denoiser(padding, systems.text_of(output, mask))


def describe_text(module: nn.Module, B: int, M: int) -> types.Text:
  """Describe what a text encoder gives of B texts of M tokens, as shapes."""

  def encode() -> types.Text:
    tokens = jnp.zeros((B, M), jnp.int32)
    params = networks.init(module, jax.random.key(0))
    return encode_text(module, nn.meta.unbox(params), tokens, tokens == 0)

  with jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), ())):
    return jax.eval_shape(encode)


encode_text_jit = jax.jit(encode_text, static_argnums=(0, 4))


@functools.partial(jax.jit, static_argnums=(0, 1))
def apply(module: nn.Module, method: str, params: Any, *args: Any) -> Any:
  """Apply a method of an autoencoder with its params."""
  return module.apply({"params": params}, *args, method=method)


@functools.partial(jax.jit, static_argnums=0)
def decode_step(
  module: Any, params: Any, state: Any, latents: jax.Array
) -> tuple[Any, jax.Array]:
  """Decode the next latents of a stream: (state, video)."""
  return module.decode_step(params, state, latents)
