"""The autoencoder's rows of `benchmarks.torch_vs_jax`."""

import copy
from typing import Any

import diffusers
import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import cogvideox_case as cases
from benchmarks import cogvideox_jax as ours
from benchmarks import cogvideox_torch as theirs
from benchmarks import torch_vs_jax_sides as sides
from vdit_jax.cost import flops

_CHANNELS, _LAYERS = (64, 128, 128, 256), 3
_CLIP, _TRAINED = (25, 64, 96), (9, 64, 64)  # frames, height, width
_TINY = (9, 16, 16)


def run(what: str, how: sides.How) -> dict[str, Any]:
  """Measure a row: "encode", "decode" or "train"."""
  channels, layers = ((32,) * 4, 1) if how.tiny else (_CHANNELS, _LAYERS)
  config = cases.vae(channels, layers)
  vae = theirs.build(diffusers.AutoencoderKLCogVideoX, config)
  clip = _TRAINED if what == "train" else _CLIP
  return _PARTS[what](vae, _TINY if how.tiny else clip, how)


def _encode(vae, clip, how) -> dict[str, Any]:
  """Video to the posterior's mean."""
  video = _video(clip)
  runs = {"ours": ours.encoder(sides.copied(vae), video)}
  for name, way in _ways(vae, how).items():
    runs[name] = theirs.encoder(way, video)
  return sides.compare(runs, how, work=sides.work(runs["ours"]))


def _decode(vae, clip, how) -> dict[str, Any]:
  """Latents to video."""
  F, H, W = clip
  z = cases.decoded((-(-F // 4), H // 8, W // 8))
  runs = {"ours": ours.decoder(sides.copied(vae), z)}
  for name, way in _ways(vae, how).items():
    runs[name] = theirs.decoder(way, z)
  return sides.compare(runs, how, work=sides.work(runs["ours"]))


def _train(vae, clip, how) -> dict[str, Any]:
  """Loss of the reconstruction, gradients and an AdamW step."""
  video, loaded = _video(clip), sides.copied(vae)
  loss, args = ours.reconstruction_loss(loaded, video)
  work = flops.model_flops(loss, loaded.params, *args)
  params = jax.tree.map(jnp.copy, loaded.params)
  runs = {"ours": ours.trainer(loss, params, args)}
  for name, trained in _ways(vae, how).items():
    loss = theirs.reconstruction_loss(trained.train(), video)
    runs[name] = theirs.trainer(trained, loss)
  return sides.compare(runs, how, work=work, calls=2)


_PARTS = {"encode": _encode, "decode": _decode, "train": _train}


def _video(clip: tuple[int, int, int]) -> np.ndarray:
  """Noise in [-1, 1], [1, F, H, W, 3]."""
  rng = np.random.default_rng(1)
  return rng.uniform(-1, 1, (1, *clip, 3)).astype(np.float32)


def _ways(vae, how: sides.How) -> dict[str, Any]:
  """As it is, and a copy with encoder and decoder compiled.

  What is around them cuts the clip into chunks, in Python.
  """
  found = {"eager": vae}
  if how.compiled:
    found["compiled"] = compiled(copy.deepcopy(vae))
  return found


def compiled(vae):
  """Compile encoder and decoder in place."""
  for part in (vae.encoder, vae.decoder):
    part.compile(dynamic=False)
  return vae
