"""The text encoder's row of `benchmarks.torch_vs_jax`."""

from typing import Any

import jax
import numpy as np
import torch
import transformers

from benchmarks import cogvideox_case as cases
from benchmarks import cogvideox_torch as theirs
from benchmarks import torch_vs_jax_sides as sides

VOCABULARY = 512
_LAYERS = 2


def config(tiny: bool, vocabulary: int) -> transformers.T5Config:
  """The encoder of T5 v1.1 XXL, with fewer layers."""
  widths = dict(d_model=4096, d_kv=64, d_ff=10240, num_heads=64)
  if tiny:
    widths = dict(d_model=32, d_kv=16, d_ff=64, num_heads=2)
  return transformers.T5Config(
    vocab_size=vocabulary,
    num_layers=_LAYERS,
    feed_forward_proj="gated-gelu",
    dropout_rate=0.0,
    **widths,
  )


def build(tiny: bool, vocabulary: int = VOCABULARY) -> theirs.Network:
  """The encoder, every parameter random."""
  network = transformers.T5EncoderModel(config(tiny, vocabulary))
  return theirs.draw(network.eval())


def run(how: sides.How) -> dict[str, Any]:
  """Measure the encoding of a negative and a prompt, as the pipeline does."""
  network = build(how.tiny)
  rng = np.random.default_rng(1)
  tokens = rng.integers(0, VOCABULARY, (2, cases.TEXT[0]))
  loaded = sides.copied(network)
  apply = jax.jit(
    lambda params, tokens: loaded.module.apply({"params": params}, tokens, None)
  )
  given, ids = jax.numpy.asarray(tokens, jax.numpy.int32), torch.tensor(tokens)
  runs = {"ours": lambda: apply(loaded.params, given)}
  for name, encoder in sides.ways(network, how).items():
    runs[name] = _encoder(encoder, ids)
  return sides.compare(runs, how, work=sides.work(runs["ours"]))


def _encoder(network, ids):
  @torch.no_grad()
  def run():
    return network(ids)[0]

  return run
